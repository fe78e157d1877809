"""The statistics that an objective can request of a head for each token of a micro-batch.

An objective makes a `StatisticsRequest`, a head returns `TokenStatistics`. `tsdkd.lm_head.dense` is the readable
specification; `tsdkd.lm_head.fused` gives the same numbers and gradients from hidden states.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..losses import Divergence


@dataclass(frozen=True)
class StatisticsRequest:
    """Which statistics of N tokens to compute; statistics that aren't requested cost nothing.

    Attributes:
        entropy: of the student's distribution.
        teacher_entropy: of the teacher's.
        divergence: between the student's distribution and the teacher's.
        top_k: how many of the student's largest logits, with the teacher's logits at the same ids.
        ids: `[N, K]`, tokens whose log-probabilities under the student to compute.
    """

    entropy: bool = False
    teacher_entropy: bool = False
    divergence: Divergence | None = None
    top_k: int = 0
    ids: Tensor | None = None

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher's whole distribution is needed."""
        return self.teacher_entropy or self.divergence is not None


@dataclass
class TokenStatistics:
    """Statistics of N tokens, float32 (float64 where the models are). What wasn't requested is None.

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
    """Losses of a token that depend on its own statistics only, so that a head may evaluate them chunk by chunk.

    Attributes:
        weights: each term's factor in the loss.
        loss_fn: `(statistics of n tokens, which: a slice of the N) -> {term: [n] losses}`.
    """

    weights: dict[str, float]
    loss_fn: Callable[[TokenStatistics, slice], dict[str, Tensor]]

    def sums(self, statistics: TokenStatistics, rows: slice = slice(None)) -> tuple[dict[str, Tensor], Tensor]:
        """The terms' sums over the tokens `rows`, whose statistics are given, and their weighted sum."""
        terms = {name: losses.sum() for name, losses in self.loss_fn(statistics, rows).items()}
        return terms, torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()


class Head(Protocol):
    """Computes the statistics of the N completion tokens of a micro-batch."""

    def __call__(self, request: StatisticsRequest, per_token_loss: PerTokenLoss | None = None) -> TokenStatistics: ...


def validate_request(request: StatisticsRequest, count: int, has_teacher: bool) -> None:
    """Raise `ValueError` if a request can't be met for `count` tokens."""
    if request.needs_teacher and not has_teacher:
        raise ValueError("the request needs the teacher's distribution (teacher_entropy or divergence), there is none")
    if request.ids is not None and (request.ids.ndim != 2 or len(request.ids) != count):
        raise ValueError(f"ids must be [{count}, K], a row a token, found {list(request.ids.shape)}")
    if request.top_k < 0:
        raise ValueError(f"top_k must be at least 0, found {request.top_k}")
