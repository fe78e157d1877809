"""Clipped reverse KL plus top-k forward KL on random tokens: the control of EOPD's Table 6."""

from dataclasses import dataclass

from torch import Tensor

from ..config.options import POSITIVE_FRACTION, option
from ..objective import PolicyScores
from ..trainer.rollout_scores import ScoredRolloutTrainer
from .eopd_full import EOPDFullObjective, EOPDFullOptions
from .opd import OPDConfig


@dataclass
class EOPDRandomOptions(EOPDFullOptions):
    """Options of the random placement (App. E)."""

    forward_kl_random_ratio: float = option(0.2, "Share of the tokens on which forward KL acts.", POSITIVE_FRACTION)


@dataclass
class EOPDRandomConfig(EOPDRandomOptions, OPDConfig):
    """Clipped reverse KL, and forward KL on random tokens."""

    method = "eopd-random"
    paper = "EOPD Table 6"


@dataclass
class EOPDRandomObjective(EOPDRandomOptions, EOPDFullObjective):
    """Eq. 9 with a random trigger."""

    def forward_kl_mask(self, scores: PolicyScores) -> Tensor:
        """Random tokens. A token's choice is the same in every step that trains on its rollout."""
        return scores.random_uniform < self.forward_kl_random_ratio


class EOPDRandomTrainer(ScoredRolloutTrainer):
    """Arguments: see `TokenSelectiveTrainer`."""

    config_class = EOPDRandomConfig
    objective_class = EOPDRandomObjective
