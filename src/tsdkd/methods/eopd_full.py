"""Clipped reverse KL plus top-k forward KL on *all* tokens: the "full" variant of EOPD's Table 6."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.options import AT_LEAST_ONE, option
from ..lm_head.statistics import TokenStatistics
from ..losses import forward_kl_on
from ..objective import CompletionBatch, PolicyScores
from ..trainer.rollout_scores import ScoredRolloutTrainer
from .opd import OPDConfig, OPDObjective, OPDOptions


@dataclass
class EOPDFullOptions(OPDOptions):
    """Options of the forward KL term."""

    forward_kl_top_k: int = option(16, "Number of top teacher tokens used for forward KL.", AT_LEAST_ONE)


@dataclass
class EOPDFullConfig(EOPDFullOptions, OPDConfig):
    """Clipped reverse KL, plus forward KL on all tokens."""

    method = "eopd-full"
    paper = "EOPD Table 6"


@dataclass
class EOPDFullObjective(EOPDFullOptions, OPDObjective):
    """Eq. 9 without the entropy condition."""

    @property
    def teacher_top_k(self) -> int:  # type: ignore[override]
        """Number of the teacher's most probable tokens to keep."""
        return self.forward_kl_top_k

    @property
    def term_weights(self) -> dict[str, float]:
        """See `Objective`."""
        return {**super().term_weights, "forward_kl": 1.0}

    def per_token_terms(
        self, completions: CompletionBatch, statistics: TokenStatistics, rows: slice
    ) -> dict[str, Tensor]:
        """See `Objective`."""
        scores = completions.scores.select(rows)
        forward_kl = forward_kl_on(statistics.logps[:, 1:], scores.teacher_topk_logps) * self.forward_kl_mask(scores)
        return {**super().per_token_terms(completions, statistics, rows), "forward_kl": forward_kl}

    def forward_kl_mask(self, scores: PolicyScores) -> Tensor:
        """`[N]` bool, true where forward KL is added."""
        return torch.ones_like(scores.teacher_entropy, dtype=torch.bool)


class EOPDFullTrainer(ScoredRolloutTrainer):
    """EOPD with forward KL on all tokens. Arguments: see `TokenSelectiveTrainer`."""

    config_class = EOPDFullConfig
    objective_class = EOPDFullObjective
