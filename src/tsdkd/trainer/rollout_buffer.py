"""A buffer of rollouts that have not been trained on yet."""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain, islice, pairwise
from typing import Any

Batch = dict[str, Any]
MicroBatches = list[Batch]
"""The micro-batches to run in place of one batch of the data loader: none or several."""

Window = list[MicroBatches]
"""An optimizer step, one entry for each batch of the data loader. The last entry has at least one micro-batch."""

RollOut = Callable[[list[list[Batch]]], list[MicroBatches]]
"""Converts collated rows, in parts that are divided into micro-batches separately, to one entry for each batch."""

RollOutAhead = Callable[[list[list[Batch]]], None]
"""Begins to sample completions for the collated rows of a later rollout, in the parts that `RollOut` will get."""


class RolloutBuffer:
    """Windows of micro-batches with completions. One rollout may fill several windows.

    Args:
        window_size: batches of the data loader per step, `gradient_accumulation_steps`.
        steps_per_rollout: optimizer steps per rollout, over all its iterations.
        num_iterations: number of training passes over each rollout.
    """

    def __init__(self, window_size: int, steps_per_rollout: int, num_iterations: int = 1) -> None:
        self.window_size, self.steps_per_rollout, self.num_iterations = window_size, steps_per_rollout, num_iterations
        self._windows: deque[Window] = deque()
        self._rows_ahead: list[Batch] = []
        self._batches_to_skip = 0  # the data loader yields these again after a resume

    def next(
        self,
        rows: Iterator[Batch],
        num_batches: int,
        steps_left: int,
        roll_out: RollOut,
        roll_out_ahead: RollOutAhead | None = None,
    ) -> Window:
        """Return the next window, or an empty one at the end of the data.

        Args:
            rows: batches of collated rows, the rest of the epoch.
            num_batches: number of batches that the trainer requests for one step.
            steps_left: optimizer steps until the end of training.
            roll_out: called if the buffer is empty.
            roll_out_ahead: called before the last window of a rollout, with the rows of the next one. Not at the end
                of an epoch, because the rows of the next epoch aren't known yet.
        """
        deque(islice(rows, self._batches_to_skip), maxlen=0)
        self._batches_to_skip = 0
        if not self._windows:
            taken = self._rows_ahead or self._take(rows, num_batches, steps_left)
            self._rows_ahead = []
            self._fill(taken, roll_out)
        window = self._windows.popleft() if self._windows else []
        if roll_out_ahead and not self._windows and steps_left > 1:
            self._rows_ahead = self._take(rows, self.window_size, steps_left - 1)
            if self._rows_ahead:
                roll_out_ahead(self._divide(self._rows_ahead))
        return window

    def _take(self, rows: Iterator[Batch], num_batches: int, steps_left: int) -> list[Batch]:
        """Take the rows of a rollout."""
        steps = max(1, min(self.steps_per_rollout, steps_left))
        return list(islice(rows, num_batches if steps == 1 else self.window_size * steps))

    def _window_lengths(self, rows: list[Batch]) -> list[int]:
        """Return the number of batches of each step; the last may be shorter."""
        size = self.window_size
        return [len(rows[i : i + size]) for i in range(0, len(rows), size)]

    def _divide(self, rows: list[Batch]) -> list[list[Batch]]:
        """Return the parts of a rollout. The rows that are left over belong to the steps of later iterations."""
        lengths = self._window_lengths(rows)
        num_windows = -(-len(lengths) // self.num_iterations)
        # a later iteration may repeat only the beginning of a window, which must then be a part of its own
        ends = sorted({i % num_windows * self.window_size + n for i, n in enumerate(lengths)})
        return [rows[start:end] for start, end in pairwise([0, *ends])]

    def _fill(self, rows: list[Batch], roll_out: RollOut) -> None:
        size = self.window_size
        entries = roll_out(self._divide(rows))
        windows = [entries[i : i + size] for i in range(0, len(entries), size)] * self.num_iterations
        self._windows.extend(window[:n] for window, n in zip(windows, self._window_lengths(rows), strict=False))
        for batch in chain.from_iterable(entries[size:]):
            batch.pop("sampling_per_token_logps", None)  # outdated: the student will have changed

    def state_dict(self) -> list[Window]:
        """Return the remaining windows. Rows that were taken ahead are left out: the data loader yields them again."""
        return list(self._windows)

    def load_state_dict(self, windows: list[Window]) -> None:
        """Restore the state of `state_dict()`. The data loader will yield the rows of these windows again."""
        self._windows, self._rows_ahead = deque(windows), []
        self._batches_to_skip = sum(len(window) for window in windows)
