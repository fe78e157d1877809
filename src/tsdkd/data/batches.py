"""Tokenized rows as the tensors of a micro-batch."""

import hashlib
from collections.abc import Sequence
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset


def hash_rows(rows: Dataset) -> str:
    """A digest of tokenized rows."""
    digest = hashlib.sha256()
    names = ["prompt_ids", "completion_ids", "limit", "teacher_prompt_ids"]
    for some in rows.select_columns([name for name in names if name in rows.column_names]).iter(1000):
        digest.update(repr(some).encode())
    return digest.hexdigest()


def find_longest_sequence(rows: Dataset) -> int:
    """Return the length of the longest possible prompt plus completion of tokenized rows, tokens."""
    prompts = [name for name in ("prompt_ids", "teacher_prompt_ids") if name in rows.column_names]
    tables = rows.select_columns([*prompts, "limit"]).with_format("arrow").iter(10_000)
    lengths = (pc.add(pc.list_value_length(t[name]), t["limit"]) for t in tables for name in prompts)
    return max(pc.max(of_batch).as_py() for of_batch in lengths)


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Collate rows as lists; tensors are made after the rollout."""
    return {key: [row[key] for row in rows] for key in rows[0]}


def pad_sequences(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Prompt + completion, padded on the right.

    There is no attention mask: a causal model never sees what comes later, and to look at a mask transformers would
    make the host wait for the device.

    Returns:
        `input_ids` `[B, S]`; `prompt_lengths`, `completion_lengths` `[B]`, all int64.
    """
    sequences = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
    width = max(len(s) for s in sequences)
    return {
        "input_ids": torch.tensor([s + [0] * (width - len(s)) for s in sequences]),
        "prompt_lengths": torch.tensor([len(p) for p in prompts]),
        "completion_lengths": torch.tensor([len(c) for c in completions]),
    }


def target_ids(batch: dict[str, torch.Tensor], index: torch.Tensor) -> torch.Tensor:
    """The tokens `[N]` that are predicted at the positions `index` of `[B, S - 1]`."""
    return batch["input_ids"][:, 1:].flatten().index_select(0, index)


def completion_mask(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The positions whose *next* token belongs to the completion.

    Returns:
        `[B, S - 1]` bool: where true, the logits there predict a completion token.
    """
    position = torch.arange(1, batch["input_ids"].shape[1], device=batch["input_ids"].device)
    start = batch["prompt_lengths"].unsqueeze(-1)
    return (position >= start) & (position < start + batch["completion_lengths"].unsqueeze(-1))
