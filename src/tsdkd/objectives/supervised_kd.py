"""Supervised KD: forward KL on all tokens of fixed completions (Hinton et al. 2015, arXiv 1503.02531)."""

from dataclasses import dataclass

from ..losses import FORWARD_KL, Divergence
from .divergence import DivergenceObjective


@dataclass
class SupervisedKDObjective(DivergenceObjective):
    """A mean over tokens."""

    term = "forward_kl"

    @property
    def kind(self) -> Divergence:
        """`KL(P||Q)`."""
        return FORWARD_KL
