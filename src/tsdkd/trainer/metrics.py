"""Accumulates means (as sums and counts, divided once) and maxima over micro-batches and processes."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..objective import ObjectiveOutput


@dataclass
class _TimedBlock:
    """A timed block: tokens, start and end (seconds, or events of a CUDA stream), and inner blocks to exclude."""

    tokens: float
    ends: tuple[Any, Any]
    excluded: "list[_TimedBlock]"

    @property
    def seconds(self) -> float:
        start, end = self.ends
        if isinstance(start, float):
            whole: float = end - start
        else:
            end.synchronize()
            whole = start.elapsed_time(end) / 1000
        return whole - sum(span.seconds for span in self.excluded)


class MetricAccumulator:
    """Named sums and counts of one mode (training or evaluation). Names that end in "/max" keep the maximum."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._maxima: dict[str, float] = {}
        self._spans: dict[str, list[_TimedBlock]] = defaultdict(list)
        self._num_steps = 0

    def add(self, name: str, total: float, count: float) -> None:
        """Add to a metric's sum and count."""
        if name.endswith("/max"):
            self._maxima[name] = max(total, self._maxima.get(name, total))
            return
        sums = self._sums[name]
        sums[0] += total
        sums[1] += count

    def add_seconds(self, name: str, tokens: float, seconds: float) -> None:
        """Add the duration and the number of tokens of a part of a step."""
        self.add(f"speed/{name}_tokens_per_second", tokens, seconds)
        self.add(f"time/{name}_seconds", seconds, 0)  # `reduce_and_reset` divides by the number of steps

    def end_step(self, tokens: float, seconds: float) -> None:
        """Add an optimizer step: the number of trained completion tokens and the wall-clock time."""
        self.add_seconds("step", tokens, seconds)
        self._num_steps += 1

    @contextmanager
    def time_block(self, name: str, tokens: float, excluding: str | None = None) -> Iterator[None]:
        """Log the block's tokens per second and seconds per step, without the time of inner blocks named `excluding`.

        On CUDA, the time comes from events that are read in `reduce_and_reset`, so this does not synchronize.
        """
        others = self._spans[excluding] if excluding else []
        start, before = self._now(), len(others)
        yield
        self._spans[name].append(_TimedBlock(tokens, (start, self._now()), others[before:]))

    def _now(self) -> Any:
        if self._accelerator.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def reduce_and_reset(self) -> dict[str, float]:
        """Return each metric's sum divided by its count, over all processes, and reset. All processes must call it."""
        for name, spans in self._spans.items():
            for span in spans:
                self.add_seconds(name, span.tokens, span.seconds)
        self._spans.clear()
        for name in self._sums:
            if name.startswith("time/"):
                self._sums[name][1] = self._num_steps
        self._num_steps = 0
        names, peaks = sorted(self._sums), sorted(self._maxima)
        if not names:
            return {}
        device = self._accelerator.device
        local = torch.tensor([self._sums[n] for n in names], device=device)
        sums = self._accelerator.reduce(local, reduction="sum").tolist()
        found = {name: total / count for name, (total, count) in zip(names, sums, strict=True) if count > 0}
        if peaks:
            largest = self._accelerator.gather(torch.tensor([[self._maxima[n] for n in peaks]], device=device))
            found |= dict(zip(peaks, largest.amax(0).tolist(), strict=True))
        self._sums.clear()
        self._maxima.clear()
        return found


def term_gradient_norms(output: ObjectiveOutput, num_units: int, model: nn.Module) -> dict[str, float]:
    """Return the gradient norm of each weighted term, as if this micro-batch were the full batch."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = {}
    for name, term in output.terms.items():
        weighted = output.weights[name] * term / max(num_units, 1)
        gradients = torch.autograd.grad(weighted, parameters, retain_graph=True, allow_unused=True)
        norms = [g.float().norm() for g in gradients if g is not None]
        del gradients  # as large as the student: free them before the next term
        found[name] = float(torch.stack(norms).norm()) if norms else 0.0
    return found
