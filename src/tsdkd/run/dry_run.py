"""Shows what a run would do, without loading weights or writing anything."""

import math
from collections.abc import Iterator

import yaml
from datasets import Dataset
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ..config.base import TokenSelectiveConfig
from ..config.user_code import load_grader
from ..data import prepare_dataset
from ..errors import DataError, ModelError, escape_line
from ..models.loading import ModelPair, resolve_pair
from .arguments import RunArguments
from .build import load_datasets, set_model_init_kwargs, teacher_name_or_path
from .output_dir import build_run_config, resolve_resume


def describe_run(arguments: RunArguments, processes: int | None = None) -> Iterator[RenderableType]:
    """The resolved configuration and what the run would do, without loading weights or writing anything.

    Args:
        arguments: the run.
        processes: how many it will have; by default those that there are.

    Raises:
        TSDKDError: what the run would raise before it loads the models; what is known by then has been yielded.
    """
    training = arguments.training_args
    processes = processes or training.world_size
    training.steps_per_rollout(processes)
    load_grader(training.grader)
    checkpoint = resolve_resume(arguments)
    yield Text(yaml.safe_dump(build_run_config(arguments), sort_keys=True, allow_unicode=True))
    known = _summarize_config(arguments, processes, checkpoint)
    try:
        pair, prepared = _prepare_datasets(arguments)
    except (DataError, ModelError):
        yield _summary_table(known)  # what can be said without the hub
        raise
    yield _summary_table({**known, **_summarize_datasets(arguments, processes, pair, prepared)})
    example = pair.template_tokenizer.decode(prepared["train"][0]["prompt_ids"])
    yield Text(f"first prompt, as the student sees it:\n{example}")


def _prepare_datasets(arguments: RunArguments) -> tuple[ModelPair, dict[str, Dataset]]:
    training = arguments.training_args
    train_rows, eval_rows = load_datasets(arguments.data_args, training)
    set_model_init_kwargs(arguments)
    pair = resolve_pair(str(arguments.model_args.model_name_or_path), teacher_name_or_path(arguments), training)
    prepared = {
        name: prepare_dataset(rows, pair.template_tokenizer, training, pair.context_length, training.needs_completions)
        for name, rows in (("train", train_rows), ("eval", eval_rows))
        if rows is not None
    }
    return pair, prepared


def _summarize_config(arguments: RunArguments, processes: int, checkpoint: str | None) -> dict[str, str]:
    """Table rows that follow from the configuration alone."""
    training = arguments.training_args
    return {
        "method": arguments.method,
        "global batch": f"{training.per_device_train_batch_size} x {training.gradient_accumulation_steps} accumulated "
        f"x {processes} processes = {_global_batch_size(training, processes)}",
        "completions": training.completions_source,
        **_summarize_rollouts(training, processes),
        "output": f"{training.output_dir}{f', resuming from {checkpoint}' if checkpoint else ''}",
    }


def _summarize_datasets(
    arguments: RunArguments, processes: int, pair: ModelPair, prepared: dict[str, Dataset]
) -> dict[str, str]:
    """Table rows that follow from the models and the data sets."""
    training = arguments.training_args
    prompts = len(prepared["train"])
    batches = math.ceil(prompts / (training.per_device_train_batch_size * processes))
    tokens_per_step = sum(prepared["train"]["limit"]) / prompts * min(_global_batch_size(training, processes), prompts)
    student, teacher = pair.student_config, pair.teacher_config
    return {
        "student": f"{arguments.model_args.model_name_or_path} ({student.model_type}, {pair.vocab_sizes[0]} logits)",
        "teacher": f"{training.teacher_model_name_or_path} ({teacher.model_type}, {pair.vocab_sizes[1]} logits)"
        f"{'' if training.loads_teacher else ', not loaded'}"
        if training.teacher_model_name_or_path
        else "none",
        "shared vocabulary": str(pair.shared_vocab_size),
        **{f"{name} prompts": str(len(rows)) for name, rows in prepared.items()},
        "optimizer steps": str(_num_training_steps(batches, training)),
        "completion tokens": f"at most {round(tokens_per_step):,} a step",
    }


def _summarize_rollouts(training: TokenSelectiveConfig, processes: int) -> dict[str, str]:
    """Table rows about sampling; empty if nothing is sampled."""
    if training.lmbda == 0 and not training.always_needs_completions:
        return {}
    engine = f"vLLM, {training.vllm_mode}" if training.use_vllm else "transformers"
    serves = f", each for {steps} steps" if (steps := training.steps_per_rollout(processes)) > 1 else ""
    return {"rollouts": f"by {engine}, temperature {training.temperature}, top_p {training.top_p}{serves}"}


def _summary_table(rows: dict[str, str]) -> Table:
    table = Table(title="Plan", show_header=False)
    for name, value in rows.items():
        table.add_row(name, escape_line(value))
    return table


def _num_training_steps(batches: int, training: TokenSelectiveConfig) -> int:
    """Optimizer steps of a run whose data loader yields so many batches an epoch."""
    per_epoch = max(1, math.ceil(batches / training.gradient_accumulation_steps))
    return training.max_steps if training.max_steps > 0 else math.ceil(per_epoch * training.num_train_epochs)


def _global_batch_size(training: TokenSelectiveConfig, processes: int) -> int:
    return training.per_device_train_batch_size * training.gradient_accumulation_steps * processes
