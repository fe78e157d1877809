"""What an objective can ask about each token of a micro-batch, and the answers from whole logits.

An objective states a `Request`; a head answers it with `TokenStatistics`. `LogitsHead` is the readable specification;
`tsdkd.fused.FusedHead` gives the same numbers and gradients from hidden states.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .losses import Divergence, token_entropy, upcast


@dataclass(frozen=True)
class Request:
    """The statistics that are wanted of N tokens; what isn't asked for costs nothing.

    Attributes:
        entropy: of the student's distribution.
        teacher_entropy: of the teacher's.
        divergence: between the student's distribution and the teacher's.
        top_k: how many of the student's largest logits, with the teacher's logits at the same ids.
        ids: `[N, K]`, tokens whose log-probabilities under the student are wanted.
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
    """The answers, float32 (float64 where the models are). What wasn't asked for is None.

    Attributes:
        entropy: `[N]`, nats; differentiable.
        teacher_entropy: `[N]`, nats.
        divergence: `[N]`, nats; differentiable.
        top_ids: `[N, k]`, the student's candidates, best first.
        top_logits: `[N, k]`, their logits; differentiable.
        top_logps: `[N, k]`, their log-probabilities, nats; no gradient.
        teacher_top_logits: `[N, k]`, the teacher's logits at the same ids (None without a teacher).
        logps: `[N, K]`, log-probabilities of the requested ids, nats; differentiable.
        own_terms: sums of the own-token losses.
        own_loss: their weighted sum, differentiable.
    """

    entropy: Any = None
    teacher_entropy: Any = None
    divergence: Any = None
    top_ids: Any = None
    top_logits: Any = None
    top_logps: Any = None
    teacher_top_logits: Any = None
    logps: Any = None
    own_terms: dict[str, Tensor] = field(default_factory=dict)
    own_loss: Any = None


@dataclass(frozen=True)
class OwnTokenLoss:
    """Losses of a token that depend on its own statistics only, so that a head may evaluate them chunk by chunk.

    Attributes:
        weights: each term's factor in the loss.
        losses: `(statistics of some tokens, which: a slice of the N) -> {term: [n] losses}`.
    """

    weights: dict[str, float]
    losses: Callable[[TokenStatistics, slice], dict[str, Tensor]]

    def sums(self, statistics: TokenStatistics, rows: slice = slice(None)) -> tuple[dict[str, Tensor], Tensor]:
        """The terms' sums over the tokens `rows`, whose statistics are given, and their weighted sum."""
        terms = {name: losses.sum() for name, losses in self.losses(statistics, rows).items()}
        return terms, torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()


class Head(Protocol):
    """Answers an objective's request about the N completion tokens of a micro-batch."""

    def __call__(self, request: Request, own: OwnTokenLoss | None = None) -> TokenStatistics: ...


@dataclass(frozen=True)
class LogitsHead:
    """Answers from whole logits, by autograd.

    Attributes:
        student_logits: `[N, V]`, temperature applied.
        teacher_logits: `[N, V]`, or None where only the student is asked about.
    """

    student_logits: Tensor
    teacher_logits: Tensor | None = None

    def __call__(self, request: Request, own: OwnTokenLoss | None = None) -> TokenStatistics:
        """Raises `ValueError` for a request that can't be answered, as where it needs a teacher and there is none."""
        check_request(request, len(self.student_logits), self.teacher_logits is not None)
        student = upcast(self.student_logits)
        teacher: Any = None if self.teacher_logits is None else self.teacher_logits.detach()
        answer = TokenStatistics()
        if request.entropy:
            answer.entropy = token_entropy(student)
        if request.teacher_entropy:
            answer.teacher_entropy = token_entropy(teacher)
        if request.divergence is not None:
            answer.divergence = request.divergence(student, teacher)
        if request.top_k:
            answer.top_logits, answer.top_ids = student.topk(min(request.top_k, student.shape[-1]), dim=-1)
            answer.top_logps = student.detach().log_softmax(-1).gather(-1, answer.top_ids)
            if teacher is not None:
                answer.teacher_top_logits = upcast(teacher.gather(-1, answer.top_ids))
        if request.ids is not None:
            answer.logps = student.log_softmax(-1).gather(-1, request.ids)
        if own is not None:
            answer.own_terms, answer.own_loss = own.sums(answer)
        return answer


def check_request(request: Request, count: int, has_teacher: bool) -> None:
    """Raises `ValueError` for a request that can't be answered of `count` tokens."""
    if request.needs_teacher and not has_teacher:
        raise ValueError("the request needs the teacher's distribution (teacher_entropy or divergence), there is none")
    if request.ids is not None and (request.ids.ndim != 2 or len(request.ids) != count):
        raise ValueError(f"ids must be [{count}, K], a row a token, found {list(request.ids.shape)}")
    if request.top_k < 0:
        raise ValueError(f"top_k must be at least 0, found {request.top_k}")
