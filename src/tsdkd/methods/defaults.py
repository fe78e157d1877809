"""Options and defaults shared by several methods."""

from dataclasses import dataclass

from ..config.base import TokenSelectiveConfig
from ..config.options import AT_LEAST_ONE, option
from ..errors import ConfigError

BETA_UNSUPPORTED = TokenSelectiveConfig.unsupported_options
TOP_P_UNSUPPORTED = {"top_p": "the loss is defined on the full distribution that completions are sampled from"}
OFF_POLICY_UNSUPPORTED = {
    **BETA_UNSUPPORTED,
    "lmbda": "the method trains on completions in the data set; `tsdkd generate` can write them",
}
SELF_SAMPLING_UNSUPPORTED = {
    **BETA_UNSUPPORTED,
    **TOP_P_UNSUPPORTED,
    "lmbda": "the method decides which completions each step trains on",
}
VLLM_UNSUPPORTED = {"use_vllm": "the teacher helps to choose every token, but the vLLM engine holds only the student"}


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
        "Each optimizer step uses per-device batch x accumulation x processes of them.",
        AT_LEAST_ONE,
    )

    def steps_per_rollout(self, processes: int | None = None) -> int:
        """Number of optimizer steps per rollout. Raises `ConfigError` if it is not a whole number."""
        processes = processes or self.world_size
        size = self.per_device_train_batch_size * self.gradient_accumulation_steps * processes
        if self.rollout_batch_size % size:
            raise ConfigError(
                [
                    f"rollout_batch_size: must be a multiple of the mini-batch, found {self.rollout_batch_size}; the "
                    f"mini-batch is {self.per_device_train_batch_size} (per_device_train_batch_size) x "
                    f"{self.gradient_accumulation_steps} (gradient_accumulation_steps) x {processes} (processes)"
                    f" = {size}"
                ]
            )
        return self.rollout_batch_size // size
