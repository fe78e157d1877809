"""On-policy distillation with advantage shaping (Cheng et al. 2025; EOPD's Table 4 and Eq. 11)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..options import POSITIVE, option
from ..statistics import TokenStatistics
from . import Answers
from .opd import OPDObjective, OPDOptions

_KAPPA = 2.0


@dataclass
class OPDAdvantageShapingOptions(OPDOptions):
    """Options of the shaping function (EOPD App. A); kappa is 2."""

    advantage_shaping: float = option(0.1, "Alpha of advantage shaping.", POSITIVE)


@dataclass
class OPDAdvantageShapingObjective(OPDAdvantageShapingOptions, OPDObjective):
    """Uncertain tokens are favoured, without turning an advantage's sign."""

    def advantages(self, tokens: TokenStatistics, answers: Answers) -> Tensor:
        """Eq. 11."""
        advantages = super().advantages(tokens, answers)
        return advantages + torch.minimum(self.advantage_shaping * tokens.entropy.detach(), advantages.abs() / _KAPPA)
