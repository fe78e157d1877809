"""The output directory of a run: whose it is, of which configuration, and whether there is something to continue."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from transformers.trainer import TRAINER_STATE_NAME
from trl import ModelConfig

from ..checkpointing import checkpoint
from ..config.aliases import rename_deprecated
from ..config.base import DataArguments
from ..config.logs import get_logger
from ..config.options import enum_value, get_default
from ..config.validation import declared_fields
from ..errors import DataError, OutputDirError, ResumeError
from ..files import read_bounded, require_dir_path, write_atomically
from ..methods import METHODS
from .arguments import RunArguments

logger = get_logger(__name__)

RUN_CONFIG_NAME = "tsdkd_config.yaml"  # the resolved configuration; marks an output directory as ours
_MAX_CONFIG_MIB = 1
_TMP_RUN_CONFIG_NAME = f".{RUN_CONFIG_NAME}.new"  # left by `write_atomically` when it is killed

# What may differ when a run goes on: it decides what is reported, kept, and how fast it goes, not what is learnt.
_MUTABLE_PREFIXES = ("logging_", "log_", "record_", "save_", "eval_", "hub_", "push_to_", "ddp_", "vllm_", "resume")
_MUTABLE_KEYS = {
    "output_dir",
    "disable_tqdm",
    "report_to",
    "run_name",
    "project",
    "trackio_space_id",
    "per_device_eval_batch_size",
    "dataset_test_split",
    "dataset_num_proc",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
    "head_chunk_gib",
    "teacher_placement",
    "max_nonfinite_steps",
    "use_vllm",
    "accelerate_config",
    "num_processes",
}
_LENGTH_KEYS = {"max_steps", "num_train_epochs"}  # a run may be made longer


def resolve_resume(arguments: RunArguments) -> str | None:
    """The checkpoint that the run is resumed from, or None to start. All processes must call it.

    Raises:
        OutputDirError: the directory has files that the run would mix with or overwrite, a run of another
            configuration, or one that has ended without a checkpoint.
        ResumeError: there is nothing to resume from, or a run of another configuration.
    """
    training = arguments.training_args
    folder, resume_setting = Path(str(training.output_dir)), _resume_setting(arguments)
    require_dir_path(folder)
    present = {path.name for path in folder.iterdir()} - {_TMP_RUN_CONFIG_NAME} if folder.is_dir() else set()
    if present and RUN_CONFIG_NAME not in present:
        raise OutputDirError(
            f"output_dir: {folder} holds files that aren't tsdkd's ({min(present)}, …); choose another"
        )
    is_resuming = _is_resuming(arguments)
    if present and not is_resuming:
        raise OutputDirError(
            f"output_dir: {folder} holds an earlier run; continue it with --resume true, or choose another"
        )
    if changes := _describe_changes(arguments, folder) if present else "":
        raise OutputDirError(f"output_dir: {folder} holds another run: {changes}; choose another directory")
    if not is_resuming:
        return None
    if resume_setting.lower() not in ("true", "false"):
        return _resolve_checkpoint(arguments, Path(resume_setting), folder)
    if training.resume and not checkpoint.list_checkpoints(folder):
        if has_final_model(folder):
            raise OutputDirError(
                f"output_dir: {folder} holds a run that has ended, without a checkpoint to go on from; choose another"
            )
        return None
    return str(checkpoint.get_last_valid_checkpoint(folder))


def has_final_model(folder: Path) -> bool:
    """Whether a run has saved its student; the log is the last that it writes."""
    return (folder / TRAINER_STATE_NAME).is_file()


def _resolve_checkpoint(arguments: RunArguments, path: Path, folder: Path) -> str:
    """A checkpoint that `resume_from_checkpoint` names, of this run or of one like it elsewhere."""
    checkpoint.verify_checkpoint(path)
    run = path.resolve().parent
    elsewhere = run != folder.resolve() and (run / RUN_CONFIG_NAME).is_file()
    if elsewhere and (changes := _describe_changes(arguments, run)):
        raise ResumeError(
            f"resume_from_checkpoint: {path} is of another run: {changes}; to start from its weights alone, "
            "make it model_name_or_path"
        )
    return str(path)


def _resume_setting(arguments: RunArguments) -> str:
    """`resume_from_checkpoint` as text: a path, "true" or "false"."""
    return str(arguments.training_args.resume_from_checkpoint or "false")


def _is_resuming(arguments: RunArguments) -> bool:
    return arguments.training_args.resume or _resume_setting(arguments).lower() != "false"


def write_run_config(arguments: RunArguments) -> None:
    """Write the resolved configuration into the output directory, in one go.

    Raises:
        OutputDirError: another run has done so since `resolve_resume`.
    """
    if arguments.training_args.process_index == 0:
        folder = Path(str(arguments.training_args.output_dir))
        if (folder / RUN_CONFIG_NAME).exists() and not _is_resuming(arguments):
            raise OutputDirError(f"output_dir: another run has begun in {folder}; choose another")
        text = yaml.safe_dump(build_run_config(arguments), sort_keys=True, allow_unicode=True)
        write_atomically(folder / RUN_CONFIG_NAME, text)


def read_run_config(folder: Path) -> dict[str, Any]:
    """The resolved configuration of the run in a folder, by today's names. Raises `DataError`."""
    path = folder / RUN_CONFIG_NAME
    try:
        return rename_deprecated(yaml.safe_load(read_bounded(path, _MAX_CONFIG_MIB)))
    except DataError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"{path} can't be read: {' '.join(str(error).split())[:200]}") from error


def build_run_config(arguments: RunArguments) -> dict[str, Any]:
    """All of tsdkd's keys and every transformers or TRL key that was set, without hub tokens."""
    values = {
        name: getattr(arguments.training_args, name)
        for name in declared_fields(METHODS[arguments.method].config_class)
    }
    values |= {k: v for k, v in arguments.explicit_values.items() if not k.endswith("token")}
    return {"method": arguments.method, **{k: enum_value(v) for k, v in values.items()}}


def _describe_changes(arguments: RunArguments, folder: Path) -> str:
    """Describe the differences that make the run in `folder` a different run; harmless ones (its length) are
    logged."""
    try:
        before, now = read_run_config(folder), build_run_config(arguments)
    except DataError as error:
        raise OutputDirError(f"output_dir: {error}") from error
    defaults = {"method": None}
    for cls in (METHODS[arguments.method].config_class, ModelConfig, DataArguments):
        defaults |= {f.name: get_default(cls, f.name) for f in fields(cls)}
    changed = [
        (name, *(run.get(name, enum_value(defaults.get(name))) for run in (before, now)))
        for name in sorted(before.keys() | now.keys())
        if name not in _MUTABLE_KEYS and (not name.startswith(_MUTABLE_PREFIXES) or "importance" in name)
    ]
    changed = [(name, old, new) for name, old, new in changed if old != new]
    lengths = [f"{name} was {old!r}, now {new!r}" for name, old, new in changed if name in _LENGTH_KEYS]
    for line in lengths:
        logger.info(f"resume: {line}")
    return "; ".join(f"{name} was {old!r}, now {new!r}" for name, old, new in changed if name not in _LENGTH_KEYS)
