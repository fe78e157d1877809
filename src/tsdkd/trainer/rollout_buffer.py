"""Buffer of rollouts that are still to be trained on."""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

Batch = dict[str, Any]
Window = list[Batch]
"""The micro-batches of one optimizer step."""


class RolloutBuffer:
    """Windows of rolled-out micro-batches; one rollout may fill several.

    Args:
        window_size: micro-batches of a step, `gradient_accumulation_steps`.
        steps_per_rollout: optimizer steps that a rollout serves, over all its iterations.
        num_iterations: how often a rollout's completions are trained on.
    """

    def __init__(self, window_size: int, steps_per_rollout: int, num_iterations: int = 1) -> None:
        self.window_size, self.steps_per_rollout, self.num_iterations = window_size, steps_per_rollout, num_iterations
        self._windows: deque[Window] = deque()
        self._batches_to_skip = 0  # that the data loader yields again after a resume

    def next(
        self, rows: Iterator[Batch], num_batches: int, steps_left: int, roll_out: Callable[[list[Batch]], list[Batch]]
    ) -> Window:
        """The next window; an empty one at the end of the data.

        Args:
            rows: collated rows of the data set, a micro-batch each, of the rest of the epoch.
            num_batches: how many of them the trainer would take for one step.
            steps_left: optimizer steps to the end of training.
            roll_out: called with several micro-batches' rows where the buffer is empty; returns them rolled out.
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
        lengths = [len(rows[i : i + size]) for i in range(0, len(rows), size)]  # the last of an epoch may be shorter
        # whole windows are rolled out; the rows that are left out belong to the steps of the further iterations
        batches = roll_out(rows[: size * -(-len(lengths) // self.num_iterations)])
        windows = [batches[i : i + size] for i in range(0, len(batches), size)] * self.num_iterations
        self._windows.extend(window[:n] for window, n in zip(windows, lengths, strict=False))
        for batch in batches[size:]:
            batch.pop("sampling_per_token_logps", None)  # the student will have moved on from them

    def state_dict(self) -> list[Window]:
        """The windows that are left."""
        return list(self._windows)

    def load_state_dict(self, windows: list[Window]) -> None:
        """Continue from `state_dict()`; the data loader will yield the rows of these windows again."""
        self._windows = deque(windows)
        self._batches_to_skip = sum(len(window) for window in windows)
