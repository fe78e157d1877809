"""A buffer of rollouts that have not been trained on yet."""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

Batch = dict[str, Any]
Window = list[Batch]
"""The micro-batches of one optimizer step."""


class RolloutBuffer:
    """Windows of micro-batches with completions. One rollout may fill several windows.

    Args:
        window_size: micro-batches per step, `gradient_accumulation_steps`.
        steps_per_rollout: optimizer steps per rollout, over all its iterations.
        num_iterations: number of training passes over each rollout.
    """

    def __init__(self, window_size: int, steps_per_rollout: int, num_iterations: int = 1) -> None:
        self.window_size, self.steps_per_rollout, self.num_iterations = window_size, steps_per_rollout, num_iterations
        self._windows: deque[Window] = deque()
        self._batches_to_skip = 0  # the data loader yields these again after a resume

    def next(
        self, rows: Iterator[Batch], num_batches: int, steps_left: int, roll_out: Callable[[list[Batch]], list[Batch]]
    ) -> Window:
        """Return the next window, or an empty one at the end of the data.

        Args:
            rows: collated rows of the rest of the epoch, one micro-batch each.
            num_batches: number of micro-batches that the trainer requests for one step.
            steps_left: optimizer steps until the end of training.
            roll_out: called with the rows of several micro-batches if the buffer is empty; returns these with
                completions.
        """
        deque(islice(rows, self._batches_to_skip), maxlen=0)
        self._batches_to_skip = 0
        if not self._windows:
            steps = max(1, min(self.steps_per_rollout, steps_left))
            taken = list(islice(rows, num_batches if steps == 1 else self.window_size * steps))
            self._fill(taken, roll_out)
        return self._windows.popleft() if self._windows else []

    def _fill(self, rows: list[Batch], roll_out: Callable[[list[Batch]], list[Batch]]) -> None:
        size = self.window_size
        lengths = [len(rows[i : i + size]) for i in range(0, len(rows), size)]  # the last may be shorter
        # roll out only full windows; the remaining rows belong to the steps of later iterations
        batches = roll_out(rows[: size * -(-len(lengths) // self.num_iterations)])
        windows = [batches[i : i + size] for i in range(0, len(batches), size)] * self.num_iterations
        self._windows.extend(window[:n] for window, n in zip(windows, lengths, strict=False))
        for batch in batches[size:]:
            batch.pop("sampling_per_token_logps", None)  # outdated: the student will have changed

    def state_dict(self) -> list[Window]:
        """Return the remaining windows."""
        return list(self._windows)

    def load_state_dict(self, windows: list[Window]) -> None:
        """Restore the state of `state_dict()`. The data loader will yield the rows of these windows again."""
        self._windows = deque(windows)
        self._batches_to_skip = sum(len(window) for window in windows)
