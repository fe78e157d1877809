"""Samples completions from student and teacher together, token by token.

Both models process every token. In the speculative KD paper, the student drafts several tokens before the teacher
checks them. This affects only speed, not the samples, because all tokens after a replaced one are discarded.
"""

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from .base import SamplingConfig, TokenChoice
from .captured import CapturedStep
from .hf import HuggingFaceSampler
from .seeding import RandomStream
from .step import DecodingStep


class MixedSampler(HuggingFaceSampler):
    """Samples from student and teacher, both transformers models in this process.

    Args:
        accelerator: unwraps the student.
        sampling: stop tokens and vocabulary size; `choose` applies temperature and top-p.
        teacher: the teacher, unsharded on this device.
        choose: chooses each token from the logits of student and teacher and two uniform numbers.
    """

    streams = (RandomStream.SAMPLING, RandomStream.CORRECTION)

    def __init__(
        self, accelerator: Accelerator, sampling: SamplingConfig, teacher: nn.Module, choose: TokenChoice
    ) -> None:
        super().__init__(accelerator, sampling)
        self.teacher, self.choose = accelerator.unwrap_model(teacher), choose

    def _make_step(self, student: PreTrainedModel) -> CapturedStep:
        return CapturedStep(DecodingStep([student, self.teacher], self.choose, self.sampling.vocab_size))
