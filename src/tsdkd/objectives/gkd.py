"""GKD: generalised JSD on all tokens of the student's own completions (Agarwal et al. 2024, arXiv 2306.13649)."""

from dataclasses import dataclass

from ..losses import Divergence, jsd
from ..options import SHARE, option
from .divergence import DivergenceObjective


@dataclass
class GKDOptions:
    """Options of GKD; beta is the one that TSD-KD's tables compare with."""

    beta: float = option(0.9, "Interpolates between forward (0) and reverse (1) KL.", SHARE)


@dataclass
class GKDObjective(GKDOptions, DivergenceObjective):
    """TSD-KD Eq. 2: a mean over a response, and over responses."""

    unit = "responses"
    term = "jsd"

    @property
    def kind(self) -> Divergence:
        """Generalised JSD."""
        return jsd(self.beta)
