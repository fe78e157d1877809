"""On-policy distillation with an entropy bonus (Schulman et al. 2017; EOPD's Table 4)."""

from dataclasses import dataclass

from torch import Tensor

from ..config.options import POSITIVE, option
from ..lm_head.statistics import TokenStatistics
from ..objective import CompletionBatch
from ..trainer.rollout_scores import ScoredRolloutTrainer
from .opd import OPDConfig, OPDObjective, OPDOptions


@dataclass
class OPDEntropyBonusOptions(OPDOptions):
    """Options of the entropy bonus. The paper does not give the coefficient; 0.001 was verl's default."""

    entropy_bonus: float = option(0.001, "Coefficient of the student's entropy in the bonus.", POSITIVE)


@dataclass
class OPDEntropyBonusConfig(OPDEntropyBonusOptions, OPDConfig):
    """Clipped reverse KL with a bonus for the student's entropy."""

    method = "opd-entropy-bonus"
    paper = "Schulman et al. 2017; EOPD Table 4"


@dataclass
class OPDEntropyBonusObjective(OPDEntropyBonusOptions, OPDObjective):
    """Subtract `entropy_bonus` times the mean entropy from the loss."""

    @property
    def term_weights(self) -> dict[str, float]:
        """See `Objective`."""
        return {**super().term_weights, "entropy": -self.entropy_bonus}

    def per_token_terms(
        self, completions: CompletionBatch, statistics: TokenStatistics, rows: slice
    ) -> dict[str, Tensor]:
        """See `Objective`."""
        return {**super().per_token_terms(completions, statistics, rows), "entropy": statistics.entropy}


class OPDEntropyBonusTrainer(ScoredRolloutTrainer):
    """On-policy distillation with an entropy bonus. Arguments: see `TokenSelectiveTrainer`."""

    config_class = OPDEntropyBonusConfig
    objective_class = OPDEntropyBonusObjective
