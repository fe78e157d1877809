"""Options and defaults that several methods share."""

from dataclasses import dataclass

from ..config.base import TokenSelectiveConfig
from ..config.options import AT_LEAST_ONE, option
from ..errors import ConfigError

BETA_UNSUPPORTED = TokenSelectiveConfig.unsupported_options
TOP_P_UNSUPPORTED = {"top_p": "the loss is of the distribution that is sampled from, the whole one"}
OFF_POLICY_UNSUPPORTED = {
    **BETA_UNSUPPORTED,
    "lmbda": "the method trains on the data set's completions; `tsdkd generate` writes them",
}
SELF_SAMPLING_UNSUPPORTED = {
    **BETA_UNSUPPORTED,
    **TOP_P_UNSUPPORTED,
    "lmbda": "the method says by itself which completions a step trains on",
}
VLLM_UNSUPPORTED = {"use_vllm": "the teacher takes part in every token, and an engine holds the student only"}


@dataclass
class TSDKDDefaults(TokenSelectiveConfig):
    """The defaults that the runs in TSD-KD's tables share (Table 10)."""

    warmup_steps: float = option(0.1, "Warmup steps; below 1 a share of all steps.")


@dataclass
class RolloutConfig(TokenSelectiveConfig):
    """One rollout for several steps."""

    rollout_batch_size: int = option(
        128,
        "Prompts in one rollout, over all processes. "
        "Each optimizer step takes per-device batch x accumulation x processes of them.",
        AT_LEAST_ONE,
    )

    def steps_per_rollout(self, processes: int | None = None) -> int:
        """Optimizer steps that one rollout serves. Raises `ConfigError` where they aren't whole."""
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
