"""GRPO: reinforcement by right answers, on TRL's trainer (Shao et al. 2024, arXiv 2402.03300)."""

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
    """Reinforcement by right answers, compared within a group of completions: TRL's trainer, no teacher."""

    method = "grpo"
    completions_source = "the student's, num_generations for each prompt; rows have an answer or a solution"
    paper = "Shao et al. 2024, arXiv 2402.03300; EOPD Table 8"
    has_lmbda = False
    has_teacher = False
    loads_teacher = False
    unsupported_options = {
        **BETA_UNSUPPORTED,
        "lmbda": "the method always samples",
        "completion_column": "the reward looks at the answer",
        "max_length": "TRL's trainer bounds completions only; set max_completion_length",
        "chat_template_source": "there is no teacher whose template could be taken",
        **dict.fromkeys(("fused_head", "head_chunk_gib", "log_term_gradients"), "TRL's trainer computes the loss"),
        **dict.fromkeys(
            ("record_steps", "max_nonfinite_steps", "vllm_request_timeout", "vllm_check_every"),
            "TRL's trainer has none",
        ),
        **dict.fromkeys(
            ("teacher_model_name_or_path", "teacher_model_init_kwargs", "teacher_placement"), "there is no teacher"
        ),
    }

    learning_rate: float = option(3e-6)
    max_completion_length: int = option(4096)
    max_length: int | None = option(None)
    num_generations: int = option(
        8,
        "Completions for each prompt; the mini-batch counts completions.",
        (lambda v: v >= 2, "must be at least 2"),
    )
    epsilon: float = option(0.2, "PPO's clip.", OPEN_FRACTION)
    rollout_batch_size: int = option(128, "Prompts in one rollout, over all processes.", AT_LEAST_ONE)


class GRPOTrainer:
    """Group relative policy optimization (arXiv 2402.03300), by TRL's trainer.

    Makes a `tsdkd.methods.grpo_trainer.GRPOTrainer`, which is imported when it is needed: TRL's trainer imports vLLM
    wherever that is installed, which takes seconds.

    Args:
        model: the student: path, hub id or loaded model.
        teacher_model: ignored; accepted so that all trainers are built alike.
        args: the configuration.
        others: as in `tsdkd.methods.grpo_trainer.GRPOTrainer`.
    """

    config_class = GRPOConfig

    def __new__(
        cls, model: str | PreTrainedModel, teacher_model: Any = None, args: GRPOConfig | None = None, **others: Any
    ) -> Any:
        args = args or GRPOConfig(f"{Path(get_model_id(model)).name}-grpo")
        require_config(args, GRPOConfig, cls.__name__)
        from .grpo_trainer import GRPOTrainer

        return GRPOTrainer(model, args, **others)
