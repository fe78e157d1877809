"""KD, the off-policy baseline in EOPD's tables: cross-entropy plus top-k forward KL (EOPD App. A, Table 7)."""

from dataclasses import dataclass

from torch import Tensor

from ..config.base import TokenSelectiveConfig
from ..config.options import AT_LEAST_ONE, NON_NEGATIVE, option
from ..lm_head.statistics import StatisticsRequest, TokenStatistics
from ..losses import forward_kl_on
from ..objective import CompletionBatch, Objective, RolloutScores
from ..trainer.rollout_scores import ScoredRolloutTrainer
from .defaults import OFF_POLICY_UNSUPPORTED


@dataclass
class KDOptions:
    """Options of KD."""

    cross_entropy_weight: float = option(0.5, "Weight of the cross-entropy on the completion.", NON_NEGATIVE)
    forward_kl_weight: float = option(0.5, "Weight of forward KL.", NON_NEGATIVE)
    forward_kl_top_k: int = option(16, "Number of top teacher tokens used for forward KL.", AT_LEAST_ONE)


@dataclass
class KDConfig(KDOptions, TokenSelectiveConfig):
    """Cross-entropy and top-16 forward KL, with equal weights, on the data set's completions (EOPD's Table 7)."""

    method = "kd"
    completions_source = "the data set's"
    paper = "Hinton et al. 2015; EOPD Table 2"
    has_lmbda = False
    unsupported_options = OFF_POLICY_UNSUPPORTED

    lmbda: float = option(0.0, "The method never generates.")
    learning_rate: float = option(1e-5)
    max_completion_length: int = option(4096)
    max_length: int | None = option(4096)


@dataclass
class KDObjective(KDOptions, Objective):
    """Mean over tokens. The teacher is renormalized over its top tokens, as in EOPD Eq. 10."""

    needs_teacher_distribution = False
    scores_class = RolloutScores

    @property
    def teacher_top_k(self) -> int:  # type: ignore[override]
        """Number of the teacher's most probable tokens to keep."""
        return self.forward_kl_top_k

    @property
    def term_weights(self) -> dict[str, float]:
        """See `Objective`."""
        return {"cross_entropy": self.cross_entropy_weight, "forward_kl": self.forward_kl_weight}

    def request(self, completions: CompletionBatch) -> StatisticsRequest:
        """See `Objective`."""
        return StatisticsRequest(entropy=True, ids=completions.scored_ids)

    def per_token_terms(
        self, completions: CompletionBatch, statistics: TokenStatistics, rows: slice
    ) -> dict[str, Tensor]:
        """See `Objective`."""
        forward_kl = forward_kl_on(statistics.logps[:, 1:], completions.scores.teacher_topk_logps[rows])
        return {"cross_entropy": -statistics.logps[:, 0], "forward_kl": forward_kl}


class KDTrainer(ScoredRolloutTrainer):
    """Off-policy knowledge distillation. Arguments: see `TokenSelectiveTrainer`."""

    config_class = KDConfig
    objective_class = KDObjective
