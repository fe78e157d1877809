"""On-policy distillation: clipped reverse KL on the sampled tokens (Lu and Lab 2025; EOPD Sec. 2.3)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..config.options import AT_LEAST_ONE, OPEN_FRACTION, option
from ..lm_head.statistics import StatisticsRequest, TokenStatistics
from ..losses import clipped_policy_loss, forward_kl_on
from ..objective import CompletionBatch, Metrics, Objective, PolicyScores, approx_kl, mean_metric
from ..trainer.rollout_scores import ScoredRolloutTrainer
from .defaults import RolloutConfig


@dataclass
class OPDOptions:
    """Options of on-policy distillation."""

    epsilon: float = option(0.2, "PPO clipping range.", OPEN_FRACTION)


@dataclass
class OPDConfig(OPDOptions, RolloutConfig):
    """On-policy distillation: clipped reverse KL on the sampled tokens (EOPD's Table 8)."""

    method = "opd"
    paper: ClassVar[str] = "Lu and Lab 2025; EOPD Sec. 2.3, arXiv 2603.07079"

    learning_rate: float = option(3e-6)
    max_completion_length: int = option(4096)
    max_length: int | None = option(None)
    vllm_importance_sampling_correction: bool = option(
        False,
        "Weight the loss of each token by its truncated ratio of student to vLLM probability. "
        "If false, vLLM's probabilities are the old policy (Q_old).",
        no_effect=(lambda v: not v["use_vllm"], "use_vllm is false"),
    )
    vllm_importance_sampling_clip_max: float = option(
        3.0,
        "Upper limit of this ratio.",
        AT_LEAST_ONE,
        (lambda v: not v["vllm_importance_sampling_correction"], "vllm_importance_sampling_correction is false"),
    )


@dataclass
class OPDObjective(OPDOptions, Objective):
    """Eq. 8 of EOPD, averaged over tokens. Subclasses add terms or change the advantage, and log the same metrics."""

    needs_teacher_distribution = False
    scores_class = PolicyScores
    uncertainty_threshold: ClassVar[float] = 0.8  # nats; for the log (EOPD Fig. 5)

    @property
    def term_weights(self) -> dict[str, float]:
        """See `Objective`."""
        return {"reverse_kl": 1.0}

    def request(self, completions: CompletionBatch) -> StatisticsRequest:
        """See `Objective`."""
        return StatisticsRequest(entropy=True, ids=completions.scored_ids)

    def per_token_terms(
        self, completions: CompletionBatch, statistics: TokenStatistics, rows: slice
    ) -> dict[str, Tensor]:
        """See `Objective`."""
        scores = completions.scores.select(rows)
        advantages = self.compute_advantages(statistics, scores)
        logps, old_logps = statistics.logps[:, 0], scores.old_per_token_logps
        loss = clipped_policy_loss(logps, old_logps, advantages, self.epsilon)
        return {"reverse_kl": loss * scores.importance_sampling_ratio}

    def compute_advantages(self, statistics: TokenStatistics, scores: PolicyScores) -> Tensor:
        """`[N]`, the advantages of Eq. 6, relative to the sampling policy; no gradient."""
        return scores.advantages

    @torch.no_grad()
    def metrics(self, statistics: TokenStatistics, completions: CompletionBatch) -> Metrics:
        """See `Objective`."""
        scores = completions.scores
        advantages = self.compute_advantages(statistics, scores)
        log_ratio = statistics.logps[:, 0] - scores.old_per_token_logps
        ratio = log_ratio.exp()
        too_high = (ratio > 1 + self.epsilon) & (advantages > 0)
        too_low = (ratio < 1 - self.epsilon) & (advantages < 0)
        uncertain = scores.teacher_entropy > self.uncertainty_threshold
        forward_kl = forward_kl_on(statistics.logps[:, 1:], scores.teacher_topk_logps)
        return {
            **super().metrics(statistics, completions),
            "policy/clip_fraction": mean_metric(too_high | too_low),
            "policy/ratio": mean_metric(ratio),
            "policy/approx_kl": approx_kl(log_ratio),
            "uncertain/share": mean_metric(uncertain),
            "uncertain/forward_kl": mean_metric(forward_kl[uncertain]),
            "entropy/teacher": mean_metric(scores.teacher_entropy),
        }


class OPDTrainer(ScoredRolloutTrainer):
    """On-policy distillation. Arguments: see `TokenSelectiveTrainer`."""

    config_class = OPDConfig
    objective_class = OPDObjective
