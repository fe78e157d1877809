"""EOPD: clipped reverse KL, plus top-k forward KL where the teacher is uncertain (Eq. 9); mean over tokens."""

from dataclasses import dataclass

from torch import Tensor

from ..config.options import NON_NEGATIVE, option
from ..objective import PolicyScores
from ..trainer.rollout_scores import ScoredRolloutTrainer
from .eopd_full import EOPDFullObjective, EOPDFullOptions
from .opd import OPDConfig


@dataclass
class EOPDOptions(EOPDFullOptions):
    """Options of EOPD (Sec. 5.1)."""

    entropy_threshold: float = option(0.8, "Teacher entropy, in nats, above which forward KL is added.", NON_NEGATIVE)


@dataclass
class EOPDConfig(EOPDOptions, OPDConfig):
    """Clipped reverse KL, plus forward KL on tokens where the teacher is uncertain."""

    method = "eopd"
    paper = "Jin et al. 2026, arXiv 2603.07079"


@dataclass
class EOPDObjective(EOPDOptions, EOPDFullObjective):
    """Eq. 9."""

    @property
    def uncertainty_threshold(self) -> float:  # type: ignore[override]
        """Teacher entropy above which the log counts a token as uncertain, nats."""
        return self.entropy_threshold

    def forward_kl_mask(self, scores: PolicyScores) -> Tensor:
        """`[N]` bool, true where the teacher's entropy is strictly above the threshold."""
        return scores.teacher_entropy > self.entropy_threshold


class EOPDTrainer(ScoredRolloutTrainer):
    """Entropy-aware on-policy distillation (arXiv 2603.07079). Arguments: see `TokenSelectiveTrainer`.

    Example:
        >>> trainer = EOPDTrainer(
        ...     model="Qwen/Qwen3-0.6B-Base",
        ...     teacher_model="Qwen/Qwen3-8B",
        ...     args=EOPDConfig(output_dir="student", chat_template_source="teacher"),
        ...     train_dataset=load_dataset("json", data_files="prompts.jsonl", split="train"),
        ... )
        >>> trainer.train()
    """

    config_class = EOPDConfig
    objective_class = EOPDObjective
