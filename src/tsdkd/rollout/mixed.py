"""Completions that student and teacher write together, token by token.

Both models advance in lockstep. Speculative KD's paper lets the student draft several tokens before the teacher looks
at them: that changes the speed, not what is sampled, as everything after a replaced token is thrown away.
"""

from collections.abc import Callable, Sequence

from accelerate import Accelerator
from torch import Tensor, nn

from ..config.base import TokenSelectiveConfig
from ..errors import ConfigError
from .base import Completion, Key, SamplingConfig
from .hf import HuggingFaceSampler, sample_from_models
from .seeding import prompt_generator

TokenChoice = Callable[[list[Tensor], Tensor | None], Tensor]
"""As in `sample_together`, of the student's logits and the teacher's."""
CORRECTION_STREAM = 4  # stream of `prompt_generator`


class MixedSampler(HuggingFaceSampler):
    """Student and teacher as transformers models in this process.

    Args:
        accelerator: knows the student's wrappers.
        args: gradient_checkpointing_kwargs, teacher_placement.
        sampling: where completions stop, and which ids are sampled; temperature and nucleus are the choice's.
        teacher: whole on this device.
        choose: each token from both models' logits.

    Raises:
        ConfigError: the teacher is sharded.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        args: TokenSelectiveConfig,
        sampling: SamplingConfig,
        teacher: nn.Module,
        choose: TokenChoice,
    ) -> None:
        super().__init__(accelerator, sampling, args.gradient_checkpointing_kwargs)
        self.teacher, self.choose = accelerator.unwrap_model(teacher), choose
        if any(hasattr(p, "ds_status") for p in teacher.parameters()):
            raise ConfigError(
                [f"teacher_placement: {args.method} samples with the teacher, which must be whole; set replica"]
            )

    def generate(
        self, model: nn.Module, prompts: Sequence[Sequence[int]], limits: Sequence[int], keys: Sequence[Key]
    ) -> list[Completion]:
        """See `Sampler`."""
        was_training = model.training
        model.eval()
        with self._unwrap_for_generation(model) as student:
            completions = sample_from_models(
                [student, self.teacher],
                prompts,
                limits,
                [(prompt_generator(*key), prompt_generator(*key, CORRECTION_STREAM)) for key in keys],
                self.choose,
                stop_ids=self.sampling.stop_ids,
                vocab_size=self.sampling.vocab_size,
            )
        model.train(was_training)
        return completions
