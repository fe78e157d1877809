"""Completions that student and teacher write together, token by token.

Both models advance in lockstep. Speculative KD's paper lets the student draft several tokens before the teacher looks
at them: that changes the speed, not what is sampled, as everything after a replaced token is thrown away.
"""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from .base import Completion, SamplingConfig, SeedKey, TokenChoice
from .hf import HuggingFaceSampler, sample_from_models
from .seeding import RandomStream, prompt_generator

_STREAMS = (RandomStream.SAMPLING, RandomStream.CORRECTION)  # of the numbers that a token takes


class MixedSampler(HuggingFaceSampler):
    """Student and teacher as transformers models in this process.

    Args:
        accelerator: knows the student's wrappers.
        sampling: where completions stop, and which ids are sampled; temperature and nucleus are the choice's.
        teacher: whole on this device, not sharded.
        choose: each token, from the student's and the teacher's logits and two uniform numbers.
    """

    def __init__(
        self, accelerator: Accelerator, sampling: SamplingConfig, teacher: nn.Module, choose: TokenChoice
    ) -> None:
        super().__init__(accelerator, sampling)
        self.teacher, self.choose = accelerator.unwrap_model(teacher), choose

    def _sample(
        self,
        student: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        seed_keys: Sequence[SeedKey],
    ) -> list[Completion]:
        generators: list[list[torch.Generator]] = [
            [prompt_generator(*key, stream) for stream in _STREAMS] for key in seed_keys
        ]
        return sample_from_models(
            [student, self.teacher],
            prompts,
            limits,
            generators,
            self.choose,
            stop_token_ids=self.sampling.stop_token_ids,
            vocab_size=self.sampling.vocab_size,
        )
