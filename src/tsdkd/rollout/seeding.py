"""Random streams, seeded by (seed, step, prompt index): neither the ambient generators nor the way a batch is split
over micro-batches and processes changes what is sampled."""

import torch


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
