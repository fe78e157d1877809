"""The statistics that an objective can request from a head for each token of a micro-batch.

An objective creates a `StatisticsRequest`, and a head returns `TokenStatistics`. `tsdkd.lm_head.dense` is the readable
reference; `tsdkd.lm_head.fused` computes the same values and gradients from hidden states.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..losses import Divergence


@dataclass(frozen=True)
class StatisticsRequest:
    """The statistics of N tokens to compute; statistics that are not requested cost nothing.

    Attributes:
        entropy: whether to compute the entropy of the student's distribution.
        teacher_entropy: whether to compute the entropy of the teacher's distribution.
        divergence: divergence between the student's and the teacher's distribution, or None.
        top_k: number of the student's largest logits to return, with the teacher's logits at the same ids.
        ids: `[N, K]`, tokens whose log-probabilities under the student to compute, or None.
    """

    entropy: bool = False
    teacher_entropy: bool = False
    divergence: Divergence | None = None
    top_k: int = 0
    ids: Tensor | None = None

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher's full distribution is needed."""
        return self.teacher_entropy or self.divergence is not None


@dataclass
class TokenStatistics:
    """Statistics of N tokens, float32 (float64 if the models are). Statistics that were not requested are None.

    Attributes:
        entropy: `[N]`, nats; differentiable.
        teacher_entropy: `[N]`, nats.
        divergence: `[N]`, nats; differentiable.
        topk_ids: `[N, k]`, the student's candidates, best first.
        topk_logits: `[N, k]`, their logits; differentiable.
        topk_logps: `[N, k]`, their log-probabilities, nats; no gradient.
        teacher_topk_logits: `[N, k]`, the teacher's logits at the same ids (None without a teacher).
        logps: `[N, K]`, log-probabilities of the requested ids, nats; differentiable.
        loss_terms: sums of the per-token losses.
        loss: their weighted sum, differentiable.
    """

    entropy: Any = None
    teacher_entropy: Any = None
    divergence: Any = None
    topk_ids: Any = None
    topk_logits: Any = None
    topk_logps: Any = None
    teacher_topk_logits: Any = None
    logps: Any = None
    loss_terms: dict[str, Tensor] = field(default_factory=dict)
    loss: Any = None


@dataclass(frozen=True)
class PerTokenLoss:
    """Losses that depend only on a token's own statistics, so that a head may evaluate them chunk by chunk.

    Attributes:
        weights: weight of each term in the loss.
        loss_fn: `(statistics of n tokens, which: a slice of the N) -> {term: [n] losses}`.
    """

    weights: dict[str, float]
    loss_fn: Callable[[TokenStatistics, slice], dict[str, Tensor]]

    def sums(self, statistics: TokenStatistics, rows: slice = slice(None)) -> tuple[dict[str, Tensor], Tensor]:
        """Compute each term's sum over the tokens `rows` from their statistics, and the weighted sum of all terms."""
        terms = {name: losses.sum() for name, losses in self.loss_fn(statistics, rows).items()}
        return terms, torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()


class Head(Protocol):
    """Computes the statistics of the N completion tokens of a micro-batch."""

    def __call__(self, request: StatisticsRequest, per_token_loss: PerTokenLoss | None = None) -> TokenStatistics: ...


def validate_request(request: StatisticsRequest, count: int, has_teacher: bool) -> None:
    """Raise `ValueError` if a request can't be satisfied for `count` tokens."""
    if request.needs_teacher and not has_teacher:
        raise ValueError("teacher_entropy and divergence need a teacher, but there is none")
    if request.ids is not None and (request.ids.ndim != 2 or len(request.ids) != count):
        raise ValueError(f"ids must be [{count}, K], one row per token, found {list(request.ids.shape)}")
    if request.top_k < 0:
        raise ValueError(f"top_k must be at least 0, found {request.top_k}")
