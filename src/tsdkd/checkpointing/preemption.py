"""A run that is told to stop saves first: a signal to any of its processes sets a flag, all processes read it together
at the end of a step, save a checkpoint, and stop."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl

from ..config.stop_signals import announce_stop, handle_stop_signals

PREEMPTED_FILE = ".preempted"
"""In the output directory after such a stop: launchers lose the exit codes of their processes."""

_received: list[int] = []  # signals belong to the process, and so does this


@contextmanager
def catch_signals() -> Iterator[None]:
    """Within it, the signals set the flag, and a second Ctrl-C ends the process. May be entered again within."""
    if signal.getsignal(signal.SIGTERM) is _on_signal:
        yield
        return
    with handle_stop_signals(_on_signal):
        try:
            yield
        finally:
            _received.clear()


def _on_signal(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    if number == signal.SIGINT:
        # the default ends a process that hangs in C, too; in a notebook it would end the session
        signal.signal(signal.SIGINT, signal.default_int_handler if hasattr(sys, "ps1") else signal.SIG_DFL)
        if os.environ.get("RANK", "0") == "0":
            announce_stop()


class PreemptionCallback(TrainerCallback):
    """Saves and stops at the end of a step after which any process has received a signal.

    Attributes:
        is_preempted: whether it has.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.is_preempted = False

    def on_train_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self.is_preempted = False
        if state.is_world_process_zero:
            Path(args.output_dir, PREEMPTED_FILE).unlink(missing_ok=True)

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        flag = torch.tensor(len(_received), device=self.accelerator.device)
        if self.accelerator.reduce(flag, reduction="sum") and state.global_step < state.max_steps:
            self.is_preempted = control.should_save = True
            control.should_evaluate = False  # there may be no time

    def on_save(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop |= self.is_preempted  # only now: a checkpoint holds what control says

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if self.is_preempted:  # it has been saved
            control.should_save = control.should_evaluate = False

    def on_train_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if self.is_preempted and state.is_world_process_zero:
            Path(args.output_dir, PREEMPTED_FILE).touch()
