"""The interface between a method and the trainer: the inputs and outputs of an objective.

An objective requests statistics of the tokens of one micro-batch (`tsdkd.lm_head.statistics`) and returns *sums*. The
trainer divides them once, by a count over the global batch, so that any split into micro-batches and processes gives
the same update.
"""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from .lm_head.statistics import Head, PerTokenLoss, StatisticsRequest, TokenStatistics
from .selection import token_index

Metrics = dict[str, tuple[Tensor, Tensor]]
"""Name -> (sum, count), scalars without gradient; sum / count is logged."""


@dataclass
class RolloutScores:
    """Scores of the N tokens of a rollout, computed once before the student changes (EOPD Alg. 1, line 9).

    Attributes:
        teacher_entropy: `[N]`, the teacher's entropy over the full vocabulary, nats.
        teacher_per_token_logps: `[N]`, log-probabilities of the tokens under the teacher, nats.
        teacher_topk_ids: `[N, K]`, the teacher's most probable tokens.
        teacher_topk_logps: `[N, K]`, their log-probabilities, nats.
        random_uniform: `[N]` in [0, 1), the same in every step that trains on the rollout.
    """

    teacher_entropy: Tensor
    teacher_per_token_logps: Tensor
    teacher_topk_ids: Tensor
    teacher_topk_logps: Tensor
    random_uniform: Tensor

    def select(self, rows: slice) -> Self:
        """Return the scores of the tokens `rows`."""
        return type(self)(**{name: values[rows] for name, values in vars(self).items()})


@dataclass
class PolicyScores(RolloutScores):
    """Scores of a rollout for a policy gradient.

    Attributes:
        old_per_token_logps: `[N]`, log-probabilities of the tokens under the policy that sampled them, nats.
        advantages: `[N]`, nats.
        importance_sampling_ratio: `[N]`, weights of the policy loss. They are 1 unless an engine sampled from a
            distribution other than that of `old_per_token_logps`.
    """

    old_per_token_logps: Tensor
    advantages: Tensor
    importance_sampling_ratio: Tensor


@dataclass
class CompletionBatch:
    """The completions of a micro-batch: N tokens in B rows.

    Attributes:
        mask: `[B, T]` bool with N true entries: the positions that predict the tokens, in row order.
        ids: `[N]`, the tokens.
        is_training: whether the objective updates its state (adaptive c).
        sampling_per_token_logps: `[N]`, log-probabilities under the engine that sampled, nats; for the log.
        scores: an instance of the objective's `scores_class`, if it has one.
        loss_mask: `[B, T]` bool, the part of `mask` to train on; by default all of it.
        index: `[N]`, the positions where `mask` is true (`tsdkd.selection.token_index`); computed by default.
    """

    mask: Tensor
    ids: Tensor
    is_training: bool = True
    sampling_per_token_logps: Tensor | None = None
    scores: Any = None
    loss_mask: Any = None
    index: Any = None

    def __post_init__(self) -> None:
        if self.loss_mask is None:
            self.loss_mask = self.mask
        if self.index is None:
            self.index = token_index(self.mask)

    def gather(self, values: Tensor) -> Tensor:
        """Return `[N]`, the entries of `values` `[B, T]` where `mask` is true."""
        return values.flatten().index_select(0, self.index)

    def scatter(self, values: Tensor) -> Tensor:
        """Return `[B, T]`, with `values` `[N]` where `mask` is true and 0 elsewhere."""
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, values)

    @cached_property
    def token_weights(self) -> Tensor:
        """`[N]`, each token's weight in the mean over its completion, float64."""
        lengths = self.mask.sum(-1, keepdim=True).clamp(min=1)
        return self.gather(lengths.double().reciprocal().expand_as(self.mask))

    @property
    def scored_ids(self) -> Tensor:
        """`[N, 1 + K]`, the tokens and the teacher's most probable tokens; for objectives with `scores`."""
        return torch.cat([self.ids.unsqueeze(-1), self.scores.teacher_topk_ids], dim=-1)

    @property
    def logged_ids(self) -> Tensor | None:
        """`[N, 1]`, tokens whose log-probabilities are needed only for logging."""
        return None if self.sampling_per_token_logps is None else self.ids.unsqueeze(-1)


