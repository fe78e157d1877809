"""The `Sampler` interface, which generates completions for prompts with any engine.

Each completion is seeded by (seed, step, prompt index). Neither the global random generators nor the split of a batch
over micro-batches and processes affects the samples. `tsdkd.rollout.build` chooses the sampler of a run.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

SeedKey = tuple[int, int, int]
"""(seed, step, prompt index)."""

TokenChoice = Callable[[list[Tensor], Tensor], Tensor]
"""Chooses the next token of each row of a batch.

Arguments: the logits of each model, float32 `[B, V]`, and uniform numbers in [0, 1), float64 `[B, numbers]` (`[B, 0]`
without generators). Returns ids `[B]`.
"""


@dataclass
class Completion:
    """One sampled completion.

    Attributes:
        ids: the sampled tokens, up to and including the stop token if there is one.
        stopped: whether it ends with a stop token; otherwise it was cut off at its limit.
        logps: log-probabilities of the tokens under the engine that sampled them, temperature applied, nats; None if
            the student itself sampled them.
    """

    ids: list[int]
    stopped: bool
    logps: list[float] | None = None


@dataclass(frozen=True)
class SamplingConfig:
    """Sampling parameters of all completions of a run.

    Attributes:
        stop_token_ids: tokens that end a completion.
        vocab_size: only ids below this value are sampled (the ids shared by student and teacher).
        temperature: divides the logits.
        top_p: probability mass of the nucleus.
    """

    stop_token_ids: frozenset[int]
    vocab_size: int
    temperature: float = 1.0
    top_p: float = 1.0


class Sampler(Protocol):
    """Samples completions with the student itself or with an engine that has a copy of its weights.

    All processes must call its methods.

    Attributes:
        needs_weight_check: whether to compare the log-probabilities of the next completions with the student's.
    """

    needs_weight_check: bool

    def update(self, weights_version: Hashable) -> bool:
        """Copy the student's weights unless the last copy has the same version.

        Args:
            weights_version: changes whenever the weights change.

        Returns:
            Whether weights were copied.
        """
        ...

    def generate(
        self, model: Any, prompts: Sequence[Sequence[int]], limits: Sequence[int], seed_keys: Sequence[SeedKey]
    ) -> list[Completion]:
        """Sample one completion for each prompt, in the same order.

        Args:
            model: the student, wrapped for training.
            prompts: token ids, non-empty, of any lengths.
            limits: maximum length of each completion, tokens, at least 1.
            seed_keys: the seed key of each completion.
        """
        ...
