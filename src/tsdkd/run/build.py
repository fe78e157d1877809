"""Builds the trainer of a run. Everything that can fail early fails here, before anything is written."""

import os
from typing import Any

import torch
from datasets import Dataset
from transformers import get_scheduler
from trl import get_peft_config

from ..config.base import DataArguments, TokenSelectiveConfig
from ..config.options import enum_value
from ..config.user_code import load_grader
from ..data import load_split, resolve_columns
from ..errors import ConfigError, DataError, TSDKDError, install_hint
from ..methods import find_method
from ..trainer.trainer import TokenSelectiveTrainer
from .arguments import RunArguments


def build_trainer(arguments: RunArguments) -> TokenSelectiveTrainer:
    """Check tokenizers and data, load both models, and build the trainer. Writes nothing. Raises `TSDKDError`."""
    training, model = arguments.training_args, arguments.model_args
    load_grader(training.grader)  # raises before anything is loaded
    train_rows, eval_rows = load_datasets(arguments.data_args, training)
    set_model_init_kwargs(arguments)
    try:
        trainer = find_method(arguments.method)(
            model=str(model.model_name_or_path),
            teacher_model=teacher_name_or_path(arguments),
            args=training,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            peft_config=_peft_config(arguments),
        )
        validate_optimizer(trainer)
    except Exception as error:
        if isinstance(error, TSDKDError):
            raise
        raise ConfigError([explain_error(error, arguments.explicit_values)]) from error
    trainer.dataset_name = arguments.data_args.dataset_name
    return trainer


def validate_optimizer(trainer: TokenSelectiveTrainer) -> None:
    """Build the optimizer and the schedule once, so that bad settings fail before anything is written."""
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
    """Explain an exception of a library in one line, with the keys whose names or values it mentions."""
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


def teacher_name_or_path(arguments: RunArguments) -> str:
    """The teacher's name or path; the student's if the method has no teacher."""
    return str(arguments.training_args.teacher_model_name_or_path or arguments.model_args.model_name_or_path)


def set_model_init_kwargs(arguments: RunArguments) -> None:
    """Copy TRL's model arguments into `model_init_kwargs`."""
    model = arguments.model_args
    chosen = {"revision": model.model_revision, "dtype": model.dtype, "attn_implementation": model.attn_implementation}
    given = arguments.training_args.model_init_kwargs or {}
    arguments.training_args.model_init_kwargs = {**{k: v for k, v in chosen.items() if v is not None}, **given}


def load_datasets(data: DataArguments, training: TokenSelectiveConfig) -> tuple[Dataset, Dataset | None]:
    """Load the training and evaluation rows, and check their columns. Raises `DataError`."""
    name, is_file = str(data.dataset_name), os.path.isfile(str(data.dataset_name))  # names may be longer than a path
    if is_file and data.dataset_config:
        raise DataError(f"dataset_config: {data.dataset_config!r} has no effect, dataset_name is a single file")
    field = "dataset_train_split" if is_file and data.dataset_train_split != "train" else "dataset_name"
    rows = load_split(name, data.dataset_config, data.dataset_train_split, field)
    resolve_columns(rows, training, f"dataset_name {name}")
    if enum_value(training.eval_strategy) == "no" and not training.eval_on_start:
        return rows, None
    if data.eval_dataset_name:
        split = "train" if os.path.isfile(data.eval_dataset_name) else data.dataset_test_split
        eval_rows = load_split(data.eval_dataset_name, None, split, "eval_dataset_name")
        source = f"eval_dataset_name {data.eval_dataset_name}"
    elif is_file:
        raise DataError(f"eval_dataset_name: missing, and {name} is a single file without a split to evaluate on")
    else:
        eval_rows = load_split(name, data.dataset_config, data.dataset_test_split)
        source = f"dataset_name {name} (split {data.dataset_test_split})"
    resolve_columns(eval_rows, training, source, needs_answer=True)
    return rows, eval_rows


def _peft_config(arguments: RunArguments) -> Any:
    try:
        return get_peft_config(arguments.model_args)
    except ValueError as error:
        raise ConfigError([f"use_peft: peft is not installed; {install_hint('peft')}"]) from error
