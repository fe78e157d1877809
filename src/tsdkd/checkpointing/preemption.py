"""Saves a checkpoint when a signal stops a run.

A signal to any process sets a flag. At the end of a step, all processes read it together, save a checkpoint and stop.
"""

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
"""Created in the output directory after such a stop, because launchers do not pass on the processes' exit codes."""

_received: list[int] = []  # global, because signals are per process


@contextmanager
def catch_signals() -> Iterator[None]:
    """Within the block, stop signals set the flag, and a second Ctrl-C ends the process. Reentrant."""
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
        # the default handler also ends a process that hangs in C code; in a notebook it would end the session
        signal.signal(signal.SIGINT, signal.default_int_handler if hasattr(sys, "ps1") else signal.SIG_DFL)
        if os.environ.get("RANK", "0") == "0":
            announce_stop()


class PreemptionCallback(TrainerCallback):
    """Saves and stops at the end of a step if any process has received a signal.

    Attributes:
        is_preempted: whether a signal was received.
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
        control.should_training_stop |= self.is_preempted  # only now, because the checkpoint stores `control`

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if self.is_preempted:  # already saved
            control.should_save = control.should_evaluate = False

    def on_train_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if self.is_preempted and state.is_world_process_zero:
            Path(args.output_dir, PREEMPTED_FILE).touch()
