"""Options and defaults shared by several methods."""

from dataclasses import dataclass

from ..config.base import TokenSelectiveConfig
from ..config.options import AT_LEAST_ONE, option
from ..errors import ConfigError

BETA_UNSUPPORTED = TokenSelectiveConfig.unsupported_options
TOP_P_UNSUPPORTED = {"top_p": "the loss is defined on the full distribution that completions are sampled from"}
NUM_GENERATIONS_UNSUPPORTED = dict.fromkeys(
    ("num_generations", "eval_samples"), "the method trains on completions in the data set, and evaluates on them"
)
OFF_POLICY_UNSUPPORTED = {
    **BETA_UNSUPPORTED,
    **NUM_GENERATIONS_UNSUPPORTED,
    "lmbda": "the method trains on completions in the data set; `tsdkd generate` can write them",
}
SELF_SAMPLING_UNSUPPORTED = {
    **BETA_UNSUPPORTED,
    **TOP_P_UNSUPPORTED,
    **dict.fromkeys(("lmbda", "rollout_ahead"), "the method decides which completions each step trains on"),
}
TEACHER_SAMPLES_UNSUPPORTED = {
    "use_vllm": "the teacher helps to choose every token, but the vLLM engine holds only the student",
    "teacher_chat_template_kwargs": "student and teacher sample together, from one prompt",
    "eval_samples": "in evaluations, too, the teacher helps to choose every token",
}


@dataclass
class TSDKDDefaults(TokenSelectiveConfig):
    """Defaults shared by all runs in TSD-KD's tables (Table 10)."""

    warmup_steps: float = option(0.1, "Number of warmup steps, or a fraction of all steps if below 1.")


@dataclass
class RolloutConfig(TokenSelectiveConfig):
    """Options of methods that train on each rollout for several optimizer steps."""

    rollout_batch_size: int = option(
        128,
        "Prompts per rollout, over all processes. "
        "Each optimizer step uses per-device batch x accumulation x processes / num_generations of them.",
        AT_LEAST_ONE,
    )

    def steps_per_rollout(self, processes: int | None = None) -> int:
        """See `TokenSelectiveConfig`. Raises `ConfigError` if it is not a whole number."""
        super().steps_per_rollout(processes)
        prompts = self.global_batch_size(processes) // self.num_generations
        if self.rollout_batch_size % prompts:
            raise ConfigError(
                [
                    f"rollout_batch_size: must be a multiple of the mini-batch, found {self.rollout_batch_size}; the "
                    f"mini-batch is {prompts} prompts: {self._describe_global_batch(processes)}, num_generations is "
                    f"{self.num_generations}"
                ]
            )
        return self.rollout_batch_size // prompts
