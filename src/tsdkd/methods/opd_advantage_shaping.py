"""On-policy distillation with advantage shaping (Cheng et al. 2025; EOPD's Table 4 and Eq. 11)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.options import POSITIVE, option
from ..lm_head.statistics import TokenStatistics
from ..objective import PolicyScores
from ..trainer.rollout_scores import ScoredRolloutTrainer
from .opd import OPDConfig, OPDObjective, OPDOptions

_KAPPA = 2.0


@dataclass
class OPDAdvantageShapingOptions(OPDOptions):
    """Options of the shaping function (EOPD App. A). Kappa is fixed at 2."""

    advantage_shaping: float = option(0.1, "Coefficient alpha of advantage shaping.", POSITIVE)


@dataclass
class OPDAdvantageShapingConfig(OPDAdvantageShapingOptions, OPDConfig):
    """Clipped reverse KL with larger advantages for uncertain tokens."""

    method = "opd-advantage-shaping"
    paper = "Cheng et al. 2025; EOPD Table 4"


@dataclass
class OPDAdvantageShapingObjective(OPDAdvantageShapingOptions, OPDObjective):
    """Increase the advantages of uncertain tokens without changing their sign."""

    def compute_advantages(self, statistics: TokenStatistics, scores: PolicyScores) -> Tensor:
        """See `OPDObjective`; shaped as in Eq. 11."""
        advantages = super().compute_advantages(statistics, scores)
        return advantages + torch.minimum(
            self.advantage_shaping * statistics.entropy.detach(), advantages.abs() / _KAPPA
        )


class OPDAdvantageShapingTrainer(ScoredRolloutTrainer):
    """On-policy distillation with advantage shaping. Arguments: see `TokenSelectiveTrainer`."""

    config_class = OPDAdvantageShapingConfig
    objective_class = OPDAdvantageShapingObjective
