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
    """The sampler of a run: student and teacher together, a vLLM engine, or the student itself.

    Args:
        student: unwrapped.
        accelerator: knows the wrappers and the processes.
        args: `use_vllm` and the `vllm_…` fields, `temperature`, `top_p`, `max_length`.
        pair: tokenizers, shared vocabulary and context length.
        stop_token_ids: tokens that end a completion.
        mixed_with: for a method whose completions student and teacher write together: the teacher, whole on this
            device, and how each token is chosen. Temperature and nucleus are the choice's.

    Raises:
        ConfigError: the teacher must be whole, but it is sharded.
        EngineError: vLLM's engine can't start.
    """
    ids = frozenset(stop_token_ids)
    if mixed_with is not None:
        if any(hasattr(p, "ds_status") for p in mixed_with[0].parameters()):
            raise ConfigError(
                [f"teacher_placement: {args.method} samples with the teacher, which must be whole; set replica"]
            )
        return MixedSampler(accelerator, SamplingConfig(ids, pair.shared_vocab_size), *mixed_with)
    sampling = SamplingConfig(ids, pair.shared_vocab_size, args.temperature, args.top_p)
    if args.use_vllm:
        from .vllm.sampler import VLLMSampler  # vLLM is an extra

        longest = max_sequence_length(args, pair.context_length)
        return VLLMSampler(student, accelerator, args, sampling, pair.tokenizer, longest)
    return HuggingFaceSampler(accelerator, sampling)
