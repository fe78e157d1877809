"""GRPO: reinforcement by right answers, on TRL's trainer (Shao et al. 2024, arXiv 2402.03300)."""

from dataclasses import dataclass
from typing import Any

from ..config.base import TokenSelectiveConfig
from ..config.options import AT_LEAST_ONE, OPEN_FRACTION, option
from .defaults import NO_BETA


@dataclass
class GRPOConfig(TokenSelectiveConfig):
    """Reinforcement by right answers, compared within a group of completions: TRL's trainer, no teacher.

    Args:
        num_generations: completions for each prompt; the mini-batch counts completions.
        rollout_batch_size: prompts in one rollout, over all processes.
    """

    method = "grpo"
    completions_source = "the student's, num_generations for each prompt; rows have an answer or a solution"
    paper = "Shao et al. 2024, arXiv 2402.03300; EOPD Table 8"
    unsupported_options = {
        **NO_BETA,
        "lmbda": "the method always samples",
        "completion_column": "the reward looks at the column `answer`",
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
    num_generations: int = option(8, "Completions for each prompt.", (lambda v: v >= 2, "must be at least 2"))
    epsilon: float = option(0.2, "PPO's clip.", OPEN_FRACTION)
    rollout_batch_size: int = option(128, "Prompts in one rollout, over all processes.", AT_LEAST_ONE)


class GRPOTrainer:
    """Makes a `tsdkd.methods.grpo_trainer.GRPOTrainer`. That file is imported when it is needed: TRL's trainer imports
    vLLM, which takes seconds, wherever it is installed."""

    config_class = GRPOConfig

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        from .grpo_trainer import GRPOTrainer

        return GRPOTrainer(*args, **kwargs)
