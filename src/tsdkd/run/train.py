"""A run from its arguments to the saved student."""

import os

from ..checkpointing.preemption import catch_signals
from ..config.launch import LAUNCHED
from ..config.logs import get_logger
from ..errors import CheckpointError, ConfigError, PreemptedError
from ..trainer.trainer import TokenSelectiveTrainer
from .arguments import RunArguments
from .build import build_trainer
from .output_dir import resolve_resume, write_run_config

logger = get_logger(__name__)


def train(arguments: RunArguments) -> TokenSelectiveTrainer:
    """Distil, save the student, and return the trainer.

    Raises:
        PreemptedError: a signal stopped it, with a checkpoint.
        NonFiniteError, CheckpointError, EngineError: in mid-run; the last checkpoint is as it was.
        TSDKDError: before anything is written.
    """
    num_launched = int(os.environ.get(LAUNCHED) or arguments.training_args.world_size)
    if num_launched != arguments.training_args.world_size:
        raise ConfigError(
            [
                f"num_processes: {num_launched} were started, yet this one knows of "
                f"{arguments.training_args.world_size}: each would train alone; without a GPU set use_cpu: true"
            ]
        )
    checkpoint = resolve_resume(arguments)
    trainer = build_trainer(arguments)
    with catch_signals():  # until here a signal ends a process at once, as there is nothing to save
        trainer.accelerator.wait_for_everyone()  # the run's first file says that all of them are watching
        write_run_config(arguments)
        trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.preemption.is_preempted:
        raise PreemptedError(
            f"stopped by a signal after step {trainer.state.global_step}, the checkpoint is saved; continue with "
            "--resume true"
        )
    _save_student(trainer)
    logger.info(f"saved the student to {arguments.training_args.output_dir}")
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
