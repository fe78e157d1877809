"""DistiLLM: skew KL on the student's, replayed or fixed completions (Ko et al. 2024, arXiv 2402.03898).

Which completions a step trains on is `tsdkd.trainers.distillm`'s to say.
"""

from dataclasses import dataclass
from typing import Literal

from ..losses import Divergence, skew_forward_kl, skew_reverse_kl
from ..options import INSIDE, option
from .divergence import DivergenceObjective


@dataclass
class DistiLLMOptions:
    """Options of DistiLLM's loss."""

    skew: float = option(0.1, "The smaller share in the mixture: of P for forward KL, of Q for reverse KL.", INSIDE)
    skew_kl: Literal["forward", "reverse"] = option("reverse", "Which of the two skew KL divergences.")


@dataclass
class DistiLLMObjective(DistiLLMOptions, DivergenceObjective):
    """A mean over tokens."""

    term = "skew_kl"

    @property
    def kind(self) -> Divergence:
        """`KL(P || skew P + (1 - skew) Q)` or `KL(Q || (1 - skew) P + skew Q)`."""
        return {"forward": skew_forward_kl, "reverse": skew_reverse_kl}[self.skew_kl](self.skew)
