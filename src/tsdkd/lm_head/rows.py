"""Logits of a chunk of tokens with their softmax statistics: what the torch and the Triton backend have in common."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from ..losses import Divergence
from .projection import Projection


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for half precision, otherwise `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def ratio_weight(divergence: Divergence) -> float:
    """Factor of `p / m` in the derivative of a divergence with respect to q, if `p / m` varies over v; 0 for a JSD."""
    if divergence.mixture in (0.0, 1.0):
        return 0.0
    weight = divergence.mixture * divergence.student - (1.0 - divergence.mixture) * divergence.teacher
    return weight if abs(weight) > 1e-12 else 0.0


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


class SoftmaxRows(ABC):
    """Logits `[C, V]` of one model for the C tokens of a chunk, and what is computed from them.

    "The logits" of the methods below are those of the model's forward pass: scaled, soft-capped, and divided by the
    temperature. A backend may store them differently.

    Args:
        projection: the model's head in the precision of the pass.
        hidden: `[C, H]`, in the same precision.
        temperature: divides the logits.
        row_statistics: `[3, C]` if `compute_statistics` found them in an earlier pass.
        student: the student's rows of the same chunk if these are the teacher's, to share scratch memory with.

    Attributes:
        logits: `[C, V]`, as the backend stores them.
        row_statistics: `[3, C]`: each row's maximum, log of the sum of `exp(logit - maximum)`, and entropy (nats).
        dtype: precision of the statistics.
    """

    row_statistics: Tensor

    def __init__(
        self,
        projection: Projection,
        hidden: Tensor,
        temperature: float,
        row_statistics: Tensor | None = None,
        student: Optional["SoftmaxRows"] = None,
    ) -> None:
        self.projection, self.temperature, self.student = projection, temperature, student
        self.dtype = accumulation_dtype(hidden.dtype)
        self.logits = self.project(hidden)
        if row_statistics is not None:
            self.row_statistics = row_statistics

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

    def logps_at(self, ids: Tensor) -> Tensor:
        """Log-probabilities of `ids` `[C, K]`."""
        return self.logits_at(ids) - self.maximum.unsqueeze(-1) - self.log_normalizer.unsqueeze(-1)

    @abstractmethod
    def project(self, hidden: Tensor) -> Tensor:
        """Compute `logits` from the hidden states `[C, H]`."""

    @abstractmethod
    def compute_statistics(self, top_k: int = 0) -> None:
        """Compute `row_statistics`, and whatever `topk(top_k)` needs."""

    @abstractmethod
    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """Return the `k` largest logits and their ids, both `[C, k]`, largest first."""

    @abstractmethod
    def logits_at(self, ids: Tensor) -> Tensor:
        """Return the logits of `ids`, both `[C, K]`."""

    @abstractmethod
    def compute_divergence(self, teacher: "SoftmaxRows", divergence: Divergence) -> tuple[Tensor, Tensor, Tensor]:
        """Compute a divergence and the sums that its gradient needs.

        Returns:
            The divergence `[C]`, KL(Q||M) `[C]`, nats, and sum q p / m `[C]`; the last two only if needed.
        """

    @abstractmethod
    def logits_grad_(
        self,
        teacher: Optional["SoftmaxRows"],
        divergence: Divergence | None,
        student_kl: Tensor,
        ratio: Tensor,
        ids: Tensor | None,
        grad_outputs: GradOutputs,
    ) -> Tensor:
        """Overwrite the logits with the gradient of the loss with respect to the scaled logits before the soft cap.

        Let q, p and m be the probabilities of the student, the teacher and their mixture with weight s of p. Then
        `dH/dz = -q (log q + H)`, `d log q_i/dz = [v = i] - q` and `dKL(P||Q)/dz = q - p`. For a divergence with
        weights a (teacher) and b (student), it is
        `b q (log q - log m - KL(Q||M)) + (s b - (1 - s) a) q (p / m - sum q p / m)`. All are multiplied by the
        derivative of the soft cap.

        Args:
            teacher: needed only if `grad_outputs.divergence` is set.
            divergence, student_kl, ratio: results of `compute_divergence`.
            ids: `[C, K]`, the ids of `grad_outputs.logps`.
            grad_outputs: derivatives with respect to the statistics, already multiplied by the scale of the logits.
        """
