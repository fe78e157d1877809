"""Running means over micro-batches and processes: sums and counts, divided once. And maxima."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator


class RunningMeans:
    """Named sums and counts of one mode (training or evaluation); of a name that ends in "/max" the largest value."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._peaks: dict[str, float] = {}

    def add(self, name: str, total: float, count: float) -> None:
        """Add to a metric's sum and count."""
        if name.endswith("/max"):
            self._peaks[name] = max(total, self._peaks.get(name, total))
            return
        sums = self._sums[name]
        sums[0] += total
        sums[1] += count

    @contextmanager
    def rate(self, name: str, tokens: float, excluding: str | None = None) -> Iterator[None]:
        """Log `tokens` per second of the block (a process), without the time that metric `excluding` took in it."""
        start, before = time.perf_counter(), self._seconds(excluding)
        yield
        if self._accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        self.add(name, tokens, time.perf_counter() - start - (self._seconds(excluding) - before))

    def _seconds(self, name: str | None) -> float:
        return self._sums[name][1] if name in self._sums else 0.0

    def drain(self) -> dict[str, float]:
        """Sum over count of every metric, over all processes, and start anew. All processes must call it."""
        names, peaks = sorted(self._sums), sorted(self._peaks)
        if not names:
            return {}
        device = self._accelerator.device
        local = torch.tensor([self._sums[n] for n in names], device=device)
        sums = self._accelerator.reduce(local, reduction="sum").tolist()
        found = {name: total / count for name, (total, count) in zip(names, sums, strict=True) if count > 0}
        if peaks:
            largest = self._accelerator.gather(torch.tensor([[self._peaks[n] for n in peaks]], device=device))
            found |= dict(zip(peaks, largest.amax(0).tolist(), strict=True))
        self._sums.clear()
        self._peaks.clear()
        return found
