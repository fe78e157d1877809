"""The papers' losses as pure functions of logits, one value per token, without reduction over tokens.

Shapes: ``[..., V]`` logits in, ``[...]`` nats out. Half-precision inputs are computed in float32; float64 stays
float64. The teacher never receives a gradient. This is the readable specification that all faster code must match.

TSD-KD is "Token-Selective Dual Knowledge Distillation" (ICLR 2026), EOPD is arXiv 2603.07079.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """Convert half precision to float32; leave other dtypes unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _check_same_vocabulary(student_logits: Tensor, teacher_logits: Tensor) -> None:
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits and teacher_logits must have the same shape, found {tuple(student_logits.shape)} and "
            f"{tuple(teacher_logits.shape)}; slice both to the ids shared by the two models"
        )


def token_entropy(logits: Tensor) -> Tensor:
    """Entropy of the next-token distribution (TSD-KD Eq. 10), differentiable.

    Args:
        logits: `[..., V]`.

    Returns:
        `[...]`, nats.
    """
    logps = upcast(logits).log_softmax(-1)
    return -(logps.exp() * logps).sum(-1)


def _kl(logps: Tensor, other_logps: Tensor) -> Tensor:
    return (logps.exp() * (logps - other_logps)).sum(-1)


@dataclass(frozen=True)
class Divergence:
    """`teacher KL(P||M) + student KL(Q||M)` with `M = mixture P + (1 - mixture) Q`.

    `P` is the teacher's distribution and `Q` the student's. The common cases are `jsd`, `FORWARD_KL`, `REVERSE_KL`,
    `skew_forward_kl` and `skew_reverse_kl`.

    Attributes:
        mixture: weight of `P` in `M`, in [0, 1].
        teacher: weight of `KL(P||M)`.
        student: weight of `KL(Q||M)`.

    Raises:
        ValueError: `mixture` is outside [0, 1].
    """

    mixture: float
    teacher: float = 0.0
    student: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.mixture <= 1.0:
            raise ValueError(f"mixture must be in [0, 1], found {self.mixture}")

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Compute the divergence at each position.

        Args:
            student_logits: `[..., V]`, receives the gradient.
            teacher_logits: `[..., V]`.

        Returns:
            `[...]`, nats.

        Raises:
            ValueError: the shapes differ.
        """
        _check_same_vocabulary(student_logits, teacher_logits)
        student = upcast(student_logits).log_softmax(-1)
        teacher = upcast(teacher_logits.detach()).log_softmax(-1)
        if self.mixture == 0.0:
            return self.teacher * _kl(teacher, student)
        if self.mixture == 1.0:
            return self.student * _kl(student, teacher)
        mixture = torch.logaddexp(teacher + math.log(self.mixture), student + math.log1p(-self.mixture))
        return self.teacher * _kl(teacher, mixture) + self.student * _kl(student, mixture)


FORWARD_KL = Divergence(0.0, teacher=1.0)
"""`KL(P||Q)`."""
REVERSE_KL = Divergence(1.0, student=1.0)
"""`KL(Q||P)`."""


def jsd(beta: float) -> Divergence:
    """Generalized Jensen-Shannon divergence, `beta KL(P||M) + (1 - beta) KL(Q||M)` (TSD-KD Eq. 1).

    `M` is `beta P + (1 - beta) Q`. As in TRL, `beta=0` is `KL(P||Q)` and `beta=1` is `KL(Q||P)`: these are the limits
    of the gradient, not of the value. Raises `ValueError` if `beta` is outside [0, 1].
    """
    return {0.0: FORWARD_KL, 1.0: REVERSE_KL}.get(beta) or Divergence(beta, teacher=beta, student=1.0 - beta)


def skew_forward_kl(skew: float) -> Divergence:
    """`KL(P || skew P + (1 - skew) Q)` (DistiLLM, Eq. 3)."""
    return Divergence(skew, teacher=1.0)


def skew_reverse_kl(skew: float) -> Divergence:
    """`KL(Q || (1 - skew) P + skew Q)` (DistiLLM, Sec. 3.1)."""
    return Divergence(1.0 - skew, student=1.0)


def generalized_jsd(student_logits: Tensor, teacher_logits: Tensor, beta: float) -> Tensor:
    """Compute `jsd(beta)` of `[..., V]` logits; returns `[...]` nats.

    Raises:
        ValueError: the shapes differ, or `beta` is outside [0, 1].
    """
    return jsd(beta)(student_logits, teacher_logits)


def plackett_luce_nll(student_logits: Tensor, teacher_logits: Tensor, top_k: int = 10) -> Tensor:
    """Negative log-likelihood of the teacher's ranking of the student's candidates (TSD-KD Eq. 4).

    The candidates are the student's `top_k` tokens. The teacher ranks them by its own logits, best first (ties keep
    the student's order). Each choice is a softmax over the candidates *not yet chosen*.

    Args:
        student_logits: `[..., V]`; only the `top_k` candidates receive a gradient.
        teacher_logits: `[..., V]`.
        top_k: number of candidates; at most V are used.

    Returns:
        `[...]`, nats.

    Raises:
        ValueError: the shapes differ, or `top_k` is below 1.
    """
    _check_same_vocabulary(student_logits, teacher_logits)
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, found {top_k}")
    k = min(top_k, student_logits.shape[-1])
    scores, candidates = upcast(student_logits).topk(k, dim=-1)
    preference = teacher_logits.detach().gather(-1, candidates)
    ranking = preference.argsort(dim=-1, descending=True, stable=True)
    ranked = scores.gather(-1, ranking)
    placed = torch.ones(k, k, dtype=torch.bool, device=ranked.device).tril(-1)
    # [j, l]: l relative to j. Take differences first: a large common offset would cost float32 precision
    against = (ranked.unsqueeze(-2) - ranked.unsqueeze(-1)).masked_fill(placed, float("-inf"))
    return against.logsumexp(-1).sum(-1)


def clipped_policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, clip_epsilon: float = 0.2) -> Tensor:
    """PPO's clipped surrogate, `max(-r A, -clip(r, 1 - eps, 1 + eps) A)` with `r = exp(logps - old_logps)`.

    Args:
        logps: `[...]`, log-probabilities of the sampled tokens under the student; receives the gradient.
        old_logps: `[...]`, log-probabilities under the policy that sampled them.
        advantages: `[...]`.
        clip_epsilon: half-width of the clipping range.

    Returns:
        `[...]`.
    """
    ratio = (upcast(logps) - upcast(old_logps.detach())).exp()
    advantages = upcast(advantages.detach())
    clipped = ratio.clamp(1.0 - clip_epsilon, 1.0 + clip_epsilon)
    return torch.maximum(-ratio * advantages, -clipped * advantages)


def clipped_reverse_kl(logps: Tensor, old_logps: Tensor, teacher_logps: Tensor, clip_epsilon: float = 0.2) -> Tensor:
    """Clipped reverse KL on the sampled tokens (EOPD Eq. 8), with advantage `teacher_logps - old_logps`.

    Args:
        logps: `[...]`, log-probabilities of the sampled tokens under the student; receives the gradient.
        old_logps: `[...]`, log-probabilities under the policy that sampled them.
        teacher_logps: `[...]`, log-probabilities under the teacher.
        clip_epsilon: half-width of the clipping range.

    Returns:
        `[...]`, nats.
    """
    return clipped_policy_loss(logps, old_logps, upcast(teacher_logps) - upcast(old_logps), clip_epsilon)


def forward_kl_on(student_logps: Tensor, teacher_logps: Tensor) -> Tensor:
    """Forward KL over a subset of the vocabulary (EOPD Eq. 10).

    The teacher is renormalized over the subset. The student is not: its log-probabilities come from the full softmax.

    Args:
        student_logps: `[..., K]`, the student's log-probabilities at the subset's ids; receives the gradient.
        teacher_logps: `[..., K]`, the teacher's log-probabilities at the same ids.

    Returns:
        `[...]`, nats.
    """
    teacher = upcast(teacher_logps.detach()).log_softmax(-1)
    return _kl(teacher, upcast(student_logps))


def topk_forward_kl(student_logits: Tensor, teacher_logits: Tensor, top_k: int = 16) -> Tensor:
    """Forward KL over the teacher's `top_k` tokens (EOPD Eq. 10).

    Args:
        student_logits: `[..., V]`, receives the gradient.
        teacher_logits: `[..., V]`.
        top_k: size of the subset; at most V ids are used.

    Returns:
        `[...]`, nats.

    Raises:
        ValueError: the shapes differ, or `top_k` is below 1.
    """
    _check_same_vocabulary(student_logits, teacher_logits)
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, found {top_k}")
    values, ids = upcast(teacher_logits.detach()).topk(min(top_k, teacher_logits.shape[-1]), dim=-1)
    return forward_kl_on(upcast(student_logits).log_softmax(-1).gather(-1, ids), values)
