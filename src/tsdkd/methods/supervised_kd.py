"""Supervised KD: forward KL on all tokens of fixed completions (Hinton et al. 2015, arXiv 1503.02531)."""

from dataclasses import dataclass

from ..config.options import option
from ..losses import FORWARD_KL, Divergence
from ..trainer.trainer import TokenSelectiveTrainer
from .defaults import OFF_POLICY_UNSUPPORTED, TSDKDDefaults
from .divergence import DivergenceObjective


@dataclass
class SupervisedKDConfig(TSDKDDefaults):
    """Forward KL on all tokens of the data set's completions."""

    method = "supervised-kd"
    completions_source = "the data set's"
    paper = "Hinton et al. 2015, arXiv 1503.02531"
    has_lmbda = False
    unsupported_options = OFF_POLICY_UNSUPPORTED

    lmbda: float = option(0.0, "The method never generates.")


@dataclass
class SupervisedKDObjective(DivergenceObjective):
    """Mean forward KL over tokens."""

    term_name = "forward_kl"

    @property
    def divergence(self) -> Divergence:
        """`KL(P||Q)`."""
        return FORWARD_KL


class SupervisedKDTrainer(TokenSelectiveTrainer):
    """Supervised knowledge distillation. Arguments: see `TokenSelectiveTrainer`."""

    config_class = SupervisedKDConfig
    objective_class = SupervisedKDObjective
