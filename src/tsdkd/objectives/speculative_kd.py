"""Speculative KD: forward KL on what student and teacher wrote together (Xu et al. 2025, arXiv 2410.11325).

How they write is `tsdkd.rollout.together`'s to say.
"""

from dataclasses import dataclass

from ..options import AT_LEAST_ONE, POSITIVE, POSITIVE_SHARE, option
from .supervised_kd import SupervisedKDObjective


@dataclass
class SpeculativeKDOptions:
    """Options of the interleaved sampling, as in the paper's public code."""

    accept_top_k: int = option(25, "The student's token stays if it is among so many of the teacher's.", AT_LEAST_ONE)
    draft_temperature: float = option(0.5, "Divides the student's logits when it samples.", POSITIVE)
    draft_top_p: float = option(0.5, "Nucleus mass of the student's tokens.", POSITIVE_SHARE)
    correction_temperature: float = option(0.2, "Divides the teacher's logits when it replaces a token.", POSITIVE)
    correction_top_p: float = option(0.5, "Nucleus mass of the teacher's tokens.", POSITIVE_SHARE)


@dataclass
class SpeculativeKDObjective(SupervisedKDObjective):
    """A mean over responses, as in the paper's public code."""

    unit = "responses"
