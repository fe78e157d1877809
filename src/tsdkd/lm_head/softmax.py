"""The softmax of some rows of logits: statistics, divergences, and the gradient of any sum of them.

Everything is reduced over the vocabulary in float32 at least, tile by tile, so that the temporaries stay in a cache
and the logits themselves are read in their own precision.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..losses import Divergence

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
        row_statistics: `[3, C]`.
    """

    logits: Tensor
    row_statistics: Tensor

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
        return self.row_statistics[0]

    @property
    def log_normalizer(self) -> Tensor:
        """`[C]`, relative to the maximum: with logits of 1e4 float32 has no digits left for their sum."""
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
    """`share P + (1 - share) Q`, not zero where both underflow: what is divided by it is zero there."""
    torch.mul(student_p, 1.0 - share, out=out).add_(teacher_p, alpha=share)
    return out.clamp_(min=torch.finfo(out.dtype).tiny)


def _ratio_weight(divergence: Divergence) -> float:
    """The factor of `p / m` in a divergence's derivative by q, where `p / m` isn't the same for all v; a JSD has
    none."""
    if divergence.mixture in (0.0, 1.0):
        return 0.0
    weight = divergence.mixture * divergence.student - (1.0 - divergence.mixture) * divergence.teacher
    return weight if abs(weight) > 1e-12 else 0.0


def compute_divergence(
    student: SoftmaxRows, teacher: SoftmaxRows, divergence: Divergence, tiles: Tiles
) -> tuple[Tensor, Tensor, Tensor]:
    """A divergence, and what its gradient needs.

    Returns:
        the divergence `[C]`, KL(Q||M) `[C]`, nats, and sum q p / m `[C]`; the latter two where they are needed.
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
    """Derivatives of a loss with respect to the statistics of C tokens, None where zero: `[C]`, `logps` `[C, K]`."""

    entropy: Tensor | None = None
    divergence: Tensor | None = None
    logps: Tensor | None = None

    def times(self, factor: float | Tensor) -> "GradOutputs":
        """All of them, multiplied."""
        return GradOutputs(**{name: None if x is None else x * factor for name, x in vars(self).items()})

    def abs_max(self) -> Tensor:
        """The largest magnitude among them, or 1 where all are zero."""
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
    """Overwrite the student's logits by the loss's gradient with respect to them.

    With q the student's probabilities, p the teacher's and m of the mixture with the share s of p:
    `dH/dz = -q (log q + H)`; `d log q_i/dz = [v = i] - q`; `dKL(P||Q)/dz = q - p`; and of a divergence with weights a
    (teacher) and b (student) `b q (log q - log m - KL(Q||M)) + (s b - (1 - s) a) q (p / m - sum q p / m)`.

    Args:
        student, teacher: softmax rows; the teacher's are needed only if `grad_outputs.divergence` is set.
        divergence, student_kl, ratio: of `compute_divergence`.
        ids: `[C, K]`, the ids that `grad_outputs.logps` refers to.
        grad_outputs: derivatives with respect to the statistics.
        softcap_grad: logits -> derivative of a cap on them, or None.
        tiles: columns and scratch.
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
            # the KL comes off before the factor: where one token has all the mass the two must cancel exactly
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
    """The part of the gradient that reaches the logits at `ids` directly, `[C, K]`."""
    if grad_outputs is None or ids is None or softcap_grad is None:
        return grad_outputs
    return grad_outputs * softcap_grad(student.logits.gather(-1, ids).to(grad_outputs.dtype))
