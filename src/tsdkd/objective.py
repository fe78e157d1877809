"""What a method is: which terms it has and how they add up. One file a method, defaults from its paper.

An objective asks a head (`tsdkd.lm_head.statistics`) about the tokens of one micro-batch and returns *sums*. The
trainer divides once, by a count over the global batch: any split into micro-batches and processes gives the same
update.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .lm_head.statistics import Head, TokenStatistics
from .selection import token_index


@dataclass
class RolloutScores:
    """What is asked once about the N tokens of a rollout (EOPD Alg. 1, line 9), before the student changes.

    Attributes:
        teacher_entropy: `[N]`, the teacher's, over the full vocabulary, nats.
        teacher_per_token_logps: `[N]`, log-probabilities of the sampled tokens under the teacher, nats.
        teacher_topk_ids: `[N, K]`, the teacher's most probable tokens.
        teacher_topk_logps: `[N, K]`, their log-probabilities, nats.
        old_per_token_logps: `[N]`, log-probabilities under the policy that sampled, nats; None where no method asks.
        random_uniform: `[N]` in [0, 1), for random placements.
        importance: `[N]`, weights of the policy's loss where an engine sampled from another distribution than
            `old_per_token_logps`; None where it didn't.
        advantages: `[N]`, where a method has others than the difference of teacher and old policy.
    """

    teacher_entropy: Tensor
    teacher_per_token_logps: Tensor
    teacher_topk_ids: Tensor
    teacher_topk_logps: Tensor
    old_per_token_logps: Tensor | None = None
    random_uniform: Tensor | None = None
    importance_sampling_ratio: Tensor | None = None
    advantages: Tensor | None = None

    def of(self, rows: slice) -> "RolloutScores":
        """Those of some of the N tokens."""
        sliced: dict[str, Any] = {name: None if all_ is None else all_[rows] for name, all_ in vars(self).items()}
        return RolloutScores(**sliced)


@dataclass
class CompletionBatch:
    """The completions of a micro-batch, N tokens in B rows.

    Attributes:
        mask: `[B, T]` bool with N true entries: where a head scores, in row order.
        ids: `[N]`, the tokens; only objectives on sampled tokens, and the log, need them.
        is_training: whether an objective's own state moves on.
        sampling_per_token_logps: `[N]`, log-probabilities under the engine that sampled, nats, for the log.
        scores: of the rollout, for objectives that need them.
        loss_mask: `[B, T]` bool, the part of `mask` that is trained on, where that isn't all of it.
        index: `[N]`, where `mask` is true (`tsdkd.selection.token_index`); found here if it isn't given.
    """

    mask: Tensor
    ids: Tensor | None = None
    is_training: bool = True
    sampling_per_token_logps: Tensor | None = None
    scores: RolloutScores | None = None
    loss_mask: Tensor | None = None
    index: Tensor | None = None

    def at(self, values: Tensor) -> Tensor:
        """`[N]`: those of `values` `[B, T]` where `mask` is true."""
        if self.index is None:
            self.index = token_index(self.mask)
        return values.flatten().index_select(0, self.index)

    @property
    def token_weights(self) -> Tensor:
        """`[N]`, each token's weight in the mean of its response, float64."""
        lengths = self.mask.sum(-1, keepdim=True).clamp(min=1)
        return self.at(lengths.double().reciprocal().expand_as(self.mask))

    @property
    def logged_ids(self) -> Tensor | None:
        """`[N, 1]`, the tokens whose log-probabilities only the log needs."""
        return None if self.sampling_per_token_logps is None or self.ids is None else self.ids.unsqueeze(-1)


@dataclass
class ObjectiveOutput:
    """Sums of one micro-batch.

    Attributes:
        loss: the weighted sum of the terms, scalar, differentiable.
        terms: each term's sum over the objective's unit, scalar; differentiable where the head doesn't differentiate
            own-token losses by itself.
        weights: each term's factor in the loss.
        metrics: name -> (sum, count), scalars without gradient; what is logged is sum / count.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    weights: dict[str, float]
    metrics: dict[str, tuple[Tensor, Tensor]]


class Objective:
    """Base of all objectives. Subclasses are dataclasses whose fields are the method's options.

    Attributes:
        unit: what the loss is a mean of over the global batch: "completions", "tokens" or "micro-batches".
        needs_teacher_distribution: whether the head must know the teacher's distributions.
        needs_rollout_scores: whether it reads `Completions.scores`.
        needs_old_per_token_logps: whether those need the policy that sampled.
        teacher_top_k: how many of the teacher's tokens those hold.
    """

    unit: ClassVar[str] = "tokens"
    needs_teacher_distribution: ClassVar[bool] = True
    needs_rollout_scores: ClassVar[bool] = False
    needs_old_per_token_logps: ClassVar[bool] = False
    teacher_top_k: int = 16

    def __call__(self, head: Head, completions: CompletionBatch) -> ObjectiveOutput:
        """Sums over a micro-batch."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to continue; most objectives have no state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""


def mean_metric(values: Tensor) -> tuple[Tensor, Tensor]:
    """`(sum, count)` of a tensor's elements, as a metric."""
    values = values.detach().float()
    return values.sum(), values.new_full((), values.numel())


def approx_kl(log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """`r - 1 - log r`, an estimate of KL(Q_old || Q) from its samples, nats (Schulman 2020), as a metric.

    Args:
        log_ratio: `[N]`, `log Q - log Q_old` of the sampled tokens, nats.
    """
    return mean_metric(log_ratio.expm1() - log_ratio)  # not exp() - 1, whose rounding is larger than the result


def common_metrics(tokens: TokenStatistics, completions: CompletionBatch) -> dict[str, tuple[Tensor, Tensor]]:
    """Entropies, and how far the engine that sampled is from the student; the latter's names are TRL's."""
    metrics = {"entropy/student": mean_metric(tokens.entropy)}
    if tokens.teacher_entropy is not None:
        metrics["entropy/teacher"] = mean_metric(tokens.teacher_entropy)
    if completions.sampling_per_token_logps is not None:
        difference = (tokens.logps[:, 0].detach() - completions.sampling_per_token_logps).abs()
        largest = difference.max() if len(difference) else difference.new_zeros(())
        metrics["sampling/sampling_logp_difference/mean"] = mean_metric(difference)
        metrics["sampling/sampling_logp_difference/max"] = (largest, torch.ones_like(largest))
    return metrics
