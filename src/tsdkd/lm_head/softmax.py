"""The torch backend: softmax statistics, divergences and their gradients by tiles of eager operations.

All reductions over the vocabulary use at least float32. They run tile by tile, so that temporaries stay in the cache
and the logits are read in their own precision.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..losses import Divergence
from .rows import GradOutputs, SoftmaxRows, accumulation_dtype, ratio_weight

SCRATCH_TILES = 5
TILE_WIDTH = 8192


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


def _mixture(student_p: Tensor, teacher_p: Tensor, share: float, out: Tensor) -> Tensor:
    """Compute `share P + (1 - share) Q`, kept above zero if both underflow, so that it can be a divisor."""
    torch.mul(student_p, 1.0 - share, out=out).add_(teacher_p, alpha=share)
    return out.clamp_(min=torch.finfo(out.dtype).tiny)


class TorchRows(SoftmaxRows):
    """Rows of logits that are read by tiles."""

    def project(self, hidden: Tensor) -> Tensor:
        logits = self.projection.logits(hidden, self.temperature)
        self.tiles: Tiles = self.student.tiles if isinstance(self.student, TorchRows) else Tiles(logits)
        return logits

    def compute_statistics(self, top_k: int = 0) -> None:
        """Compute the row statistics in two passes over the logits."""
        maximum = self.logits.amax(-1).to(self.dtype)
        total, weighted = torch.zeros_like(maximum), torch.zeros_like(maximum)
        for rows, columns, (x, e, *_) in self.tiles:
            torch.exp(x.copy_(self.logits[rows, columns]).sub_(maximum[rows].unsqueeze(-1)), out=e)
            total[rows] += e.sum(-1)
            weighted[rows] += torch.linalg.vecdot(e, x)
        log_normalizer = total.log()
        self.row_statistics = torch.stack([maximum, log_normalizer, log_normalizer - weighted / total])

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        logits, ids = self.logits.topk(k, dim=-1)
        return logits.to(self.dtype), ids

    def logits_at(self, ids: Tensor) -> Tensor:
        return self.logits.gather(-1, ids).to(self.dtype)

    def logps(self, rows: slice, columns: slice, out: Tensor) -> Tensor:
        """Log-probabilities of a tile, written to `out`."""
        out.copy_(self.logits[rows, columns])
        return out.sub_(self.maximum[rows].unsqueeze(-1)).sub_(self.log_normalizer[rows].unsqueeze(-1))

    def compute_divergence(self, teacher: Any, divergence: Divergence) -> tuple[Tensor, Tensor, Tensor]:
        of_student, of_teacher, ratio = (torch.zeros_like(self.maximum) for _ in range(3))
        for rows, columns, (logq, logp, q, p, mixture) in self.tiles:
            torch.exp(self.logps(rows, columns, logq), out=q)
            torch.exp(teacher.logps(rows, columns, logp), out=p)
            log_mixture = {0.0: logq, 1.0: logp}.get(divergence.mixture)
            if log_mixture is None:
                _mixture(q, p, divergence.mixture, mixture)
                if ratio_weight(divergence):
                    ratio[rows] += (q * p).div_(mixture).sum(-1)
                log_mixture = mixture.log_()
            if divergence.teacher and divergence.mixture < 1.0:
                of_teacher[rows] += torch.linalg.vecdot(p, logp.sub_(log_mixture))
            if divergence.student and divergence.mixture > 0.0:
                of_student[rows] += torch.linalg.vecdot(q, logq.sub_(log_mixture))
        return divergence.teacher * of_teacher + divergence.student * of_student, of_student, ratio

    def logits_grad_(
        self,
        teacher: Any,
        divergence: Divergence | None,
        student_kl: Tensor,
        ratio: Tensor,
        ids: Tensor | None,
        grad_outputs: GradOutputs,
    ) -> Tensor:
        at_ids = self._grad_at_ids(ids, grad_outputs.logps)
        entropy, divergence_grad = grad_outputs.entropy, grad_outputs.divergence
        forward = divergence is not None and divergence.mixture == 0.0
        share = 0.0 if divergence is None else ratio_weight(divergence)
        constant = torch.zeros_like(self.maximum)  # terms of dz / q that are the same for all v
        if grad_outputs.logps is not None:
            constant -= grad_outputs.logps.sum(-1)
        if entropy is not None:
            constant -= entropy * self.entropy
        if divergence_grad is not None and divergence is not None:
            of_ratio = divergence_grad * share
            divergence_grad = divergence_grad * (divergence.teacher if forward else divergence.student)
            if forward:
                constant += divergence_grad

        for rows, columns, (logq, logp, q, p, gradient) in self.tiles:
            torch.exp(self.logps(rows, columns, logq), out=q)
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
                    if share:
                        gradient.addcmul_(p.div_(logp).sub_(ratio[rows].unsqueeze(-1)), of_ratio[rows].unsqueeze(-1))
                    logp.log_()
                # subtract the KL before multiplying: if one token has all the mass, the two must cancel exactly
                gradient.addcmul_(
                    logq.sub_(logp).sub_(student_kl[rows].unsqueeze(-1)), divergence_grad[rows].unsqueeze(-1)
                )
            gradient.mul_(q)
            if divergence_grad is not None and forward:
                gradient.addcmul_(p, divergence_grad[rows].unsqueeze(-1), value=-1.0)
            if self.projection.softcap is not None:
                gradient.mul_(self._softcap_grad(logp.copy_(self.logits[rows, columns])))
            if at_ids is not None and ids is not None:
                inside = (ids[rows] >= columns.start) & (ids[rows] < columns.stop)
                gradient.scatter_add_(-1, (ids[rows] - columns.start).where(inside, 0), at_ids[rows].where(inside, 0))
            self.logits[rows, columns] = gradient
        return self.logits

    def _softcap_grad(self, logits: Tensor) -> Tensor:
        return self.projection.softcap_grad(logits, self.temperature)

    def _grad_at_ids(self, ids: Tensor | None, grad_outputs: Tensor | None) -> Tensor | None:
        """Part of the gradient that directly affects only the logits at `ids`, `[C, K]`."""
        if grad_outputs is None or ids is None or self.projection.softcap is None:
            return grad_outputs
        return grad_outputs * self._softcap_grad(self.logits_at(ids))
