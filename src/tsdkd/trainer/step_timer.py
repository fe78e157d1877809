"""Measures optimizer steps."""

import time
from typing import Any

from transformers import TrainerCallback

from .metrics import MetricAccumulator


class StepTimer(TrainerCallback):
    """Adds each optimizer step, rollout included, to the metrics.

    It comes after a callback that waits for the device, so that a step's work is done when it ends.
    """

    def __init__(self, metrics: MetricAccumulator) -> None:
        self._metrics = metrics
        self._started = 0.0
        self._num_tokens = 0

    def start(self) -> None:
        """A step begins, with its rollout."""
        self._started = time.perf_counter()

    def count(self, num_tokens: int) -> None:
        """The completion tokens, on this process, that the step trains on."""
        self._num_tokens = num_tokens

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._metrics.end_step(self._num_tokens, time.perf_counter() - self._started)
