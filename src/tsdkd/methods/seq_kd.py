"""Sequence-level KD: cross-entropy on the teacher's completions (Kim and Rush 2016, arXiv 1606.07947)."""

from dataclasses import dataclass

from torch import Tensor

from ..config.options import option
from ..lm_head.statistics import StatisticsRequest, TokenStatistics
from ..objective import CompletionBatch, Objective
from ..trainer.trainer import TokenSelectiveTrainer
from .defaults import OFF_POLICY_UNSUPPORTED, TSDKDDefaults


@dataclass
class SeqKDConfig(TSDKDDefaults):
    """Cross-entropy on the data set's completions, which the teacher generated; the teacher is not loaded."""

    method = "seq-kd"
    completions_source = "the data set's"
    paper = "Kim and Rush 2016, arXiv 1606.07947"
    has_lmbda = False
    loads_teacher = False
    unsupported_options = {
        **OFF_POLICY_UNSUPPORTED,
        **dict.fromkeys(
            ("teacher_placement", "teacher_chat_template_kwargs", "record_steps"), "the teacher is not loaded"
        ),
    }

    lmbda: float = option(0.0, "The method never generates.")


@dataclass
class SeqKDObjective(Objective):
    """Mean cross-entropy over tokens. The teacher's completions are in the data set, e.g. from `tsdkd generate`."""

    needs_teacher_distribution = False

    @property
    def term_weights(self) -> dict[str, float]:
        """See `Objective`."""
        return {"cross_entropy": 1.0}

    def request(self, completions: CompletionBatch) -> StatisticsRequest:
        """See `Objective`."""
        return StatisticsRequest(entropy=True, ids=completions.ids.unsqueeze(-1))

    def per_token_terms(
        self, completions: CompletionBatch, statistics: TokenStatistics, rows: slice
    ) -> dict[str, Tensor]:
        """See `Objective`."""
        return {"cross_entropy": -statistics.logps[:, 0]}


class SeqKDTrainer(TokenSelectiveTrainer):
    """Sequence-level knowledge distillation. Arguments: see `TokenSelectiveTrainer`."""

    config_class = SeqKDConfig
    objective_class = SeqKDObjective
