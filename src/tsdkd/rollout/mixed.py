"""Samples completions from student and teacher together, token by token.

Both models process every token. In the speculative KD paper, the student drafts several tokens before the teacher
checks them. This affects only speed, not the samples, because all tokens after a replaced one are discarded.
"""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from .base import Completion, SamplingConfig, SeedKey, TokenChoice
from .hf import HuggingFaceSampler, sample_from_models
from .seeding import RandomStream, prompt_generator

_STREAMS = (RandomStream.SAMPLING, RandomStream.CORRECTION)  # one per uniform number of a token


class MixedSampler(HuggingFaceSampler):
    """Samples from student and teacher, both transformers models in this process.

    Args:
        accelerator: unwraps the student.
        sampling: stop tokens and vocabulary size; `choose` applies temperature and top-p.
        teacher: the teacher, unsharded on this device.
        choose: chooses each token from the logits of student and teacher and two uniform numbers.
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
