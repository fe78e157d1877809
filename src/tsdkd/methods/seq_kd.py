"""Sequence-level KD: cross-entropy on the teacher's completions (Kim and Rush 2016, arXiv 1606.07947)."""

from dataclasses import dataclass

from ..config.options import option
from ..lm_head.statistics import Head, PerTokenLoss, StatisticsRequest
from ..objective import CompletionBatch, Objective, ObjectiveOutput, common_metrics
from ..trainer.trainer import TokenSelectiveTrainer
from .defaults import OFF_POLICY, TSDKDDefaults


@dataclass
class SeqKDConfig(TSDKDDefaults):
    """Cross-entropy on the data set's completions, which are the teacher's; it isn't loaded again."""

    method = "seq-kd"
    completions_source = "the data set's"
    paper = "Kim and Rush 2016, arXiv 1606.07947"
    unsupported_options = {
        **OFF_POLICY,
        **dict.fromkeys(("teacher_placement", "record_steps"), "the teacher isn't loaded"),
    }

    lmbda: float = option(0.0, "The method never generates.")


@dataclass
class SeqKDObjective(Objective):
    """A mean over tokens. The teacher has spoken already: `tsdkd generate` wrote the data."""

    needs_teacher_distribution = False

    def __call__(self, head: Head, completions: CompletionBatch) -> ObjectiveOutput:
        """See `Objective`."""
        assert completions.ids is not None
        own = PerTokenLoss({"cross_entropy": 1.0}, lambda tokens, rows: {"cross_entropy": -tokens.logps[:, 0]})
        tokens = head(StatisticsRequest(entropy=True, ids=completions.ids.unsqueeze(-1)), own)
        return ObjectiveOutput(tokens.loss, tokens.loss_terms, own.weights, common_metrics(tokens, completions))


class SeqKDTrainer(TokenSelectiveTrainer):
    """Arguments: see `TokenSelectiveTrainer`."""

    config_class = SeqKDConfig
    objective_class = SeqKDObjective
