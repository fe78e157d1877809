"""Describes what a run would do, without loading weights or writing files."""

import math
from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ..config.base import TokenSelectiveConfig
from ..config.options import enum_value
from ..config.user_code import load_grader
from ..config.validation import get_rules
from ..data import prepare_for_pair
from ..errors import DataError, ModelError, escape_line
from ..files import shorten_path
from ..models.loading import ModelPair, resolve_pair
from .arguments import RunArguments
from .build import load_datasets, set_model_init_kwargs, teacher_name_or_path
from .output_dir import build_run_config, dump_config, resolve_resume

_IMPORTANT = (
    *("bf16", "eval_strategy", "gradient_accumulation_steps", "gradient_checkpointing", "logging_steps", "max_steps"),
    *("num_train_epochs", "per_device_train_batch_size", "save_steps", "save_strategy", "seed", "warmup_steps"),
)
"""Options of transformers that are shown though they aren't set."""


def describe_run(arguments: RunArguments, processes: int | None = None) -> Iterator[RenderableType]:
    """Yield the resolved configuration and a summary of the run, without loading weights or writing files.

    Args:
        arguments: the run.
        processes: number of processes of the run; default: the current number.

    Raises:
        TSDKDError: any error that the run would raise before it loads the models. Everything known before the error
            has been yielded.
    """
    training = arguments.training_args
    processes = processes or training.world_size
    training.steps_per_rollout(processes)
    load_grader(training.grader)
    checkpoint = resolve_resume(arguments)
    yield Text(dump_config(_shown_config(arguments)))
    known = _summarize_config(arguments, processes, checkpoint)
    try:
        pair, prepared = _prepare_datasets(arguments)
    except (DataError, ModelError):
        yield _summary_table(known)  # this part doesn't need the hub
        raise
    yield _summary_table({**known, **_summarize_datasets(arguments, processes, pair, prepared)})
    first, decode = prepared["train"][0], pair.template_tokenizer.decode
    yield Text(f"first prompt, as the student sees it:\n{decode(first['prompt_ids'])}")
    if "teacher_prompt_ids" in first:
        yield Text(f"first prompt, as the teacher sees it:\n{decode(first['teacher_prompt_ids'])}")


def _shown_config(arguments: RunArguments) -> dict[str, Any]:
    """The configuration without options that have no effect, and with the most important ones of transformers."""
    training, config = arguments.training_args, build_run_config(arguments)
    for name, rules in get_rules(type(training)).items():
        is_of_vllm = name.startswith("vllm_") and not training.use_vllm
        is_without_effect = is_of_vllm or (rules.no_effect and rules.no_effect[0](vars(training)))
        if is_without_effect and name not in arguments.explicit_values:
            config.pop(name, None)
    return {**{name: enum_value(getattr(training, name)) for name in _IMPORTANT}, **config}


def _prepare_datasets(arguments: RunArguments) -> tuple[ModelPair, dict[str, Dataset]]:
    training = arguments.training_args
    train_rows, eval_rows = load_datasets(arguments.data_args, training)
    set_model_init_kwargs(arguments)
    pair = resolve_pair(str(arguments.model_args.model_name_or_path), teacher_name_or_path(arguments), training)
    prepared = {
        name: prepare_for_pair(rows, pair, training, training.needs_completions)
        for name, rows in (("train", train_rows), ("eval", eval_rows))
        if rows is not None
    }
    return pair, prepared


def _summarize_config(arguments: RunArguments, processes: int, checkpoint: str | None) -> dict[str, str]:
    """Return the table rows that depend only on the configuration."""
    training = arguments.training_args
    is_on_policy = training.has_lmbda and training.lmbda == 1
    return {
        "method": arguments.method,
        "global batch": f"{training.per_device_train_batch_size} x {training.gradient_accumulation_steps} accumulated "
        f"x {processes} {'process' if processes == 1 else 'processes'} = "
        f"{summarize_batch(training, processes)}",
        "completions": "the student's own" if is_on_policy else training.completions_source,
        "rollouts": summarize_rollouts(training, processes),
        "output": f"{training.output_dir}{f', resuming from {checkpoint}' if checkpoint else ''}",
    }


def _summarize_datasets(
    arguments: RunArguments, processes: int, pair: ModelPair, prepared: dict[str, Dataset]
) -> dict[str, str]:
    """Return the table rows that depend on the models and data sets."""
    training = arguments.training_args
    prompts = len(prepared["train"])
    completions = prompts * training.num_generations
    batches = math.ceil(completions / (training.per_device_train_batch_size * processes))
    per_step = min(training.global_batch_size(processes), completions)
    tokens_per_step = sum(prepared["train"]["limit"]) / prompts * per_step
    student, teacher, sizes = pair.student_config, pair.teacher_config, pair.vocab_sizes
    return {
        "student": f"{_shown(arguments.model_args.model_name_or_path)} ({student.model_type}, {sizes[0]} logits)",
        "teacher": f"{_shown(training.teacher_model_name_or_path)} ({teacher.model_type}, {sizes[1]} logits)"
        f"{'' if training.loads_teacher else ', not loaded'}"
        if training.teacher_model_name_or_path
        else "none",
        "shared vocabulary": str(pair.shared_vocab_size),
        **{f"{name} prompts": str(len(rows)) for name, rows in prepared.items()},
        "optimizer steps": str(num_training_steps(batches, training)),
        "completion tokens": f"at most {round(tokens_per_step):,} per step",
    }


def _shown(model: str | None) -> str:
    return shorten_path(str(model))


def summarize_rollouts(training: TokenSelectiveConfig, processes: int | None = None) -> str:
    """Describe how completions are sampled; empty if none are."""
    if training.lmbda == 0 and not training.always_needs_completions:
        return ""
    engine = f"vLLM ({training.vllm_mode})" if training.use_vllm else "transformers"
    steps = training.steps_per_rollout(processes)
    nucleus = f", top_p {training.top_p:g}" if training.top_p < 1 else ""
    serves = f"; each rollout serves {steps} steps" if steps > 1 else ""
    return f"by {engine} at temperature {training.temperature:g}{nucleus}{serves}"


def _summary_table(rows: dict[str, str]) -> Table:
    table = Table(title="Plan", show_header=False)
    for name, value in rows.items():
        if value:
            table.add_row(name, escape_line(value))
    return table


def num_training_steps(batches: int, training: TokenSelectiveConfig) -> int:
    """Return the number of optimizer steps, given the batches per epoch of the data loader."""
    per_epoch = max(1, math.ceil(batches / training.gradient_accumulation_steps))
    return training.max_steps if training.max_steps > 0 else math.ceil(per_epoch * training.num_train_epochs)


def summarize_batch(training: TokenSelectiveConfig, processes: int | None = None) -> str:
    """Describe the prompts, and completions, of an optimizer step; `processes` defaults to the current number."""
    completions, n = training.global_batch_size(processes), training.num_generations
    if n == 1:
        return f"{completions:,} {'prompt' if completions == 1 else 'prompts'}"
    return f"{completions:,} completions, {n} for each prompt"
