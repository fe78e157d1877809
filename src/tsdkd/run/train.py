"""The wiring of a run: parse -> check -> plan -> train -> save. The program's table of contents."""

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from transformers import get_scheduler
from trl import get_peft_config

from ..checkpointing.preemption import catch_signals
from ..config.base import DataArguments, TokenSelectiveConfig
from ..config.launch import LAUNCHED, LaunchArguments
from ..config.options import enum_value
from ..config.validation import get_default
from ..data import load_split, prepare_dataset
from ..errors import CheckpointError, ConfigError, DataError, ModelError, PreemptedError, TSDKDError
from ..methods import METHODS
from ..models.loading import ModelPair, resolve_pair
from ..trainer.trainer import TokenSelectiveTrainer
from .arguments import RunArguments, parse_args_and_config
from .output_dir import build_run_config, resolve_resume, write_run_config


def parse_arguments(config: str | None, flags: Sequence[str], trains: bool = True) -> RunArguments:
    """The run that a YAML file and flags ask for; one that isn't trained may want a GPU that isn't here. Raises
    `ConfigError`."""
    if config is None and not flags:
        raise ConfigError(["--config: missing; name a YAML file or a shipped preset (`tsdkd configs` lists them)"])
    arguments = parse_args_and_config(config, flags, trains)
    for note in arguments.notes:
        _print_rank_0(note)
    return arguments


def train(arguments: RunArguments) -> TokenSelectiveTrainer:
    """Distil, save the student, and return the trainer.

    Raises:
        PreemptedError: a signal stopped it, with a checkpoint.
        NonFiniteError, CheckpointError, EngineError: in mid-run; the last checkpoint is as it was.
        TSDKDError: before anything is written.
    """
    started = int(os.environ.get(LAUNCHED) or arguments.training.world_size)
    if started != arguments.training.world_size:
        raise ConfigError(
            [
                f"num_processes: {started} were started, yet this one knows of {arguments.training.world_size}: each "
                "would train alone; without a GPU set use_cpu: true"
            ]
        )
    checkpoint = resolve_resume(arguments)
    trainer = build_trainer(arguments)
    with catch_signals():  # until here a signal ends a process at once, as there is nothing to save
        trainer.accelerator.wait_for_everyone()  # the run's first file says that all of them are watching
        write_run_config(arguments)
        trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.preemption.stopped:
        raise PreemptedError(
            f"stopped by a signal after step {trainer.state.global_step}, the checkpoint is saved; continue with "
            "--resume true"
        )
    _save_student(trainer)
    _print_rank_0(f"saved the student to {arguments.training.output_dir}")
    return trainer


def _save_student(trainer: TokenSelectiveTrainer) -> None:
    """The student, and then the log, for `tsdkd report`; it also says that the run has ended."""
    try:
        trainer.save_model()
        trainer.save_state()
    except Exception as error:  # safetensors has exceptions of its own for a full disk
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"output_dir: the student can't be written to {trainer.args.output_dir}: {reason}; continue with "
            "--resume true, from the last checkpoint if there is one"
        ) from error


def build_trainer(arguments: RunArguments) -> TokenSelectiveTrainer:
    """Check tokenizers and data, load both models. Raises `TSDKDError`, with nothing written."""
    training, model = arguments.training, arguments.model
    train_rows, eval_rows = load_datasets(arguments.data, training)
    set_model_init_kwargs(arguments)
    folder = Path(str(training.output_dir))
    existed = folder.exists()
    try:
        trainer = METHODS[training.method](
            model=str(model.model_name_or_path),
            teacher_model=_teacher_name_or_path(arguments),
            args=training,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            peft_config=_peft_config(arguments),
        )
        validate_optimizer(trainer)
    except Exception as error:
        if not existed and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()  # transformers makes it before it checks everything
        if isinstance(error, TSDKDError):
            raise
        raise ConfigError([explain_error(error, arguments.given)]) from error
    trainer.dataset_name = arguments.data.dataset_name
    return trainer


def _num_training_steps(batches: int, training: TokenSelectiveConfig) -> int:
    """Optimizer steps of a run whose data loader yields so many batches an epoch."""
    per_epoch = max(1, math.ceil(batches / training.gradient_accumulation_steps))
    return training.max_steps if training.max_steps > 0 else math.ceil(per_epoch * training.num_train_epochs)


