"""Runs training, from the arguments to the saved student."""

import os
from contextlib import closing
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..checkpointing.preemption import catch_signals
from ..checkpointing.run_lock import RunLock, on_main_process
from ..config.launch import LAUNCHED
from ..errors import CheckpointError, ConfigError, OutputDirError, PreemptedError, TSDKDError
from ..trainer.trainer import TokenSelectiveTrainer
from .announce import announce_end, announce_start
from .arguments import RunArguments
from .build import build_trainer
from .output_dir import (
    RUN_CONFIG_NAME,
    check_output_dir,
    leave_nothing_on_error,
    require_writable,
    resolve_resume,
    write_run_config,
)


def train(arguments: RunArguments) -> TokenSelectiveTrainer:
    """Train, save the student and return the trainer.

    Raises:
        PreemptedError: a signal stopped the run after it saved a checkpoint.
        NonFiniteError, CheckpointError, EngineError: the run failed; its last checkpoint is intact.
        TSDKDError: the input is invalid. Nothing has been written.
    """
    num_launched = int(os.environ.get(LAUNCHED) or arguments.training_args.world_size)
    if num_launched != arguments.training_args.world_size:
        raise ConfigError(
            [
                f"num_processes: {num_launched} processes were started, but this one is in a group of "
                f"{arguments.training_args.world_size}, so each would train alone; without a GPU, set use_cpu: true"
            ]
        )
    folder = Path(str(arguments.training_args.output_dir))
    with leave_nothing_on_error(folder), closing(RunLock(folder)) as lock:
        check_output_dir(arguments)
        require_writable(folder)
        lock.acquire(only_beside=RUN_CONFIG_NAME)
        checkpoint = resolve_resume(arguments)
        trainer = build_trainer(arguments)
        with catch_signals():  # before this, a signal ends the process at once: there is nothing to save
            trainer.accelerator.wait_for_everyone()  # the run's first file shows that all processes handle signals
            lock.acquire()
            trainer.run_lock, trainer.run_files = lock, dict([on_main_process(lambda: write_run_config(arguments))])
            announce_start(arguments, trainer)
            _train_and_save(trainer, checkpoint)
    return trainer


def _train_and_save(trainer: TokenSelectiveTrainer, checkpoint: str | None) -> None:
    folder = Path(str(trainer.args.output_dir))
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except TSDKDError:
        raise
    except OSError as error:
        file = Path(os.fsdecode(error.filename if isinstance(error.filename, str | bytes | os.PathLike) else ""))
        if not file.is_relative_to(folder):
            raise
        raise OutputDirError(
            f"output_dir: {file} can't be written: {error.strerror}; continue with --resume true"
        ) from error
    if trainer.preemption.is_preempted:
        step = trainer.state.global_step
        saved = folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        raise PreemptedError(f"stopped by a signal after step {step}; saved {saved}")
    _save_student(trainer)
    announce_end(trainer)


def _save_student(trainer: TokenSelectiveTrainer) -> None:
    """Save the student, then the log. `tsdkd report` reads the log, which also marks the run as finished."""
    try:
        trainer.restore_output_dir()
        trainer.save_model()
        trainer.save_state()
    except Exception as error:  # safetensors raises its own exceptions if the disk is full
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"output_dir: the student can't be written to {trainer.args.output_dir}: {reason}; continue from the last "
            "checkpoint, if there is one, with --resume true"
        ) from error