@dataclass
class ObjectiveOutput:
    """Sums over one micro-batch.

    Attributes:
        loss: the weighted sum of the terms, scalar, differentiable.
        terms: sum of each term over the objective's unit, scalar; differentiable unless the head differentiates the
            per-token loss itself.
        weights: weight of each term in the loss.
        metrics: name -> (sum, count), scalars without gradient; sum / count is logged.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    weights: dict[str, float]
    metrics: Metrics


class Objective:
    """Base class of all objectives. Subclasses are dataclasses whose fields are the method's options.

    If every term depends only on each token's own statistics, define `term_weights`, `request` and
    `per_token_terms`. If a term depends on other tokens, for example to select tokens, add it in `loss`, and its
    weight in `loss_weights`.

    Attributes:
        unit: the items that the loss is averaged over in the global batch: "completions", "tokens" or
            "micro-batches".
        micro_batching: which rows may share a micro-batch. "free": any; "in order": only neighbors, because the
            objective depends on the order of the completions; "fixed": those that the data loader puts together,
            padded on the right, because it depends on the split or on padding.
        needs_teacher_distribution: whether the head needs the teacher's distributions.
        scores_class: class of the rollout scores that the objective uses; None if it uses none.
        teacher_top_k: number of the teacher's most probable tokens in these scores.
    """

    unit: ClassVar[str] = "tokens"
    micro_batching: Literal["free", "in order", "fixed"] = "free"
    needs_teacher_distribution: ClassVar[bool] = True
    scores_class: ClassVar[type[RolloutScores] | None] = None
    teacher_top_k: int = 16

    @property
    def term_weights(self) -> dict[str, float]:
        """Weight of each per-token term in the loss."""
        raise NotImplementedError

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each term in the loss; by default those of the per-token terms."""
        return self.term_weights

    def request(self, completions: CompletionBatch) -> StatisticsRequest:
        """Return the request for the statistics that the terms need."""
        raise NotImplementedError

    def per_token_terms(
        self, completions: CompletionBatch, statistics: TokenStatistics, rows: slice
    ) -> dict[str, Tensor]:
        """Compute the terms of the tokens `rows` from their statistics; each term is `[n]`."""
        raise NotImplementedError

    def per_token_loss(self, completions: CompletionBatch) -> PerTokenLoss | None:
        """Return the per-token terms, which a head evaluates chunk by chunk; None if a term needs other tokens."""
        return PerTokenLoss(self.loss_weights, partial(self.per_token_terms, completions))

    def loss(self, statistics: TokenStatistics, completions: CompletionBatch) -> ObjectiveOutput:
        """Compute the sums over a micro-batch."""
        metrics = self.metrics(statistics, completions)
        return ObjectiveOutput(statistics.loss, statistics.loss_terms, self.loss_weights, metrics)

    def metrics(self, statistics: TokenStatistics, completions: CompletionBatch) -> Metrics:
        """Compute metrics to log in addition to the loss terms."""
        return common_metrics(statistics, completions)

    def __call__(self, head: Head, completions: CompletionBatch) -> ObjectiveOutput:
        """Request the statistics from the head and compute the loss, as the trainer does."""
        return self.loss(head(self.request(completions), self.per_token_loss(completions)), completions)

    def state_dict(self) -> dict[str, Any]:
        """Return the state to store in a checkpoint; most objectives have none."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict()`."""


def mean_metric(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return `(sum, count)` of a tensor's elements, as a metric."""
    values = values.detach().float()
    return values.sum(), values.new_full((), values.numel())


def approx_kl(log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate KL(Q_old || Q) from samples as the mean of `r - 1 - log r`, nats (Schulman 2020), as a metric.

    Args:
        log_ratio: `[N]`, `log Q - log Q_old` of the sampled tokens, nats.
    """
    return mean_metric(log_ratio.expm1() - log_ratio)  # exp() - 1 would have a rounding error larger than the result


def common_metrics(statistics: TokenStatistics, completions: CompletionBatch) -> Metrics:
    """Student and teacher entropy, and the engine's log-probability error (metric names as in TRL), as far as the
    statistics were requested."""
    metrics: Metrics = {}
    if statistics.entropy is not None:
        metrics["entropy/student"] = mean_metric(statistics.entropy)
    if statistics.teacher_entropy is not None:
        metrics["entropy/teacher"] = mean_metric(statistics.teacher_entropy)
    if completions.sampling_per_token_logps is not None and statistics.logps is not None:
        difference = (statistics.logps[:, 0].detach() - completions.sampling_per_token_logps).abs()
        largest = difference.max() if len(difference) else difference.new_zeros(())
        metrics["sampling/sampling_logp_difference/mean"] = mean_metric(difference)
        metrics["sampling/sampling_logp_difference/max"] = (largest, torch.ones_like(largest))
    return metrics
