"""Softmax statistics and divergences of rows of logits, and the gradient of any weighted sum of them.

All reductions over the vocabulary use at least float32. They run tile by tile, so that temporaries stay in the cache
and the logits are read in their own precision.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..losses import Divergence

SCRATCH_TILES = 5
TILE_WIDTH = 8192


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for half precision, otherwise `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def tile_elements(device: torch.device) -> int:
    """Return the number of elements per tile: small enough for the CPU cache, large enough for few kernel launches."""
    return 2**19 if device.type == "cpu" else 2**23


class Tiles:
    """Iterates over tiles of `[C, V]`: yields rows, columns and reused scratch memory of the tile's shape."""

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
    """Logits `[C, V]` with each row's maximum, log of the sum of `exp(logit - maximum)` and entropy (nats).

    Attributes:
        logits: `[C, V]`.
        row_statistics: `[3, C]`.
    """

    logits: Tensor
    row_statistics: Tensor

    @classmethod
    def of(cls, logits: Tensor, tiles: Tiles) -> "SoftmaxRows":
        """Compute the row statistics in two passes over the logits."""
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
        return self.row_statistics[0]

    @property
    def log_normalizer(self) -> Tensor:
        """`[C]`, relative to the maximum: for logits around 1e4, float32 would lose all precision in the sum."""
        return self.row_statistics[1]

    @property
    def entropy(self) -> Tensor:
        """`[C]`, nats."""
        return self.row_statistics[2]

    def logps(self, rows: slice, columns: slice, out: Tensor) -> Tensor:
        """Log-probabilities of a tile, written to `out`."""
        out.copy_(self.logits[rows, columns])
        return out.sub_(self.maximum[rows].unsqueeze(-1)).sub_(self.log_normalizer[rows].unsqueeze(-1))

    def logps_at(self, ids: Tensor) -> Tensor:
        """Log-probabilities of `ids` `[C, K]`."""
        logits = self.logits.gather(-1, ids).to(self.maximum.dtype)
        return logits - self.maximum.unsqueeze(-1) - self.log_normalizer.unsqueeze(-1)


def _mixture(student_p: Tensor, teacher_p: Tensor, share: float, out: Tensor) -> Tensor:
    """Compute `share P + (1 - share) Q`, kept above zero if both underflow, so that it can be a divisor."""
    torch.mul(student_p, 1.0 - share, out=out).add_(teacher_p, alpha=share)
    return out.clamp_(min=torch.finfo(out.dtype).tiny)


def _ratio_weight(divergence: Divergence) -> float:
    """Factor of `p / m` in the derivative of a divergence with respect to q, if `p / m` varies over v; 0 for a JSD."""
    if divergence.mixture in (0.0, 1.0):
        return 0.0
    weight = divergence.mixture * divergence.student - (1.0 - divergence.mixture) * divergence.teacher
    return weight if abs(weight) > 1e-12 else 0.0


