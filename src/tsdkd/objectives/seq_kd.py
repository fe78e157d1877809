"""Sequence-level KD: cross-entropy on the teacher's completions (Kim and Rush 2016, arXiv 1606.07947)."""

from dataclasses import dataclass

from ..statistics import Head, OwnTokenLoss, Request
from . import Objective, ObjectiveOutput, Responses, common_metrics


@dataclass
class SeqKDObjective(Objective):
    """A mean over tokens. The teacher has spoken already: `tsdkd generate` wrote the data."""

    asks_teacher = False

    def __call__(self, head: Head, responses: Responses) -> ObjectiveOutput:
        """See `Objective`."""
        assert responses.ids is not None
        own = OwnTokenLoss({"cross_entropy": 1.0}, lambda tokens, rows: {"cross_entropy": -tokens.logps[:, 0]})
        tokens = head(Request(entropy=True, ids=responses.ids.unsqueeze(-1)), own)
        return ObjectiveOutput(tokens.own_loss, tokens.own_terms, own.weights, common_metrics(tokens, responses))
