"""The `Sampler` interface: generates completions for prompts with any engine.

Each completion is seeded by (seed, step, prompt index), so that neither the ambient generators nor the way a batch is
split over micro-batches and processes changes what is sampled. `tsdkd.rollout.build` chooses the sampler
of a run.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

SeedKey = tuple[int, int, int]
"""(seed, step, prompt index)."""

TokenChoice = Callable[[list[Tensor], Tensor], Tensor]
"""Chooses the next token of each row of a batch.

Its arguments: each model's logits, float32 `[B, V]`, and uniform numbers in [0, 1), float64 `[B, numbers]`
(without generators there are none of them, `[B, 0]`). It returns ids `[B]`.
"""


@dataclass
class Completion:
    """One sampled completion.

    Attributes:
        ids: the sampled tokens, the stop token included if there is one, nothing after it.
        stopped: whether it ends in a stop token; otherwise it was cut at its limit.
        logps: the tokens' log-probabilities under the engine that sampled them, temperature applied, nats; None where
            the student itself sampled.
    """

    ids: list[int]
    stopped: bool
    logps: list[float] | None = None


@dataclass(frozen=True)
class SamplingConfig:
    """Sampling parameters of all completions of a run.

    Attributes:
        stop_token_ids: tokens that end a completion.
        vocab_size: only ids below it are sampled (the ids that student and teacher share).
        temperature: divides the logits.
        top_p: nucleus mass.
    """

    stop_token_ids: frozenset[int]
    vocab_size: int
    temperature: float = 1.0
    top_p: float = 1.0


class Sampler(Protocol):
    """Samples completions: the student itself, or an engine that holds a copy of its weights. All processes call it.

    Attributes:
        needs_weight_check: whether the next completions' log-probabilities are to be compared with the student's.
    """

    needs_weight_check: bool

    def update(self, weights_version: Hashable) -> bool:
        """Copy the student's weights, unless the last copy was of the same version.

        Args:
            weights_version: differs whenever the weights do.

        Returns:
            Whether weights were copied.
        """
        ...

    def generate(
        self, model: Any, prompts: Sequence[Sequence[int]], limits: Sequence[int], seed_keys: Sequence[SeedKey]
    ) -> list[Completion]:
        """Sample one completion for each prompt, in their order.

        Args:
            model: the student, as it is wrapped for training.
            prompts: token ids, none empty, of any lengths.
            limits: each completion's maximum length, tokens, at least 1.
            seed_keys: what seeds each completion.
        """
        ...
