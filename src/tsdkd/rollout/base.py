"""Completions for prompts. Seeded by (seed, step, prompt index), so that neither the ambient RNG nor the way a batch
is split over micro-batches and processes changes what is sampled."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Key = tuple[int, int, int]
"""(seed, step, prompt index)."""


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
    """How all completions of a run are drawn.

    Attributes:
        stop_ids: tokens that end a completion.
        vocab_size: only ids below it are sampled (the ids that student and teacher share).
        temperature: divides the logits.
        top_p: nucleus mass.
    """

    stop_ids: frozenset[int]
    vocab_size: int
    temperature: float = 1.0
    top_p: float = 1.0


class Sampler(Protocol):
    """What rolls out: the student itself, or an engine that holds a copy of its weights. All processes call it.

    Attributes:
        needs_weight_check: whether the next completions' log-probabilities are to be compared with the student's.
    """

    needs_weight_check: bool

    def update(self, weights_version: Hashable) -> bool:
        """Take over the student's weights, unless the last ones had the same `weights_version`, a name for them.

        Returns:
            Whether weights were copied.
        """
        ...

    def generate(
        self, model: Any, prompts: Sequence[Sequence[int]], limits: Sequence[int], seed_keys: Sequence[Key]
    ) -> list[Completion]:
        """One completion for each prompt, in their order.

        Args:
            model: the student, as it is wrapped for training.
            prompts: token ids, none empty, of any lengths.
            limits: each completion's maximum length, tokens, at least 1.
            keys: what seeds each completion.
        """
        ...
