"""The wiring of a run: parse -> check -> plan -> train -> save. The program's table of contents."""

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers.trainer_utils import get_last_checkpoint
from trl import get_peft_config

from .config import METHODS, DataArguments, TokenSelectiveConfig
from .data import load_rows, prepare_rows
from .errors import ConfigError, OutputDirError
from .models import Pair, resolve_pair
from .parsing import RunArguments, parse_run
from .trainer import TokenSelectiveTrainer

RUN_FILE = "tsdkd_config.yaml"  # the resolved configuration; marks an output directory as ours


def parse(config: str | None, flags: Sequence[str]) -> RunArguments:
    """The run that a YAML file and flags ask for. Raises `ConfigError`."""
    if config is None and not flags:
        raise ConfigError(["--config: missing; name a YAML file or a shipped preset (`tsdkd configs` lists them)"])
    arguments = parse_run(config, flags)
    for note in arguments.notes:
        _say(note)
    return arguments


def train(arguments: RunArguments) -> TokenSelectiveTrainer:
    """Distil, save the student, and return the trainer.

    Raises:
        TSDKDError: before anything is written.
    """
    checkpoint = check_output_dir(arguments.training)
    trainer = build_trainer(arguments)
    _write_run_file(arguments)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    _say(f"saved the student to {arguments.training.output_dir}")
    return trainer


def build_trainer(arguments: RunArguments, **kwargs: Any) -> TokenSelectiveTrainer:
    """Check tokenizers and data, load both models. Raises `TSDKDError`."""
    from . import EOPDTrainer, TSDKDTrainer

    training, model = arguments.training, arguments.model
    train_rows, eval_rows = _load_data(arguments.data, training)
    _set_model_kwargs(arguments)
    trainer_class = {"tsd-kd": TSDKDTrainer, "eopd": EOPDTrainer}[arguments.method]
    trainer = trainer_class(
        model=str(model.model_name_or_path),
        teacher_model=str(training.teacher_model_name_or_path),
        args=training,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        peft_config=_peft_config(arguments),
        **kwargs,
    )
    trainer.dataset_name = arguments.data.dataset_name
    return trainer


def plan(arguments: RunArguments) -> None:
    """Print the resolved configuration and what the run would do, without loading weights or writing anything."""
    training = arguments.training
    checkpoint = check_output_dir(training)
    train_rows, eval_rows = _load_data(arguments.data, training)
    _set_model_kwargs(arguments)
    pair = resolve_pair(str(arguments.model.model_name_or_path), str(training.teacher_model_name_or_path), training)
    prepared = {
        name: prepare_rows(rows, pair.template, training, pair.context, needs_completion=training.lmbda < 1)
        for name, rows in (("train", train_rows), ("eval", eval_rows))
        if rows is not None
    }
    console = Console()
    console.print(
        yaml.safe_dump(_resolved(arguments), sort_keys=True, allow_unicode=True), markup=False, highlight=False
    )
    console.print(_plan_table(arguments, pair, prepared, checkpoint))
    example = pair.template.decode(prepared["train"][0]["prompt_ids"])
    console.print("first prompt, as the student sees it:", example, sep="\n", markup=False, highlight=False)


