"""GRPO: reinforcement learning from correct answers, on TRL's trainer (Shao et al. 2024, arXiv 2402.03300)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..config.base import TokenSelectiveConfig, require_config
from ..config.options import AT_LEAST_ONE, OPEN_FRACTION, option
from ..models.loading import get_model_id
from .defaults import BETA_UNSUPPORTED


@dataclass
class GRPOConfig(TokenSelectiveConfig):
    """Reinforcement learning from correct answers with TRL's GRPO trainer; no teacher."""

    method = "grpo"
    completions_source = "the student's, num_generations per prompt; rows need an answer or a solution"
    paper = "Shao et al. 2024, arXiv 2402.03300; EOPD Table 8"
    has_lmbda = False
    has_teacher = False
    loads_teacher = False
    unsupported_options = {
        **BETA_UNSUPPORTED,
        "lmbda": "the method always samples",
        "completion_column": "the reward uses the answer",
        "max_length": "TRL's trainer limits only completions; set max_completion_length",
        "chat_template_source": "the method has no teacher",
        "eval_samples": "TRL's trainer samples num_generations completions per prompt in evaluation, too",
        **dict.fromkeys(
            (
                *("fused_head", "head_chunk_gib", "log_term_gradients", "padding_free"),
                "max_tokens_per_micro_batch",
            ),
            "TRL's trainer computes the loss",
        ),
        **dict.fromkeys(
            (
                *("record_steps", "max_nonfinite_steps", "rollout_ahead", "vllm_request_timeout"),
                "vllm_check_every",
            ),
            "TRL's trainer does not support it",
        ),
        **dict.fromkeys(
            (
                *("teacher_model_name_or_path", "teacher_model_init_kwargs", "teacher_placement"),
                "teacher_chat_template_kwargs",
            ),
            "the method has no teacher",
        ),
    }

    learning_rate: float = option(3e-6)
    max_completion_length: int = option(4096)
    max_length: int | None = option(None)
    num_generations: int = option(
        8, "Completions per prompt. Batch sizes count completions.", (lambda v: v >= 2, "must be at least 2")
    )
    epsilon: float = option(0.2, "PPO clipping range.", OPEN_FRACTION)
    rollout_batch_size: int = option(128, "Prompts per rollout, over all processes.", AT_LEAST_ONE)

    def steps_per_rollout(self, processes: int | None = None) -> int:
        """See `TokenSelectiveConfig`. TRL's trainer has its own rules for the batch sizes."""
        return 1


class GRPOTrainer:
    """Group relative policy optimization (arXiv 2402.03300) with TRL's trainer.

    Creates a `tsdkd.methods.grpo_trainer.GRPOTrainer`. That module is imported only when needed, because TRL's
    trainer imports vLLM if it is installed, which takes seconds.

    Args:
        model: the student: path, hub id or loaded model.
        teacher_model: ignored; accepted so that all trainers have the same signature.
        args: the configuration.
        others: see `tsdkd.methods.grpo_trainer.GRPOTrainer`.
    """

    config_class = GRPOConfig

    def __new__(
        cls, model: str | PreTrainedModel, teacher_model: Any = None, args: GRPOConfig | None = None, **others: Any
    ) -> Any:
        args = args or GRPOConfig(f"{Path(get_model_id(model)).name}-grpo")
        require_config(args, GRPOConfig, cls.__name__)
        from .grpo_trainer import GRPOTrainer

        return GRPOTrainer(model, args, **others)
