"""A `Trainer` with atomic, verified checkpoints without pickles (DeepSpeed's pickles are restricted)."""

import random
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model, send_to_device
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from ..config.logs import get_logger
from ..config.stop_signals import leave_stop_signals_to_parent
from ..errors import CheckpointError
from ..files import has_text, write_atomically
from . import checkpoint, preemption
from .deepspeed_files import safe_deepspeed_load
from .run_lock import RunLock, on_main_process
from .state_file import load_state, save_state

logger = get_logger(__name__)
_OPTIMIZER = "optimizer.safetensors"


class CheckpointMixin(Trainer):
    """Must precede the trainer among the base classes. The trainer defines its extra state in checkpoints.

    Attributes:
        run_lock: lock of the output directory; `train` acquires it if it is not held.
        run_files: text files of the output directory; rewritten if they were changed.
    """

    run_lock: RunLock | None = None
    run_files: Mapping[Path, str] = {}

    def _get_extra_state(self) -> Any:
        """Return this process's extra state, in a form that `tsdkd.checkpointing.state_file` can store."""
        raise NotImplementedError

    def _set_extra_state(self, state: Any) -> None:
        raise NotImplementedError

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """See `Trainer.train`. If True, resume from the newest valid checkpoint in `output_dir`.

        Raises:
            ResumeError: there is no checkpoint, or the given one is invalid.
            OutputDirError: another run is using the output directory.
            CheckpointError: a checkpoint can't be written.
        """
        self.run_lock = self.run_lock or RunLock(Path(self.args.output_dir))
        restricted = safe_deepspeed_load() if self.is_deepspeed_enabled else nullcontext()
        with preemption.catch_signals(), self.run_lock.held(), restricted:
            return super().train(self._find_checkpoint(resume_from_checkpoint), *args, **kwargs)

    def _find_checkpoint(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """Return the verified checkpoint to resume from, and remove leftovers of interrupted saves."""
        if self.args.should_save:
            checkpoint.remove_partial_checkpoints(Path(self.args.output_dir))
        if not resume_from_checkpoint:
            return None
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(checkpoint.get_last_valid_checkpoint(Path(self.args.output_dir)))
        else:
            checkpoint.verify_checkpoint(Path(resume_from_checkpoint))
        logger.info(f"resuming from {resume_from_checkpoint}")
        return resume_from_checkpoint

    def _prepare_input(self, data: Any) -> Any:
        """See `Trainer`. Does not cast floats to DeepSpeed's precision: here they are scores, not model inputs."""
        return send_to_device(data, self.args.device, non_blocking=True)  # no need to wait for copies from the host

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """See `Trainer`. Makes workers ignore stop signals, which would end them in the middle of a step."""
        loader = super()._get_dataloader(*args, **kwargs)
        inner = getattr(loader, "base_dataloader", loader)  # unwrap accelerate's data loader
        inner.worker_init_fn = partial(_init_worker, inner.worker_init_fn)
        return loader

    # Saving

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.store_flos()
        self.restore_output_dir()
        run = Path(self.args.output_dir)
        best = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if best.is_dir() or self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(best)
        folder = checkpoint.write_checkpoint(run, self.state.global_step, self._write_files)
        if self.args.should_save:
            checkpoint.rotate_checkpoints(folder, self.args.save_total_limit, self.state.best_model_checkpoint)
        if self.args.push_to_hub:
            self.create_model_card()
            self._push_from_checkpoint(str(folder))

    def restore_output_dir(self) -> None:
        """Restore files that a resume needs besides a checkpoint, if they were deleted from the output directory.

        All processes must call it. Raises `OutputDirError` on all of them.
        """
        on_main_process(self._restore_output_dir)

    def _restore_output_dir(self) -> None:
        if self.run_lock is not None:
            self.run_lock.restore()
        for path, text in self.run_files.items():
            if not has_text(path, text):
                write_atomically(path, text)

    def _write_files(self, folder: Path) -> None:
        self.save_model(str(folder), _internal_call=True)
        if self.is_deepspeed_enabled:
            self.model_wrapped.save_checkpoint(str(folder), exclude_frozen_parameters=is_peft_model(self.model))
        process = {"rng_state": _get_rng_state(), "trainer": self._get_extra_state()}
        save_state(process, self._process_state_path(folder))
        if self.args.should_save:
            save_state({name: part.state_dict() for name, part in self._stateful_objects()}, folder / _OPTIMIZER)
            self._export_callbacks()
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """See `Trainer`. Does not save the pickled arguments, which contain the hub token."""
        folder = output_dir or self.args.output_dir
        if state_dict is not None:  # from DeepSpeed: copies, which hide that two names share a tensor
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in self._tied_weight_keys}
        self.model.save_pretrained(folder, state_dict=state_dict, is_main_process=self.args.should_save)
        if self.args.should_save:
            self.processing_class.save_pretrained(folder)

    @property
    def _tied_weight_keys(self) -> set[str]:
        return set(getattr(self.model, "all_tied_weights_keys", {}))

    def _export_callbacks(self) -> None:
        """Store the callbacks' states in the trainer state, as `Trainer` does."""
        exportable = [c for c in [*self.callback_handler.callbacks, self.control] if isinstance(c, ExportableState)]
        for callback in exportable:
            name, states = type(callback).__name__, self.state.stateful_callbacks
            if isinstance(states[name], list):
                states[name].append(callback.state())
            else:
                states[name] = callback.state()

    def _stateful_objects(self) -> list[tuple[str, Any]]:
        """Return the objects that the main process saves besides the model, with their names.

        DeepSpeed saves the optimizer, its own scheduler and the scaler with the model.
        """
        if self.is_deepspeed_enabled:
            from accelerate.utils import DeepSpeedSchedulerWrapper  # not available without DeepSpeed

            is_its_own = isinstance(self.lr_scheduler, DeepSpeedSchedulerWrapper)
            return [] if is_its_own else [("scheduler", self.lr_scheduler)]
        parts = {"optimizer": self.optimizer, "scheduler": self.lr_scheduler, "scaler": self.accelerator.scaler}
        return [(name, part) for name, part in parts.items() if part is not None]

    # Continuing

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """See `Trainer`. Ignores missing tied weights, which are stored under one name only."""
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in self._tied_weight_keys]
        super()._issue_warnings_after_load(load_result)

    def _load_best_model(self) -> None:
        """See `Trainer`. Raises an error if the best weights are missing, instead of keeping the last ones."""
        best = Path(self.state.best_model_checkpoint)
        if problem := checkpoint.find_damage(best):
            raise CheckpointError(
                f"load_best_model_at_end: {best} can't be loaded: {problem}; to save the last weights instead, "
                "continue with --resume true --load_best_model_at_end false"
            )
        super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = load_state(Path(checkpoint, _OPTIMIZER))
        for name, part in self._stateful_objects():
            part.load_state_dict(state[name])
        self._set_extra_state(load_state(self._process_state_path(checkpoint))["trainer"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            _set_rng_state(load_state(self._process_state_path(checkpoint))["rng_state"])

    def _process_state_path(self, folder: str | Path) -> Path:
        return Path(folder, f"process_{self.args.process_index}.safetensors")


def _init_worker(init: Callable[[int], Any] | None, worker_id: int) -> None:
    leave_stop_signals_to_parent()
    if init is not None:
        init(worker_id)


def _get_rng_state() -> dict[str, Any]:
    """Return the RNG states of Python, NumPy, torch and this process's device."""
    algorithm, words, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (algorithm, np.asarray(words).tolist(), *rest),
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
