"""The trainers of the two papers; the modules beside have those of methods with rollouts of their own."""

from ..methods import EOPDConfig, TSDKDConfig
from ..trainer import TokenSelectiveTrainer
from .policy import PolicyTrainer


class TSDKDTrainer(TokenSelectiveTrainer):
    """Token-selective dual knowledge distillation (ICLR 2026). Arguments: see `TokenSelectiveTrainer`.

    Example:
        >>> trainer = TSDKDTrainer(
        ...     model="Qwen/Qwen2.5-1.5B-Instruct",
        ...     teacher_model="Qwen/Qwen2.5-14B-Instruct",
        ...     args=TSDKDConfig(output_dir="student"),
        ...     train_dataset=load_dataset("json", data_files="prompts.jsonl", split="train"),
        ... )
        >>> trainer.train()
    """

    config_class = TSDKDConfig


class EOPDTrainer(PolicyTrainer):
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
