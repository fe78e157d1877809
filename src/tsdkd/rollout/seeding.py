"""Random streams, seeded by (seed, step, prompt index): neither the ambient generators nor the way a batch is split
over micro-batches and processes changes what is sampled."""

from enum import IntEnum

import torch


class RandomStream(IntEnum):
    """The uses of random numbers, each independent of the others. The values are part of what a run computes."""

    SAMPLING = 0  # the tokens of a completion
    FORWARD_KL = 1  # which tokens get a forward KL at random
    ON_POLICY = 2  # whether a rollout is the student's
    REPLAY = 3  # which completions are replayed
    CORRECTION = 4  # the teacher's token, where it replaces the student's


def prompt_seed(seed: int, step: int, index: int, stream: RandomStream = RandomStream.SAMPLING) -> int:
    """A seed in [0, 2**63) for one prompt in one step and one use."""
    key = 0
    for part in (seed, step, index, int(stream)):
        # SplitMix64: neighbouring keys must not give related Mersenne Twister states
        key = (key + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        key ^= key >> 31
    return key & 0x7FFFFFFFFFFFFFFF


def prompt_generator(
    seed: int, step: int, index: int, stream: RandomStream = RandomStream.SAMPLING
) -> torch.Generator:
    """A CPU generator seeded by `prompt_seed`."""
    return torch.Generator().manual_seed(prompt_seed(seed, step, index, stream))
