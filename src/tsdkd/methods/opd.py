"""On-policy distillation: clipped reverse KL on the sampled tokens (Lu and Lab 2025; EOPD Sec. 2.3)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..config.options import AT_LEAST_ONE, OPEN_FRACTION, option
from ..lm_head.statistics import Head, PerTokenLoss, StatisticsRequest, TokenStatistics
from ..losses import clipped_policy_loss, forward_kl_on
from ..objective import (
    CompletionBatch,
    Objective,
    ObjectiveOutput,
    RolloutScores,
    approx_kl,
    common_metrics,
    mean_metric,
)
from ..trainer.rollout_scores import ScoredRolloutTrainer
from .defaults import RolloutConfig


@dataclass
class OPDOptions:
    """Options of on-policy distillation."""

    epsilon: float = option(0.2, "PPO's clip.", OPEN_FRACTION)


@dataclass
class OPDConfig(OPDOptions, RolloutConfig):
    """Clipped reverse KL on the sampled tokens: on-policy distillation (EOPD's Table 8)."""

    method = "opd"
    paper: ClassVar[str] = "Lu and Lab 2025; EOPD Sec. 2.3, arXiv 2603.07079"

    learning_rate: float = option(3e-6)
    max_completion_length: int = option(4096)
    max_length: int | None = option(None)
    vllm_importance_sampling_correction: bool = option(
        False,
        "Weigh tokens by student / engine probability.",
        no_effect=(lambda v: not v["use_vllm"], "use_vllm is false"),
    )
    vllm_importance_sampling_clip_max: float = option(
        3.0,
        "Where that weight is truncated.",
        AT_LEAST_ONE,
        (lambda v: not v["vllm_importance_sampling_correction"], "vllm_importance_sampling_correction is false"),
    )


@dataclass
class OPDObjective(OPDOptions, Objective):
    """Eq. 8 of EOPD, a mean over tokens. Its relatives add terms or change the advantage; they log the same."""

    needs_teacher_distribution = False
    needs_rollout_scores = True
    needs_old_per_token_logps = True
    uncertainty_threshold: ClassVar[float] = 0.8  # nats; for the log (EOPD Fig. 5)

    def __call__(self, head: Head, completions: CompletionBatch) -> ObjectiveOutput:
        """See `Objective`."""
        scores, sampled = completions.scores, completions.ids
        assert scores is not None and sampled is not None
        own = PerTokenLoss(self.term_weights, lambda tokens, rows: self.compute_terms(tokens, scores.of(rows)))
        ids = torch.cat([sampled.unsqueeze(-1), scores.teacher_topk_ids], dim=-1)
        tokens = head(StatisticsRequest(entropy=True, ids=ids), own)
        metrics = common_metrics(tokens, completions) | self._metrics(tokens, scores)
        return ObjectiveOutput(tokens.loss, tokens.loss_terms, own.weights, metrics)

    @property
    def term_weights(self) -> dict[str, float]:
        """Each term's factor in the loss."""
        return {"reverse_kl": 1.0}

    def compute_terms(self, tokens: TokenStatistics, scores: RolloutScores) -> dict[str, Tensor]:
        """Each term of each token: all of them depend on a token's own statistics only."""
        assert scores.old_per_token_logps is not None
        compute_advantages = self.compute_advantages(tokens, scores)
        loss = clipped_policy_loss(tokens.logps[:, 0], scores.old_per_token_logps, compute_advantages, self.epsilon)
        return {
            "reverse_kl": loss if scores.importance_sampling_ratio is None else loss * scores.importance_sampling_ratio
        }

    def compute_advantages(self, tokens: TokenStatistics, scores: RolloutScores) -> Tensor:
        """`[N]`, Eq. 6 with the policy that sampled; no gradient."""
        assert scores.old_per_token_logps is not None
        return scores.teacher_per_token_logps - scores.old_per_token_logps

    @torch.no_grad()
    def _metrics(self, tokens: TokenStatistics, scores: RolloutScores) -> dict[str, tuple[Tensor, Tensor]]:
        compute_advantages = self.compute_advantages(tokens, scores)
        assert scores.old_per_token_logps is not None
        log_ratio = tokens.logps[:, 0] - scores.old_per_token_logps
        ratio = log_ratio.exp()
        too_high = (ratio > 1 + self.epsilon) & (compute_advantages > 0)
        too_low = (ratio < 1 - self.epsilon) & (compute_advantages < 0)
        uncertain = scores.teacher_entropy > self.uncertainty_threshold
        forward_kl = forward_kl_on(tokens.logps[:, 1:], scores.teacher_topk_logps)
        return {
            "policy/clip_fraction": mean_metric(too_high | too_low),
            "policy/ratio": mean_metric(ratio),
            "policy/approx_kl": approx_kl(log_ratio),
            "uncertain/share": mean_metric(uncertain),
            "uncertain/forward_kl": mean_metric(forward_kl[uncertain]),
            "entropy/teacher": mean_metric(scores.teacher_entropy),
        }


class OPDTrainer(ScoredRolloutTrainer):
    """Arguments: see `TokenSelectiveTrainer`."""

    config_class = OPDConfig
    objective_class = OPDObjective
