"""The output directory of a run: whose it is, of which configuration, and whether there is something to continue."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import yaml
from transformers.trainer import TRAINER_STATE_NAME
from trl import ModelConfig

from ..checkpointing import checkpoint
from ..checkpointing.run_lock import LOCK_NAME
from ..config.aliases import rename_deprecated
from ..config.base import DataArguments
from ..config.logs import get_logger
from ..config.options import enum_value, get_default
from ..config.validation import declared_fields
from ..config.yaml_file import load_yaml
from ..errors import DataError, OutputDirError, ResumeError
from ..files import require_dir_path, wrap_os_errors, write_atomically
from ..methods import find_method
from .arguments import RunArguments

logger = get_logger(__name__)

RUN_CONFIG_NAME = "tsdkd_config.yaml"  # the resolved configuration; marks an output directory as ours
_LEFTOVERS = {f".{RUN_CONFIG_NAME}.new", LOCK_NAME}  # of a run that was killed before it had begun

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
        OutputDirError: as `check_output_dir`, or the directory has a run that has ended without a checkpoint.
        ResumeError: there is nothing to resume from, or a run of another configuration.
    """
    for line in check_output_dir(arguments):
        logger.info(f"resume: {line}")
    if not _is_resuming(arguments):
        return None
    folder, resume_setting = Path(str(arguments.training_args.output_dir)), _resume_setting(arguments)
    if resume_setting.lower() not in ("true", "false"):
        return _resolve_checkpoint(arguments, Path(resume_setting), folder)
    if arguments.training_args.resume and not checkpoint.list_checkpoints(folder):
        if has_final_model(folder):
            raise OutputDirError(
                f"output_dir: {folder} holds a run that has ended, without a checkpoint to go on from; choose another"
            )
        return None
    return str(checkpoint.get_last_valid_checkpoint(folder))


def check_output_dir(arguments: RunArguments) -> list[str]:
    """Check that the run may go into its output directory.

    Returns:
        How its length differs from that of the run which is there.

    Raises:
        OutputDirError: it has files that the run would mix with or overwrite, or a run of another configuration.
    """
    folder = Path(str(arguments.training_args.output_dir))
    require_dir_path(folder)
    with wrap_os_errors(folder, action="read"):
        present = {path.name for path in folder.iterdir()} - _LEFTOVERS if folder.is_dir() else set()
    if present and RUN_CONFIG_NAME not in present:
        raise OutputDirError(
            f"output_dir: {folder} holds files that aren't tsdkd's ({min(present)}, …); choose another"
        )
    if present and not _is_resuming(arguments):
        raise OutputDirError(
            f"output_dir: {folder} holds an earlier run; continue it with --resume true, or choose another"
        )
    changes, lengths = _describe_changes(arguments, folder) if present else ("", [])
    if changes:
        raise OutputDirError(f"output_dir: {folder} holds another run: {changes}; choose another directory")
    return lengths


def require_writable(folder: Path) -> None:
    """Raise `OutputDirError` if nothing could be written into a folder that may not be there yet; leaves nothing."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    with wrap_os_errors(folder, action="written"), TemporaryFile(dir=place) as file:  # it has no name on most systems
        file.write(bytes(4096))
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def leave_nothing_on_error(folder: Path) -> Iterator[None]:
    """After an error, remove the folder and its parents, as far as they are new and empty."""
    new = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for path in new:
                path.rmdir()
        raise


def has_final_model(folder: Path) -> bool:
    """Whether a run has saved its student; the log is the last that it writes."""
    return (folder / TRAINER_STATE_NAME).is_file()


def _resolve_checkpoint(arguments: RunArguments, path: Path, folder: Path) -> str:
    """A checkpoint that `resume_from_checkpoint` names, of this run or of one like it elsewhere."""
    checkpoint.verify_checkpoint(path)
    run = path.resolve().parent
    elsewhere = run != folder.resolve() and (run / RUN_CONFIG_NAME).is_file()
    changes, lengths = _describe_changes(arguments, run) if elsewhere else ("", [])
    for line in lengths:
        logger.info(f"resume: {line}")
    if changes:
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


def write_run_config(arguments: RunArguments) -> tuple[Path, str]:
    """Write the resolved configuration into the output directory, in one go. For the first process.

    Returns:
        The file, and its text.

    Raises:
        OutputDirError: another run has done so since `resolve_resume`.
    """
    path = Path(str(arguments.training_args.output_dir), RUN_CONFIG_NAME)
    if path.exists() and not _is_resuming(arguments):
        raise OutputDirError(f"output_dir: another run has begun in {path.parent}; choose another")
    text = yaml.safe_dump(build_run_config(arguments), sort_keys=True, allow_unicode=True)
    write_atomically(path, text)
    return path, text


def read_run_config(folder: Path) -> dict[str, Any]:
    """The resolved configuration of the run in a folder, by today's names. Raises `DataError`."""
    path = folder / RUN_CONFIG_NAME
    try:
        values = load_yaml(path)
    except ValueError as error:
        raise DataError(f"{path} can't be read: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"{path} must hold a mapping, found {type(values).__name__}")
    return rename_deprecated(values)


def build_run_config(arguments: RunArguments) -> dict[str, Any]:
    """All of tsdkd's keys and every transformers or TRL key that was set, without hub tokens."""
    values = {
        name: getattr(arguments.training_args, name)
        for name in declared_fields(find_method(arguments.method).config_class)
    }
    values |= {k: v for k, v in arguments.explicit_values.items() if not k.endswith("token")}
    return {"method": arguments.method, **{k: enum_value(v) for k, v in values.items()}}


def _describe_changes(arguments: RunArguments, folder: Path) -> tuple[str, list[str]]:
    """The differences that make the run in `folder` a different run, and the harmless ones, of its length."""
    try:
        before, now = read_run_config(folder), build_run_config(arguments)
    except DataError as error:
        raise OutputDirError(f"output_dir: {error}") from error
    defaults = {"method": None}
    for cls in (find_method(arguments.method).config_class, ModelConfig, DataArguments):
        defaults |= {f.name: get_default(cls, f.name) for f in fields(cls)}
    changed = [
        (name, *(run.get(name, enum_value(defaults.get(name))) for run in (before, now)))
        for name in sorted(before.keys() | now.keys())
        if name not in _MUTABLE_KEYS and (not name.startswith(_MUTABLE_PREFIXES) or "importance" in name)
    ]
    texts = {name: f"{name} was {old!r}, now {new!r}" for name, old, new in changed if old != new}
    other = "; ".join(text for name, text in texts.items() if name not in _LENGTH_KEYS)
    return other, [text for name, text in texts.items() if name in _LENGTH_KEYS]
