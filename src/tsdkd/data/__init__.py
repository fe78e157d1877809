"""Prompts in any usual shape -> token ids and lengths, before training starts.

A row has `prompt` (a string or messages), `messages` (the last assistant turn is the completion), or `prompt` and
`completion`; `answer` is optional. Lengths say which tokens belong to the prompt and which to the completion; the pad
token is never compared with anything.
"""

from .batches import collate, completion_mask, find_longest_sequence, hash_rows, pad_sequences, target_ids
from .columns import Columns, append_prompt_suffix, missing_column, resolve_columns, split_prompt_completion
from .loading import load_split
from .packing import (
    Rows,
    divide,
    first_fit_decreasing,
    is_packed,
    num_positions,
    one_per_row,
    pack_rows,
    pack_sequences,
    split_to_count,
)
from .prepare import is_prepared, max_sequence_length, prepare_dataset, prepare_for_pair
from .reasoning_gym import default_grader, is_reasoning_gym
from .repeated import RepeatedRows, RepeatSampler

__all__ = [
    "Columns",
    "RepeatSampler",
    "RepeatedRows",
    "Rows",
    "append_prompt_suffix",
    "collate",
    "completion_mask",
    "default_grader",
    "divide",
    "find_longest_sequence",
    "first_fit_decreasing",
    "hash_rows",
    "is_packed",
    "is_prepared",
    "is_reasoning_gym",
    "load_split",
    "max_sequence_length",
    "missing_column",
    "num_positions",
    "one_per_row",
    "pack_rows",
    "pack_sequences",
    "pad_sequences",
    "prepare_dataset",
    "prepare_for_pair",
    "resolve_columns",
    "split_prompt_completion",
    "split_to_count",
    "target_ids",
]
