"""GKD: generalized JSD on all tokens of the student's completions (Agarwal et al. 2024, arXiv 2306.13649)."""

from dataclasses import dataclass

from ..config.options import FRACTION, option
from ..losses import Divergence, jsd
from ..trainer.trainer import TokenSelectiveTrainer
from .defaults import TOP_P_UNSUPPORTED, TSDKDDefaults
from .divergence import DivergenceObjective


@dataclass
class GKDOptions:
    """Options of GKD; the default beta is that of the baseline in TSD-KD's tables."""

    beta: float = option(0.9, "Interpolates the JSD between forward (0) and reverse (1) KL.", FRACTION)


@dataclass
class GKDConfig(GKDOptions, TSDKDDefaults):
    """Generalized JSD on all tokens of the student's completions."""

    method = "gkd"
    paper = "Agarwal et al. 2024, arXiv 2306.13649"
    has_jsd = True
    unsupported_options = TOP_P_UNSUPPORTED


@dataclass
class GKDObjective(GKDOptions, DivergenceObjective):
    """TSD-KD Eq. 2: mean over the tokens of each completion, then over completions."""

    unit = "completions"
    term_name = "jsd"

    @property
    def divergence(self) -> Divergence:
        """Generalized JSD."""
        return jsd(self.beta)


class GKDTrainer(TokenSelectiveTrainer):
    """Generalized knowledge distillation (arXiv 2306.13649). Arguments: see `TokenSelectiveTrainer`."""

    config_class = GKDConfig
    objective_class = GKDObjective