def _plan_table(arguments: RunArguments, pair: Pair, prepared: dict[str, Dataset], checkpoint: str | None) -> Table:
    training = arguments.training
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    prompts = len(prepared["train"])
    steps_per_epoch = -(-prompts // batch)
    steps = training.max_steps if training.max_steps > 0 else math.ceil(steps_per_epoch * training.num_train_epochs)
    tokens_per_step = sum(prepared["train"]["limit"]) / prompts * min(batch, prompts)
    student, teacher = pair.student_config, pair.teacher_config
    rows = {
        "method": arguments.method,
        "student": f"{arguments.model.model_name_or_path} ({student.model_type}, {pair.vocab_sizes[0]} logits)",
        "teacher": f"{training.teacher_model_name_or_path} ({teacher.model_type}, {pair.vocab_sizes[1]} logits)",
        "shared vocabulary": str(pair.shared_vocab_size),
        **{f"{name} prompts": str(len(rows)) for name, rows in prepared.items()},
        "global batch": f"{training.per_device_train_batch_size} x {training.gradient_accumulation_steps} accumulated "
        f"x {training.world_size} processes = {batch}",
        "optimizer steps": f"{steps} ({steps_per_epoch} an epoch)",
        "completion tokens": f"at most {round(tokens_per_step):,} a step",
        "output": f"{training.output_dir}{f', resuming from {checkpoint}' if checkpoint else ''}",
    }
    table = Table(title="Plan", show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _set_model_kwargs(arguments: RunArguments) -> None:
    """TRL's model arguments, as the trainer takes them."""
    model = arguments.model
    chosen = {"revision": model.model_revision, "dtype": model.dtype, "attn_implementation": model.attn_implementation}
    given = arguments.training.model_init_kwargs or {}
    arguments.training.model_init_kwargs = {**{k: v for k, v in chosen.items() if v is not None}, **given}


def check_output_dir(training: TokenSelectiveConfig) -> str | None:
    """The checkpoint to resume from, if any.

    Raises:
        OutputDirError: the directory has files that a run would mix with or overwrite.
        ConfigError: there is nothing to resume from.
    """
    folder, resume = Path(str(training.output_dir)), training.resume_from_checkpoint
    if resume and str(resume).lower() not in ("true", "false"):
        if not Path(resume, "trainer_state.json").is_file():
            raise ConfigError([f"resume_from_checkpoint: {resume} is not a checkpoint (it has no trainer_state.json)"])
        return str(resume)
    if folder.exists() and not folder.is_dir():
        raise OutputDirError(f"output_dir: {folder} is a file, expected a folder")
    present = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    if str(resume).lower() == "true":
        checkpoint = get_last_checkpoint(str(folder)) if present else None
        if checkpoint is None:
            raise ConfigError([f"resume_from_checkpoint: {folder} has no checkpoint to resume from"])
        return str(checkpoint)
    if present and RUN_FILE not in present:
        raise OutputDirError(f"output_dir: {folder} holds files that aren't tsdkd's ({present[0]}, …); choose another")
    if present:
        raise OutputDirError(
            f"output_dir: {folder} holds an earlier run; continue it with --resume_from_checkpoint true, or choose "
            "another"
        )
    return None


def _load_data(data: DataArguments, training: TokenSelectiveConfig) -> tuple[Dataset, Dataset | None]:
    rows = load_rows(str(data.dataset_name), data.dataset_config, data.dataset_train_split)
    evaluates = str(getattr(training.eval_strategy, "value", training.eval_strategy)) != "no" or training.eval_on_start
    if not evaluates:
        return rows, None
    name, field = (
        data.eval_dataset_name or data.dataset_name,
        "eval_dataset_name" if data.eval_dataset_name else "dataset_name",
    )
    return rows, load_rows(
        str(name), None if data.eval_dataset_name else data.dataset_config, data.dataset_test_split, field
    )


def _peft_config(arguments: RunArguments) -> Any:
    try:
        return get_peft_config(arguments.model)
    except ValueError as error:
        raise ConfigError(["use_peft: peft is not installed; pip install 'tsdkd[peft]'"]) from error


def _resolved(arguments: RunArguments) -> dict[str, Any]:
    """Every of our keys, and every key of transformers and TRL that was set."""
    own = {f.name for f in dataclasses.fields(METHODS[arguments.method])} & set(_own_keys(arguments.method))
    values = {name: getattr(arguments.training, name) for name in own}
    values |= {k: v for k, v in arguments.given.items() if k != "hub_token"}
    plain = {k: getattr(v, "value", v) for k, v in values.items()}
    return {"method": arguments.method, **plain}


def _own_keys(method: str) -> list[str]:
    """The keys that tsdkd declares or gives a default of its own."""
    declared = [c.__annotations__ for c in METHODS[method].__mro__ if c.__module__ == "tsdkd.config"]
    return list(dict.fromkeys(name for annotations in declared for name in annotations))


def print_keys() -> None:
    """The keys that tsdkd adds or gives another default, as a table."""
    table = Table(title="tsdkd's keys (all of TRL's ModelConfig and transformers' TrainingArguments work too)")
    for column in ("method", "key", "default", "meaning"):
        table.add_column(column, overflow="fold")
    for method, cls in METHODS.items():
        by_name = {f.name: f for f in dataclasses.fields(cls)}
        for name in _own_keys(method):
            table.add_row(method, name, str(by_name[name].default), by_name[name].metadata.get("help", ""))
    for f in dataclasses.fields(DataArguments):
        table.add_row("both", f.name, str(f.default), f.metadata["help"])
    Console().print(table)


def _write_run_file(arguments: RunArguments) -> None:
    if arguments.training.process_index == 0:
        folder = Path(str(arguments.training.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(_resolved(arguments), sort_keys=True, allow_unicode=True)
        (folder / RUN_FILE).write_text(text, encoding="utf-8")


def _say(text: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, flush=True)