def validate_optimizer(trainer: TokenSelectiveTrainer) -> None:
    """Build what training will build, so that what fails there fails before anything is written."""
    args = trainer.args
    if len(trainer.get_train_dataloader()) == 0:
        raise ConfigError(["dataloader_drop_last: the data set is smaller than one batch, nothing would be left"])
    try:
        optimizer_class, kwargs = trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
        kwargs = {k: v for k, v in kwargs.items() if k not in ("params", "model", "optimizer_dict")}
        optimizer = optimizer_class([torch.nn.Parameter(torch.zeros(1))], **kwargs)
    except Exception as error:
        raise ConfigError([f"optim, optim_args: {error}"]) from error
    schedule = {"num_warmup_steps": 0, "num_training_steps": 10, "scheduler_specific_kwargs": args.lr_scheduler_kwargs}
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, **schedule)
    except Exception as error:
        raise ConfigError([f"lr_scheduler_type, lr_scheduler_kwargs: {error}"]) from error


def explain_error(error: Exception, given: dict[str, Any]) -> str:
    """One line for an exception of a library, with the keys whose name or value it mentions."""
    text = " ".join(str(error).split()) or type(error).__name__
    plain = text.replace("-", "_")

    def words(value: Any) -> list[str]:
        if isinstance(value, dict):
            return [w for item in value.items() for part in item for w in words(part)]
        if isinstance(value, list):
            return [w for part in value for w in words(part)]
        return [] if isinstance(value, bool) else [str(value)]  # "true" is in many a sentence

    named = [key for key in given if key in plain]
    named = named or [
        k for k, v in given.items() if any(len(w) > 2 and w.replace("-", "_") in plain for w in words(v))
    ]
    if given.get("push_to_hub") and not named:
        named = ["push_to_hub"]
    return (f"{', '.join(named)}: " if named else "the trainer can't be built: ") + text[:500]


def dry_run(arguments: RunArguments, processes: int | None = None) -> None:
    """Print the resolved configuration and what the run would do, without loading weights or writing anything.

    Args:
        arguments: the run.
        processes: how many it will have; by default those that there are.
    """
    training = arguments.training
    processes = processes or training.world_size
    training.steps_per_rollout(processes)
    checkpoint = resolve_resume(arguments)
    console = Console()
    console.print(
        yaml.safe_dump(build_run_config(arguments), sort_keys=True, allow_unicode=True), markup=False, highlight=False
    )
    known = _summarize_config(arguments, processes, checkpoint)
    try:
        pair, prepared = _prepare_datasets(arguments)
    except (DataError, ModelError):
        console.print(_summary_table(known))  # what can be said without the hub
        raise
    console.print(_summary_table({**known, **_summarize_datasets(arguments, processes, pair, prepared)}))
    example = pair.template.decode(prepared["train"][0]["prompt_ids"])
    console.print("first prompt, as the student sees it:", example, sep="\n", markup=False, highlight=False)


def _prepare_datasets(arguments: RunArguments) -> tuple[ModelPair, dict[str, Dataset]]:
    training = arguments.training
    train_rows, eval_rows = load_datasets(arguments.data, training)
    set_model_init_kwargs(arguments)
    pair = resolve_pair(str(arguments.model.model_name_or_path), _teacher_name_or_path(arguments), training)
    prepared = {
        name: prepare_dataset(rows, pair.template, training, pair.context, training.needs_completions)
        for name, rows in (("train", train_rows), ("eval", eval_rows))
        if rows is not None
    }
    return pair, prepared


def _global_batch_size(training: TokenSelectiveConfig, processes: int) -> int:
    return training.per_device_train_batch_size * training.gradient_accumulation_steps * processes


def _summarize_config(arguments: RunArguments, processes: int, checkpoint: str | None) -> dict[str, str]:
    """What follows from the configuration alone."""
    training = arguments.training
    return {
        "method": arguments.method,
        "global batch": f"{training.per_device_train_batch_size} x {training.gradient_accumulation_steps} accumulated "
        f"x {processes} processes = {_global_batch_size(training, processes)}",
        "completions": training.completions,
        **_summarize_rollouts(training, processes),
        "output": f"{training.output_dir}{f', resuming from {checkpoint}' if checkpoint else ''}",
    }


def _summarize_datasets(
    arguments: RunArguments, processes: int, pair: ModelPair, prepared: dict[str, Dataset]
) -> dict[str, str]:
    """What follows from the models and the data set."""
    training = arguments.training
    prompts = len(prepared["train"])
    batches = math.ceil(prompts / (training.per_device_train_batch_size * processes))
    tokens_per_step = sum(prepared["train"]["limit"]) / prompts * min(_global_batch_size(training, processes), prompts)
    student, teacher = pair.student_config, pair.teacher_config
    return {
        "student": f"{arguments.model.model_name_or_path} ({student.model_type}, {pair.vocab_sizes[0]} logits)",
        "teacher": f"{training.teacher_model_name_or_path} ({teacher.model_type}, {pair.vocab_sizes[1]} logits)"
        f"{', not loaded' if 'teacher_placement' in training.refused else ''}"
        if training.teacher_model_name_or_path
        else "none",
        "shared vocabulary": str(pair.shared_vocab_size),
        **{f"{name} prompts": str(len(rows)) for name, rows in prepared.items()},
        "optimizer steps": str(_num_training_steps(batches, training)),
        "completion tokens": f"at most {round(tokens_per_step):,} a step",
    }