def compute_divergence(
    student: SoftmaxRows, teacher: SoftmaxRows, divergence: Divergence, tiles: Tiles
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a divergence and the sums that its gradient needs.

    Returns:
        The divergence `[C]`, KL(Q||M) `[C]`, nats, and sum q p / m `[C]`; the last two only if needed.
    """
    of_student, of_teacher, ratio = (torch.zeros_like(student.maximum) for _ in range(3))
    for rows, columns, (logq, logp, q, p, mixture) in tiles:
        torch.exp(student.logps(rows, columns, logq), out=q)
        torch.exp(teacher.logps(rows, columns, logp), out=p)
        log_mixture = {0.0: logq, 1.0: logp}.get(divergence.mixture)
        if log_mixture is None:
            _mixture(q, p, divergence.mixture, mixture)
            if _ratio_weight(divergence):
                ratio[rows] += (q * p).div_(mixture).sum(-1)
            log_mixture = mixture.log_()
        if divergence.teacher and divergence.mixture < 1.0:
            of_teacher[rows] += torch.linalg.vecdot(p, logp.sub_(log_mixture))
        if divergence.student and divergence.mixture > 0.0:
            of_student[rows] += torch.linalg.vecdot(q, logq.sub_(log_mixture))
    return divergence.teacher * of_teacher + divergence.student * of_student, of_student, ratio


@dataclass
class GradOutputs:
    """Derivatives of a loss with respect to the statistics of C tokens: `[C]`, `logps` `[C, K]`; None if zero."""

    entropy: Tensor | None = None
    divergence: Tensor | None = None
    logps: Tensor | None = None

    def times(self, factor: float | Tensor) -> "GradOutputs":
        """Return all derivatives multiplied by `factor`."""
        return GradOutputs(**{name: None if x is None else x * factor for name, x in vars(self).items()})

    def abs_max(self) -> Tensor:
        """Return the largest absolute value, or 1 if all are zero."""
        found = [x.abs().amax() for x in vars(self).values() if x is not None and x.numel()]
        abs_max = torch.stack(found).amax() if found else torch.zeros(())
        return torch.where(abs_max > 0, abs_max, torch.ones_like(abs_max))


def logits_grad_(
    student: SoftmaxRows,
    teacher: SoftmaxRows | None,
    divergence: Divergence | None,
    student_kl: Tensor,
    ratio: Tensor,
    ids: Tensor | None,
    grad_outputs: GradOutputs,
    softcap_grad: Callable[[Tensor], Tensor] | None,
    tiles: Tiles,
) -> Tensor:
    """Overwrite the student's logits with the gradient of the loss with respect to them.

    Let q, p and m be the probabilities of the student, the teacher and their mixture with weight s of p. Then
    `dH/dz = -q (log q + H)`, `d log q_i/dz = [v = i] - q` and `dKL(P||Q)/dz = q - p`. For a divergence with weights a
    (teacher) and b (student), it is `b q (log q - log m - KL(Q||M)) + (s b - (1 - s) a) q (p / m - sum q p / m)`.

    Args:
        student, teacher: softmax rows; the teacher's are needed only if `grad_outputs.divergence` is set.
        divergence, student_kl, ratio: results of `compute_divergence`.
        ids: `[C, K]`, the ids of `grad_outputs.logps`.
        grad_outputs: derivatives with respect to the statistics.
        softcap_grad: function from logits to the derivative of their soft cap, or None.
        tiles: tiles of the logits, with scratch memory.
    """
    at_ids = _grad_at_ids(student, ids, grad_outputs.logps, softcap_grad)
    entropy, divergence_grad = grad_outputs.entropy, grad_outputs.divergence
    forward = divergence is not None and divergence.mixture == 0.0
    ratio_weight = 0.0 if divergence is None else _ratio_weight(divergence)
    constant = torch.zeros_like(student.maximum)  # terms of dz / q that are the same for all v
    if grad_outputs.logps is not None:
        constant -= grad_outputs.logps.sum(-1)
    if entropy is not None:
        constant -= entropy * student.entropy
    if divergence_grad is not None and divergence is not None:
        of_ratio = divergence_grad * ratio_weight
        divergence_grad = divergence_grad * (divergence.teacher if forward else divergence.student)
        if forward:
            constant += divergence_grad

    for rows, columns, (logq, logp, q, p, gradient) in tiles:
        torch.exp(student.logps(rows, columns, logq), out=q)
        if divergence_grad is not None and teacher is not None and divergence is not None:
            teacher.logps(rows, columns, logp)
            if divergence.mixture != 1.0:
                torch.exp(logp, out=p)
        gradient.copy_(constant[rows].unsqueeze(-1).expand_as(gradient))
        if entropy is not None:
            gradient.addcmul_(logq, entropy[rows].unsqueeze(-1), value=-1.0)
        if divergence_grad is not None and divergence is not None and not forward:
            if divergence.mixture != 1.0:
                _mixture(q, p, divergence.mixture, logp)
                if ratio_weight:
                    gradient.addcmul_(p.div_(logp).sub_(ratio[rows].unsqueeze(-1)), of_ratio[rows].unsqueeze(-1))
                logp.log_()
            # subtract the KL before multiplying: if one token has all the mass, the two must cancel exactly
            gradient.addcmul_(
                logq.sub_(logp).sub_(student_kl[rows].unsqueeze(-1)), divergence_grad[rows].unsqueeze(-1)
            )
        gradient.mul_(q)
        if divergence_grad is not None and forward:
            gradient.addcmul_(p, divergence_grad[rows].unsqueeze(-1), value=-1.0)
        if softcap_grad is not None:
            gradient.mul_(softcap_grad(logp.copy_(student.logits[rows, columns])))
        if at_ids is not None and ids is not None:
            inside = (ids[rows] >= columns.start) & (ids[rows] < columns.stop)
            gradient.scatter_add_(-1, (ids[rows] - columns.start).where(inside, 0), at_ids[rows].where(inside, 0))
        student.logits[rows, columns] = gradient
    return student.logits


def _grad_at_ids(
    student: SoftmaxRows,
    ids: Tensor | None,
    grad_outputs: Tensor | None,
    softcap_grad: Callable[[Tensor], Tensor] | None,
) -> Tensor | None:
    """Part of the gradient that directly affects only the logits at `ids`, `[C, K]`."""
    if grad_outputs is None or ids is None or softcap_grad is None:
        return grad_outputs
    return grad_outputs * softcap_grad(student.logits.gather(-1, ids).to(grad_outputs.dtype))
