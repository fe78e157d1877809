"""Shows a run's progress: one live line on a terminal, otherwise one line per log entry.

It replaces the callbacks of transformers, which print each log entry as a dictionary.
"""

import logging
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

_BAR = "step {n_fmt}/{total_fmt} |{bar:12}| {desc}"
_ACCURACY = re.compile(r"_(accuracy|avg@\d+|pass@\d+)$")
_PARTS_OF_A_STEP = ("rollout", "teacher", "student")


def replace_progress_callback(trainer: Trainer) -> None:
    """Replace the progress callbacks of transformers with `ProgressLineCallback`. Notebooks keep their table."""
    for callback in (ProgressCallback, PrinterCallback):
        if trainer.pop_callback(callback) is not None:
            trainer.add_callback(ProgressLineCallback())


@contextmanager
def closing_progress(trainer: Trainer) -> Iterator[None]:
    """End the live line of a trainer whose training fails, too."""
    try:
        yield
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressLineCallback):
                callback.close()


class ProgressLineCallback(TrainerCallback):
    """Prints the live line to stderr, unless `disable_tqdm` is set, and log lines to stdout.

    Prints nothing if `log_level` is above info.
    """

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._others_were_shown = False
        self._show_lines = False
        self._first_step: tuple[float, int] | None = None  # its end time in seconds, and its number
        self._metrics: list[str] = []  # from the last log entry
        self._num_evaluated = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or _is_quiet(args):
            return
        self._first_step, self._metrics = None, []
        show_bar = sys.stderr.isatty() and not args.disable_tqdm
        self._show_lines = not (show_bar and sys.stdout.isatty())
        if show_bar:
            shown = {"total": state.max_steps, "initial": state.global_step, "bar_format": _BAR, "disable": False}
            self._bar = tqdm(**shown, dynamic_ncols=True, leave=False)
            self._others_were_shown = is_progress_bar_enabled()
            disable_progress_bar()  # the one that transformers shows when saving

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._first_step = self._first_step or (time.monotonic(), state.global_step)
        if self._bar is not None:
            self._bar.n = state.global_step
            self._describe(", ".join([*self._time_left(state), *self._metrics]))

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kw: Any) -> None:
        self._num_evaluated += 1
        if self._bar is not None:
            self._describe(f"evaluating, batch {self._num_evaluated}")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self._num_evaluated = 0
        if state.is_world_process_zero and not _is_quiet(args) and metrics:
            self._write(f"step {state.global_step}, evaluation: {_describe_evaluation(metrics)}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        self._metrics = [*_describe_speed(logs, args.world_size), _describe_loss(logs)]
        if self._show_lines:
            step, step_time = f"step {state.global_step}/{state.max_steps}", describe_step_time(logs)
            self._write(", ".join([step, *reversed(self._metrics), *step_time, *self._time_left(state)]))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the live line, and show transformers' bars again if they were shown before."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
            if self._others_were_shown:
                enable_progress_bar()

    def _describe(self, text: str) -> None:
        assert self._bar is not None
        self._bar.set_description_str(text, refresh=False)
        self._bar.refresh()

    def _write(self, text: str) -> None:
        with tqdm.external_write_mode():  # clears the live line meanwhile
            print(text, flush=True)

    def _time_left(self, state: Any) -> list[str]:
        """Estimate the remaining time. Ignores the first step, which compiles, allocates and starts engines."""
        end, first = self._first_step or (0.0, state.global_step)
        if state.global_step == first:
            return []
        per_step = (time.monotonic() - end) / (state.global_step - first)
        return [f"{tqdm.format_interval(per_step * (state.max_steps - state.global_step))} left"]


def describe_step_time(metrics: Mapping[str, float]) -> list[str]:
    """Describe the seconds per optimizer step and its parts from the metrics `time/…`; empty without them."""
    if "time/step_seconds" not in metrics:
        return []
    parts = [(name, metrics.get(f"time/{name}_seconds", 0.0)) for name in _PARTS_OF_A_STEP]
    text = ", ".join(f"{name} {seconds:.2g}" for name, seconds in parts if seconds > 0)
    return [f"{metrics['time/step_seconds']:.2g} s/step" + (f" ({text})" if text else "")]


def _describe_loss(logs: Mapping[str, Any]) -> str:
    """Describe the loss and its terms, and the reward if there is one."""
    terms = [f"{name.removeprefix('loss/')} {_format(logs[name])}" for name in logs if name.startswith("loss/")]
    reward = [f"reward {_format(logs['reward'])}"] if "reward" in logs else []
    return ", ".join([*reward, f"loss {_format(logs['loss'])}" + (f" ({', '.join(terms)})" if len(terms) > 1 else "")])


def _describe_speed(logs: Mapping[str, Any], num_processes: int) -> list[str]:
    """Describe the completion tokens per second over all processes."""
    name = "speed/step_tokens_per_second"
    return [f"{logs[name] * num_processes:,.0f} tokens/s"] if name in logs else []


def _describe_evaluation(metrics: Mapping[str, Any]) -> str:
    """Describe accuracies, then losses. With several data sets, each name includes the data set's name."""
    accuracy = [f"{_short(name)} {100 * metrics[name]:.1f} %" for name in metrics if _ACCURACY.search(name)]
    losses = [f"{_short(name)} {_format(metrics[name])}" for name in metrics if name.endswith("_loss")]
    return ", ".join(accuracy + losses)


def _short(metric: str) -> str:
    return metric.removeprefix("eval_")


def _format(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else str(value)


def _is_quiet(args: Any) -> bool:
    return bool(args.log_level != "passive" and args.get_process_log_level() > logging.INFO)
