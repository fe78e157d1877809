"""EOPD: clipped reverse KL, plus top-k forward KL where the teacher is uncertain (Eq. 9), a mean over tokens."""

from dataclasses import dataclass

from torch import Tensor

from ..options import NOT_NEGATIVE, option
from . import Answers
from .eopd_full import EOPDFullObjective, EOPDFullOptions


@dataclass
class EOPDOptions(EOPDFullOptions):
    """Options of EOPD (Sec. 5.1)."""

    entropy_threshold: float = option(0.8, "Teacher entropy above which forward KL acts, nats.", NOT_NEGATIVE)


@dataclass
class EOPDObjective(EOPDOptions, EOPDFullObjective):
    """Eq. 9."""

    @property
    def uncertain_above(self) -> float:  # type: ignore[override]
        """What the log calls uncertain."""
        return self.entropy_threshold

    def placement(self, answers: Answers) -> Tensor:
        """Strictly above the threshold."""
        return answers.teacher_entropy > self.entropy_threshold
