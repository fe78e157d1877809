"""Chooses and builds the sampler of a run."""

from collections.abc import Collection

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from ..config.base import TokenSelectiveConfig
from ..data import max_sequence_length
from ..errors import ConfigError
from ..models.loading import ModelPair
from .base import Sampler, SamplingConfig, TokenChoice
from .hf import HuggingFaceSampler
from .mixed import MixedSampler


def make_sampler(
    student: PreTrainedModel,
    accelerator: Accelerator,
    args: TokenSelectiveConfig,
    pair: ModelPair,
    stop_token_ids: Collection[int],
    mixed_with: tuple[nn.Module, TokenChoice] | None = None,
) -> Sampler:
    """Create the sampler of a run: student and teacher together, a vLLM engine, or the student alone.

    Args:
        student: the student, unwrapped.
        accelerator: the run's accelerator.
        args: `use_vllm` and the `vllm_…` fields, `temperature`, `top_p`, `max_length`.
        pair: tokenizers, shared vocabulary and context length.
        stop_token_ids: tokens that end a completion.
        mixed_with: for methods that sample from student and teacher together: the teacher, unsharded on this device,
            and the function that chooses each token and applies temperature and top-p.

    Raises:
        ConfigError: the teacher is sharded, but must be on every device.
        EngineError: vLLM's engine can't start.
    """
    ids = frozenset(stop_token_ids)
    if mixed_with is not None:
        if any(hasattr(p, "ds_status") for p in mixed_with[0].parameters()):
            raise ConfigError([f"teacher_placement: must be replica, because {args.method} samples with the teacher"])
        return MixedSampler(accelerator, SamplingConfig(ids, pair.shared_vocab_size), *mixed_with)
    sampling = SamplingConfig(ids, pair.shared_vocab_size, args.temperature, args.top_p)
    if args.use_vllm:
        from .vllm.sampler import VLLMSampler  # vLLM is an extra

        longest = max_sequence_length(args, pair.context_length)
        return VLLMSampler(student, accelerator, args, sampling, pair.tokenizer, longest)
    return HuggingFaceSampler(accelerator, sampling)
