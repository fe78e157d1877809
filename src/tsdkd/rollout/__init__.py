"""Completions for prompts. Seeded by (seed, step, prompt index), so that neither the ambient RNG nor the way a batch
is split over micro-batches and processes changes what is sampled."""

from dataclasses import dataclass

import torch


@dataclass
class Completion:
    """One sampled completion.

    Attributes:
        ids: the sampled tokens, the stop token included if there is one, nothing after it.
        stopped: whether it ends in a stop token; otherwise it was cut at its limit.
    """

    ids: list[int]
    stopped: bool


def prompt_generator(seed: int, step: int, index: int, stream: int = 0) -> torch.Generator:
    """A CPU generator for one prompt in one step. `stream` keeps uses apart (0 sampling, 1 placement, 2 the coin)."""
    key = 0
    for part in (seed, step, index, stream):
        # SplitMix64: neighbouring keys must not give related Mersenne Twister states
        key = (key + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        key ^= key >> 31
    return torch.Generator().manual_seed(key & 0x7FFFFFFFFFFFFFFF)