def _summary_table(rows: dict[str, str]) -> Table:
    table = Table(title="Plan", show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _summarize_rollouts(training: TokenSelectiveConfig, processes: int) -> dict[str, str]:
    """How completions are sampled, where they are."""
    if training.lmbda == 0 and not training.starts_from_data:
        return {}
    engine = f"vLLM, {training.vllm_mode}" if training.use_vllm else "transformers"
    serves = f", each for {steps} steps" if (steps := training.steps_per_rollout(processes)) > 1 else ""
    return {"rollouts": f"by {engine}, temperature {training.temperature}, top_p {training.top_p}{serves}"}


def _teacher_name_or_path(arguments: RunArguments) -> str:
    """Its name; for a method without one the student's."""
    return str(arguments.training.teacher_model_name_or_path or arguments.model.model_name_or_path)


def set_model_init_kwargs(arguments: RunArguments) -> None:
    """TRL's model arguments, as the trainer takes them."""
    model = arguments.model
    chosen = {"revision": model.model_revision, "dtype": model.dtype, "attn_implementation": model.attn_implementation}
    given = arguments.training.model_init_kwargs or {}
    arguments.training.model_init_kwargs = {**{k: v for k, v in chosen.items() if v is not None}, **given}


def load_datasets(data: DataArguments, training: TokenSelectiveConfig) -> tuple[Dataset, Dataset | None]:
    """The rows to train on and those to evaluate on. Raises `DataError`."""
    name, is_file = str(data.dataset_name), Path(str(data.dataset_name)).is_file()
    if is_file and data.dataset_config:
        raise DataError(f"dataset_config: {data.dataset_config!r} has no effect, dataset_name is a single file")
    field = "dataset_train_split" if is_file and data.dataset_train_split != "train" else "dataset_name"
    rows = load_split(name, data.dataset_config, data.dataset_train_split, field)
    if enum_value(training.eval_strategy) == "no" and not training.eval_on_start:
        return rows, None
    if data.eval_dataset_name:
        split = "train" if Path(data.eval_dataset_name).is_file() else data.dataset_test_split
        return rows, load_split(data.eval_dataset_name, None, split, "eval_dataset_name")
    if is_file:
        raise DataError(f"eval_dataset_name: missing, and {name} is a single file without a split to evaluate on")
    return rows, load_split(name, data.dataset_config, data.dataset_test_split)


def _peft_config(arguments: RunArguments) -> Any:
    try:
        return get_peft_config(arguments.model)
    except ValueError as error:
        raise ConfigError(["use_peft: peft is not installed; pip install 'tsdkd[peft]'"]) from error


def print_methods() -> None:
    """The methods: what each is, its paper, and the options that only some methods have."""
    console = Console(highlight=False)
    common = {f.name for f in dataclasses.fields(TokenSelectiveConfig)} - {"beta"}
    for name, trainer in METHODS.items():
        cls = trainer.config_class
        console.print(f"[bold]{name}[/bold]  {(cls.__doc__ or '').splitlines()[0]}  [dim]{escape(cls.paper)}[/dim]")
        own = {option: get_default(cls, option) for option in cls.own_options() if option not in common}
        if own:
            console.print(Padding(", ".join(f"{k} {str(v).lower()}" for k, v in own.items()), (0, 0, 0, 4)))
        console.print(Padding(f"completions: {cls.completions}", (0, 0, 0, 4)))


def print_keys() -> None:
    """The keys that tsdkd adds or gives another default, as a table."""
    table = Table(title="tsdkd's keys (all of TRL's ModelConfig and transformers' TrainingArguments work too)")
    for column in ("method", "key", "default", "meaning"):
        table.add_column(column, overflow="fold", no_wrap=column == "key")
    classes: dict[str, type[TokenSelectiveConfig]] = {
        "all": TokenSelectiveConfig,
        **{name: trainer.config_class for name, trainer in METHODS.items()},
    }
    for method, cls in classes.items():
        by_name = {f.name: f for f in dataclasses.fields(cls)}
        for name in cls.own_options():
            table.add_row(method, name, str(by_name[name].default), by_name[name].metadata.get("help", ""))
    for f in (*dataclasses.fields(DataArguments), *dataclasses.fields(LaunchArguments)):
        table.add_row("all", f.name, str(f.default), f.metadata["help"])
    Console().print(table)


def _print_rank_0(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)
