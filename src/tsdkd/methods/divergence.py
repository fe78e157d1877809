"""Whole distributions at every token, by one divergence: what GKD, DistiLLM and supervised distillation share."""

from typing import ClassVar

from ..lm_head.statistics import Head, PerTokenLoss, StatisticsRequest
from ..losses import Divergence
from ..objective import CompletionBatch, Objective, ObjectiveOutput, common_metrics


class DivergenceObjective(Objective):
    """A mean of `divergence` over tokens, or over completions of their means; `term_name` is its name in the log."""

    term_name: ClassVar[str]

    @property
    def divergence(self) -> Divergence:
        """Between student and teacher."""
        raise NotImplementedError

    def __call__(self, head: Head, completions: CompletionBatch) -> ObjectiveOutput:
        """See `Objective`."""
        shares = completions.token_weights
        weights = shares if self.unit == "completions" else shares.new_ones(shares.shape)
        own = PerTokenLoss(
            {self.term_name: 1.0}, lambda t, rows: {self.term_name: weights[rows].to(t.divergence) * t.divergence}
        )
        request = StatisticsRequest(
            entropy=True, teacher_entropy=True, divergence=self.divergence, ids=completions.logged_ids
        )
        tokens = head(request, own)
        return ObjectiveOutput(tokens.loss, tokens.loss_terms, own.weights, common_metrics(tokens, completions))
