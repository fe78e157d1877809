"""Checks a run's output directory: which run it belongs to, its configuration, and whether it can be resumed."""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import yaml
from transformers.trainer import TRAINER_STATE_NAME
from trl import ModelConfig

from ..checkpointing import checkpoint
from ..checkpointing.preemption import PREEMPTED_FILE
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

RUN_CONFIG_NAME = "tsdkd_config.yaml"  # the resolved configuration; marks an output directory as tsdkd's
_LEFTOVERS = {f".{RUN_CONFIG_NAME}.new", LOCK_NAME}  # from a run that was killed before it started
_TENSORBOARD_DIR, _TENSORBOARD_FILE = "runs", "events.out.tfevents."

# Keys that may differ when a run is resumed: they affect reporting, retention and speed, not what is learned.
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
    "padding_free",
    "max_tokens_per_micro_batch",
    "teacher_placement",
    "teacher_server_base_url",
    "teacher_server_timeout",
    "max_nonfinite_steps",
    "use_vllm",
    "accelerate_config",
    "num_processes",
}
_LENGTH_KEYS = {"max_steps", "num_train_epochs"}  # a run may be extended


def resolve_resume(arguments: RunArguments) -> str | None:
    """Return the checkpoint to resume from, or None to start a new run. All processes must call it.

    Raises:
        OutputDirError: see `check_output_dir`; or the directory contains a finished run without a checkpoint.
        ResumeError: there is no checkpoint, or it belongs to a run with another configuration.
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
                f"output_dir: {folder} contains a finished run without a checkpoint to resume from; choose another "
                "directory"
            )
        return None
    return str(checkpoint.get_last_valid_checkpoint(folder))


def check_output_dir(arguments: RunArguments) -> list[str]:
    """Check that the run may use its output directory.

    Returns:
        Messages about differences in length from the run in the directory.

    Raises:
        OutputDirError: the directory contains files that the run would overwrite or mix with, or a run with another
            configuration.
    """
    folder = Path(str(arguments.training_args.output_dir))
    require_dir_path(folder)
    present = _list_contents(folder)
    _require_run(folder, present)
    if present and not _is_resuming(arguments):
        raise OutputDirError(
            f"output_dir: {folder} contains an earlier run; continue it with --resume true or choose another directory"
        )
    changes, lengths = _describe_changes(arguments, folder) if present else ("", [])
    if changes:
        raise OutputDirError(f"output_dir: {folder} contains a different run: {changes}; choose another directory")
    return lengths


def find_changes(arguments: RunArguments) -> dict[str, str]:
    """The settings in which the run differs from the run in its output directory, also in length: name -> text.

    Raises:
        OutputDirError: the directory contains other files than those of a run.
    """
    folder = Path(str(arguments.training_args.output_dir))
    present = _list_contents(folder)
    _require_run(folder, present)
    return _find_changes(arguments, folder) if present else {}


def _require_run(folder: Path, present: Collection[str]) -> None:
    """Raise `OutputDirError` if a directory has contents, but not those of a run."""
    if present and RUN_CONFIG_NAME not in present:
        raise OutputDirError(
            f"output_dir: {folder} contains files that are not tsdkd's ({min(present)}, …); choose another directory"
        )


def _list_contents(folder: Path) -> set[str]:
    """Return the names in the directory; none if a run started there but saved no progress."""
    with wrap_os_errors(folder, action="read"):
        present = {path.name for path in folder.iterdir()} - _LEFTOVERS if folder.is_dir() else set()
    present = {name for name in present if not checkpoint.is_leftover(name)}
    if present <= {RUN_CONFIG_NAME, PREEMPTED_FILE, _TENSORBOARD_DIR} and _is_without_progress(folder):
        return set()
    return present


def _is_without_progress(folder: Path) -> bool:
    """Whether a run was killed here before its first checkpoint: only its configuration and its log are here, and
    nobody has edited the configuration."""
    path = folder / RUN_CONFIG_NAME
    logs = [file for file in (folder / _TENSORBOARD_DIR).rglob("*") if not file.is_dir()]
    if not path.is_file() or any(not file.name.startswith(_TENSORBOARD_FILE) for file in logs):
        return False
    try:
        return path.read_text(encoding="utf-8") == dump_config(load_yaml(path))
    except ValueError:
        return False


def require_writable(folder: Path) -> None:
    """Raise `OutputDirError` if a folder, which may not exist yet, can't be written to. Leaves no files behind."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    with wrap_os_errors(folder, action="written"), TemporaryFile(dir=place) as file:  # it has no name on most systems
        file.write(bytes(4096))
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def leave_nothing_on_error(folder: Path) -> Iterator[None]:
    """After an error, remove the folder and its parents if they are new and empty."""
    new = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for path in new:
                path.rmdir()
        raise


