"""GKD: generalised JSD on all tokens of the student's own completions (Agarwal et al. 2024, arXiv 2306.13649)."""

from dataclasses import dataclass

from ..config.options import FRACTION, option
from ..losses import Divergence, jsd
from ..trainer.trainer import TokenSelectiveTrainer
from .defaults import TOP_P_UNSUPPORTED, TSDKDDefaults
from .divergence import DivergenceObjective


@dataclass
class GKDOptions:
    """Options of GKD; beta is the one that TSD-KD's tables compare with."""

    beta: float = option(0.9, "Interpolates between forward (0) and reverse (1) KL.", FRACTION)


@dataclass
class GKDConfig(GKDOptions, TSDKDDefaults):
    """Generalised JSD on all tokens of the student's own completions."""

    method = "gkd"
    paper = "Agarwal et al. 2024, arXiv 2306.13649"
    has_jsd = True
    unsupported_options = TOP_P_UNSUPPORTED


@dataclass
class GKDObjective(GKDOptions, DivergenceObjective):
    """TSD-KD Eq. 2: a mean over a response, and over completions."""

    unit = "completions"
    term_name = "jsd"

    @property
    def divergence(self) -> Divergence:
        """Generalised JSD."""
        return jsd(self.beta)


class GKDTrainer(TokenSelectiveTrainer):
    """Arguments: see `TokenSelectiveTrainer`."""

    config_class = GKDConfig
    objective_class = GKDObjective
