"""Measures the time of optimizer steps."""

import time
from typing import Any

from transformers import TrainerCallback

from .metrics import MetricAccumulator


class StepTimer(TrainerCallback):
    """Adds each optimizer step, including its rollout, to the metrics.

    It runs after a callback that synchronizes with the device, so that the work of the step is complete.
    """

    def __init__(self, metrics: MetricAccumulator) -> None:
        self._metrics = metrics
        self._started = 0.0
        self._num_tokens = 0

    def start(self) -> None:
        """Start timing a step, before its rollout."""
        self._started = time.perf_counter()

    def count(self, num_tokens: int) -> None:
        """Set the number of completion tokens that the step trains on in this process."""
        self._num_tokens = num_tokens

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._metrics.end_step(self._num_tokens, time.perf_counter() - self._started)
