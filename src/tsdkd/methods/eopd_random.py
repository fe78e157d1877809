"""Clipped reverse KL plus top-k forward KL on random tokens: the "random" variant of EOPD's Table 6."""

from dataclasses import dataclass

from torch import Tensor

from ..config.options import POSITIVE_FRACTION, option
from ..objective import PolicyScores
from ..trainer.rollout_scores import ScoredRolloutTrainer
from .eopd_full import EOPDFullObjective, EOPDFullOptions
from .opd import OPDConfig


@dataclass
class EOPDRandomOptions(EOPDFullOptions):
    """Options of the random variant (App. E)."""

    forward_kl_random_ratio: float = option(0.2, "Fraction of tokens to which forward KL is added.", POSITIVE_FRACTION)


@dataclass
class EOPDRandomConfig(EOPDRandomOptions, OPDConfig):
    """Clipped reverse KL, plus forward KL on random tokens."""

    method = "eopd-random"
    paper = "EOPD Table 6"


@dataclass
class EOPDRandomObjective(EOPDRandomOptions, EOPDFullObjective):
    """Eq. 9 with a random choice of tokens instead of the entropy condition."""

    def forward_kl_mask(self, scores: PolicyScores) -> Tensor:
        """`[N]` bool, true for random tokens. All steps that train on a rollout use the same tokens."""
        return scores.random_uniform < self.forward_kl_random_ratio


class EOPDRandomTrainer(ScoredRolloutTrainer):
    """EOPD with forward KL on random tokens. Arguments: see `TokenSelectiveTrainer`."""

    config_class = EOPDRandomConfig
    objective_class = EOPDRandomObjective