def has_final_model(folder: Path) -> bool:
    """Whether a run has saved its final student. The log is checked, because it is written last."""
    return (folder / TRAINER_STATE_NAME).is_file()


def _resolve_checkpoint(arguments: RunArguments, path: Path, folder: Path) -> str:
    """Verify the checkpoint that `resume_from_checkpoint` names, from this run or an equal run in another folder."""
    checkpoint.verify_checkpoint(path)
    run = path.resolve().parent
    elsewhere = run != folder.resolve() and (run / RUN_CONFIG_NAME).is_file()
    changes, lengths = _describe_changes(arguments, run) if elsewhere else ("", [])
    for line in lengths:
        logger.info(f"resume: {line}")
    if changes:
        raise ResumeError(
            f"resume_from_checkpoint: {path} belongs to a different run: {changes}; to start a new run from its "
            "weights, set model_name_or_path to it"
        )
    return str(path)


def _resume_setting(arguments: RunArguments) -> str:
    """`resume_from_checkpoint` as text: a path, "true" or "false"."""
    return str(arguments.training_args.resume_from_checkpoint or "false")


def _is_resuming(arguments: RunArguments) -> bool:
    return arguments.training_args.resume or _resume_setting(arguments).lower() != "false"


def write_run_config(arguments: RunArguments) -> tuple[Path, str]:
    """Write the resolved configuration into the output directory atomically. Call it on the main process.

    Returns:
        The file and its text.

    Raises:
        OutputDirError: another run has started there since `resolve_resume`.
    """
    path = Path(str(arguments.training_args.output_dir), RUN_CONFIG_NAME)
    if _list_contents(path.parent) and not _is_resuming(arguments):
        raise OutputDirError(f"output_dir: another run has started in {path.parent}; choose another directory")
    text = dump_config(build_run_config(arguments))
    write_atomically(path, text)
    return path, text


def dump_config(config: Any) -> str:
    """Return a resolved configuration as YAML."""
    return yaml.safe_dump(config, sort_keys=True, allow_unicode=True)


def read_run_config(folder: Path) -> dict[str, Any]:
    """Read the resolved configuration of the run in a folder, with renamed keys updated. Raises `DataError`."""
    path = folder / RUN_CONFIG_NAME
    try:
        values = load_yaml(path)
    except ValueError as error:
        raise DataError(f"{path} can't be read: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"{path} must contain a mapping, found {type(values).__name__}")
    return rename_deprecated(values)


def build_run_config(arguments: RunArguments) -> dict[str, Any]:
    """Return all tsdkd keys and all transformers and TRL keys that were set, without hub tokens."""
    values = {
        name: getattr(arguments.training_args, name)
        for name in declared_fields(find_method(arguments.method).config_class)
    }
    values |= {k: v for k, v in arguments.explicit_values.items() if not k.endswith("token")}
    return {"method": arguments.method, **{k: enum_value(v) for k, v in values.items()}}


def _describe_changes(arguments: RunArguments, folder: Path) -> tuple[str, list[str]]:
    """Return the differences that make the run in `folder` a different run, and the allowed differences in length."""
    texts = _find_changes(arguments, folder)
    other = "; ".join(text for name, text in texts.items() if name not in _LENGTH_KEYS)
    return other, [text for name, text in texts.items() if name in _LENGTH_KEYS]


def _find_changes(arguments: RunArguments, folder: Path) -> dict[str, str]:
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
    return {name: f"{name} was {old!r}, now {new!r}" for name, old, new in changed if old != new}
