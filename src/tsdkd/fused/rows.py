"""The softmax of some rows of logits: statistics, divergences, and the gradient of any sum of them.

Everything is reduced over the vocabulary in float32 at least, tile by tile, so that the temporaries stay in a cache
and the logits themselves are read in their own precision.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SCRATCH_TILES = 5
TILE_WIDTH = 8192


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precisions, otherwise the same."""
    return torch.promote_types(dtype, torch.float32)


def tile_elements(device: torch.device) -> int:
    """Elements of a tile: on a CPU the tiles stay in a cache, on a GPU they outweigh the launches."""
    return 2**19 if device.type == "cpu" else 2**23


class Tiles:
    """Tiles of `[C, V]`: rows, columns, and reused scratch memory of the tile's shape."""

    def __init__(self, like: Tensor) -> None:
        self.shape = like.shape
        elements = tile_elements(like.device)
        self.width = min(like.shape[1], TILE_WIDTH if like.device.type == "cpu" else elements)
        self.height = max(1, min(like.shape[0], elements // self.width))
        self.dtype = accumulation_dtype(like.dtype)
        self.memory = torch.empty(SCRATCH_TILES, self.height * self.width, dtype=self.dtype, device=like.device)

    def __iter__(self) -> Iterator[tuple[slice, slice, list[Tensor]]]:
        for rows in _slices(self.shape[0], self.height):
            for columns in _slices(self.shape[1], self.width):
                height, width = rows.stop - rows.start, columns.stop - columns.start
                yield rows, columns, list(self.memory[:, : height * width].view(SCRATCH_TILES, height, width))


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


@dataclass
class SoftmaxRows:
    """Logits `[C, V]` and, for each row, maximum, log of the sum of `exp(logit - maximum)` and entropy (nats).

    Attributes:
        logits: `[C, V]`.
        sums: `[3, C]`.
    """

    logits: Tensor
    sums: Tensor

    @classmethod
    def of(cls, logits: Tensor, tiles: Tiles) -> "SoftmaxRows":
        """Two reads of the logits."""
        maximum = logits.amax(-1).to(tiles.dtype)
        total, weighted = torch.zeros_like(maximum), torch.zeros_like(maximum)
        for rows, columns, (x, e, *_) in tiles:
            torch.exp(x.copy_(logits[rows, columns]).sub_(maximum[rows].unsqueeze(-1)), out=e)
            total[rows] += e.sum(-1)
            weighted[rows] += torch.linalg.vecdot(e, x)
        log_normalizer = total.log()
        return cls(logits, torch.stack([maximum, log_normalizer, log_normalizer - weighted / total]))

    @property
    def maximum(self) -> Tensor:
        """`[C]`."""
        return self.sums[0]

    @property
    def log_normalizer(self) -> Tensor:
        """`[C]`, relative to the maximum: with logits of 1e4 float32 has no digits left for their sum."""
        return self.sums[1]

    @property
    def entropy(self) -> Tensor:
        """`[C]`, nats."""
        return self.sums[2]

    def logps(self, rows: slice, columns: slice, out: Tensor) -> Tensor:
        """Log-probabilities of a tile, written to `out`."""
        out.copy_(self.logits[rows, columns])
        return out.sub_(self.maximum[rows].unsqueeze(-1)).sub_(self.log_normalizer[rows].unsqueeze(-1))

    def logps_at(self, ids: Tensor) -> Tensor:
        """Log-probabilities of `ids` `[C, K]`."""
        logits = self.logits.gather(-1, ids).to(self.maximum.dtype)
        return logits - self.maximum.unsqueeze(-1) - self.log_normalizer.unsqueeze(-1)


def _log_mixture(student_p: Tensor, teacher_p: Tensor, beta: float, out: Tensor) -> Tensor:
    """`log(beta P + (1 - beta) Q)`; where both underflow the result is finite, and multiplied by zero."""
    torch.mul(student_p, 1.0 - beta, out=out).add_(teacher_p, alpha=beta)
    return out.clamp_(min=torch.finfo(out.dtype).tiny).log_()


def divergences(student: SoftmaxRows, teacher: SoftmaxRows, beta: float, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Generalised JSD (TSD-KD Eq. 1; beta 0 is KL(P||Q), 1 is KL(Q||P)) and what its gradient needs.

    Returns:
        the divergence `[C]` and KL(Q || other) `[C]`, nats; other is the mixture, or P where beta is 1.
    """
    of_student, of_teacher = torch.zeros_like(student.maximum), torch.zeros_like(student.maximum)
    for rows, columns, (logq, logp, q, p, mixture) in tiles:
        torch.exp(student.logps(rows, columns, logq), out=q)
        torch.exp(teacher.logps(rows, columns, logp), out=p)
        if 0.0 < beta < 1.0:
            _log_mixture(q, p, beta, mixture)
        if beta < 1.0:
            of_teacher[rows] += torch.linalg.vecdot(p, logp.sub_(logq if beta == 0.0 else mixture))
        if beta > 0.0:
            of_student[rows] += torch.linalg.vecdot(q, logq.sub_(logp if beta == 1.0 else mixture))
    if beta in (0.0, 1.0):
        return (of_student if beta else of_teacher), of_student
    return beta * of_teacher + (1.0 - beta) * of_student, of_student


@dataclass
class Upstream:
    """Derivatives of a loss with respect to the statistics of C tokens, None where zero: `[C]`, `logps` `[C, K]`."""

    entropy: Tensor | None = None
    jsd: Tensor | None = None
    logps: Tensor | None = None

    def times(self, factor: float | Tensor) -> "Upstream":
        """All of them, multiplied."""
        return Upstream(**{name: None if x is None else x * factor for name, x in vars(self).items()})

    def largest(self) -> Tensor:
        """The largest magnitude among them, or 1 where all are zero."""
        found = [x.abs().amax() for x in vars(self).values() if x is not None and x.numel()]
        largest = torch.stack(found).amax() if found else torch.zeros(())
        return torch.where(largest > 0, largest, torch.ones_like(largest))


def logits_gradient_(
    student: SoftmaxRows,
    teacher: SoftmaxRows | None,
    beta: float,
    student_kl: Tensor,
    ids: Tensor | None,
    upstream: Upstream,
    slope: Callable[[Tensor], Tensor] | None,
    tiles: Tiles,
) -> Tensor:
    """Overwrite the student's logits by the loss's gradient with respect to them.

    With q the student's probabilities: `dH/dz = -q (log q + H)`; `dJSD/dz = (1 - beta) q (log q - log m - KL(Q||M))`;
    `dKL(Q||P)/dz = q (log q - log p - KL(Q||P))`; `dKL(P||Q)/dz = q - p`; `d log q_i/dz = [v = i] - q`.

    Args:
        student, teacher: rows; the teacher's only where `upstream.jsd` is set.
        beta, student_kl: of `divergences`.
        ids: `[C, K]`, where `upstream.logps` belong.
        upstream: derivatives with respect to the statistics.
        slope: logits -> derivative of a cap on them, or None.
        tiles: columns and scratch.
    """
    at_ids = _gradient_at_ids(student, ids, upstream.logps, slope)
    entropy, jsd = upstream.entropy, upstream.jsd
    constant = torch.zeros_like(student.maximum)  # terms of dz / q that are the same for all v
    if upstream.logps is not None:
        constant -= upstream.logps.sum(-1)
    if entropy is not None:
        constant -= entropy * student.entropy
    if jsd is not None:
        jsd = jsd * (1.0 if beta in (0.0, 1.0) else 1.0 - beta)
        if beta == 0.0:
            constant += jsd

    for rows, columns, (logq, logp, q, p, gradient) in tiles:
        torch.exp(student.logps(rows, columns, logq), out=q)
        if jsd is not None and teacher is not None:
            teacher.logps(rows, columns, logp)
            if beta != 1.0:
                torch.exp(logp, out=p)
        gradient.copy_(constant[rows].unsqueeze(-1).expand_as(gradient))
        if entropy is not None:
            gradient.addcmul_(logq, entropy[rows].unsqueeze(-1), value=-1.0)
        if jsd is not None and beta != 0.0:
            if beta != 1.0:
                _log_mixture(q, p, beta, logp)
            # the KL comes off before the factor: where one token has all the mass the two must cancel exactly
            gradient.addcmul_(logq.sub_(logp).sub_(student_kl[rows].unsqueeze(-1)), jsd[rows].unsqueeze(-1))
        gradient.mul_(q)
        if jsd is not None and beta == 0.0:
            gradient.addcmul_(p, jsd[rows].unsqueeze(-1), value=-1.0)
        if slope is not None:
            gradient.mul_(slope(logp.copy_(student.logits[rows, columns])))
        if at_ids is not None and ids is not None:
            inside = (ids[rows] >= columns.start) & (ids[rows] < columns.stop)
            gradient.scatter_add_(-1, (ids[rows] - columns.start).where(inside, 0), at_ids[rows].where(inside, 0))
        student.logits[rows, columns] = gradient
    return student.logits


def _gradient_at_ids(
    student: SoftmaxRows, ids: Tensor | None, upstream: Tensor | None, slope: Callable[[Tensor], Tensor] | None
) -> Tensor | None:
    """What reaches the logits at the ids directly, `[C, K]`."""
    if upstream is None or ids is None or slope is None:
        return upstream
    return upstream * slope(student.logits.gather(-1, ids).to(upstream.dtype))
