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

    clip_epsilon: float = option(0.2, "PPO's clip.", OPEN_FRACTION)


@dataclass
class OPDConfig(OPDOptions, RolloutConfig):
    """Clipped reverse KL on the sampled tokens: on-policy distillation (EOPD's Table 8)."""

    method = "opd"
    paper: ClassVar[str] = "Lu and Lab 2025; EOPD Sec. 2.3, arXiv 2603.07079"

    learning_rate: float = option(3e-6, "Initial learning rate of AdamW.")
    max_new_tokens: int = option(4096, "Completion limit, tokens.")
    max_length: int | None = option(None, "Limit of prompt plus completion, tokens; none: the models' context.")
    vllm_importance_sampling_correction: bool = option(False, "Weigh tokens by student / engine probability.")
    vllm_importance_sampling_clip_max: float = option(3.0, "Where that weight is truncated.", AT_LEAST_ONE)


@dataclass
class OPDObjective(OPDOptions, Objective):
    """Eq. 8 of EOPD, a mean over tokens. Its relatives add terms or change the advantage; they log the same."""

    needs_teacher_distribution = False
    needs_rollout_scores = True
    needs_old_per_token_logps = True
    uncertainty_threshold: ClassVar[float] = 0.8  # nats; for the log (EOPD Fig. 5)

    def __call__(self, head: Head, responses: CompletionBatch) -> ObjectiveOutput:
        """See `Objective`."""
        answers, sampled = responses.answers, responses.ids
        assert answers is not None and sampled is not None
        own = PerTokenLoss(self.term_weights, lambda tokens, rows: self.compute_terms(tokens, answers.of(rows)))
        ids = torch.cat([sampled.unsqueeze(-1), answers.teacher_topk_ids], dim=-1)
        tokens = head(StatisticsRequest(entropy=True, ids=ids), own)
        metrics = common_metrics(tokens, responses) | self._metrics(tokens, answers)
        return ObjectiveOutput(tokens.loss, tokens.loss_terms, own.weights, metrics)

    @property
    def term_weights(self) -> dict[str, float]:
        """Each term's factor in the loss."""
        return {"reverse_kl": 1.0}

    def compute_terms(self, tokens: TokenStatistics, answers: RolloutScores) -> dict[str, Tensor]:
        """Each term of each token: all of them depend on a token's own statistics only."""
        assert answers.old_per_token_logps is not None
        compute_advantages = self.compute_advantages(tokens, answers)
        loss = clipped_policy_loss(
            tokens.logps[:, 0], answers.old_per_token_logps, compute_advantages, self.clip_epsilon
        )
        return {"reverse_kl": loss if answers.importance is None else loss * answers.importance}

    def compute_advantages(self, tokens: TokenStatistics, answers: RolloutScores) -> Tensor:
        """`[N]`, Eq. 6 with the policy that sampled; no gradient."""
        assert answers.old_per_token_logps is not None
        return answers.teacher_per_token_logps - answers.old_per_token_logps

    @torch.no_grad()
    def _metrics(self, tokens: TokenStatistics, answers: RolloutScores) -> dict[str, tuple[Tensor, Tensor]]:
        compute_advantages = self.compute_advantages(tokens, answers)
        assert answers.old_per_token_logps is not None
        log_ratio = tokens.logps[:, 0] - answers.old_per_token_logps
        ratio = log_ratio.exp()
        too_high = (ratio > 1 + self.clip_epsilon) & (compute_advantages > 0)
        too_low = (ratio < 1 - self.clip_epsilon) & (compute_advantages < 0)
        uncertain = answers.teacher_entropy > self.uncertainty_threshold
        forward_kl = forward_kl_on(tokens.logps[:, 1:], answers.teacher_topk_logps)
        return {
            "policy/clip_fraction": mean_metric(too_high | too_low),
            "policy/ratio": mean_metric(ratio),
            "policy/approx_kl": approx_kl(log_ratio),
            "uncertain/share": mean_metric(uncertain),
            "uncertain/forward_kl": mean_metric(forward_kl[uncertain]),
            "entropy/teacher": mean_metric(answers.teacher_entropy),
        }


class OPDTrainer(ScoredRolloutTrainer):
    """Arguments: see `TokenSelectiveTrainer`."""

    config_class = OPDConfig
    objective_class = OPDObjective
