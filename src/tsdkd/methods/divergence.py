"""Base objective of GKD, DistiLLM and supervised KD: one divergence of the full distributions at every token."""

from typing import ClassVar

from torch import Tensor

from ..lm_head.statistics import StatisticsRequest, TokenStatistics
from ..losses import Divergence
from ..objective import CompletionBatch, Objective


class DivergenceObjective(Objective):
    """Mean of `divergence` over tokens, or over completions of the mean per completion.

    Attributes:
        term_name: name of the loss term in the log.
    """

    term_name: ClassVar[str]

    @property
    def divergence(self) -> Divergence:
        """The divergence between student and teacher."""
        raise NotImplementedError

    @property
    def term_weights(self) -> dict[str, float]:
        """See `Objective`."""
        return {self.term_name: 1.0}

    def request(self, completions: CompletionBatch) -> StatisticsRequest:
        """See `Objective`."""
        return StatisticsRequest(
            entropy=True, teacher_entropy=True, divergence=self.divergence, ids=completions.logged_ids
        )

    def per_token_terms(
        self, completions: CompletionBatch, statistics: TokenStatistics, rows: slice
    ) -> dict[str, Tensor]:
        """See `Objective`."""
        divergence = statistics.divergence
        if self.unit == "completions":
            divergence = completions.token_weights[rows].to(divergence) * divergence
        return {self.term_name: divergence}
