"""Random streams, seeded by (seed, step, prompt index).

Neither the global generators nor the split of a batch over micro-batches and processes affects the samples.
"""

from enum import IntEnum

import torch


class RandomStream(IntEnum):
    """Independent random streams, one for each purpose. Changing a value changes the results of runs."""

    SAMPLING = 0  # the tokens of a completion
    FORWARD_KL = 1  # which random tokens get forward KL
    ON_POLICY = 2  # whether the student generates a rollout
    REPLAY = 3  # which completions are replayed
    CORRECTION = 4  # the teacher's token that replaces the student's
    ALTERNATIVE = 5  # the student's second choice, by which `tsdkd analyze` replaces a token


def prompt_seed(seed: int, step: int, index: int, stream: RandomStream = RandomStream.SAMPLING) -> int:
    """Return a seed in [0, 2**63) for one prompt, step and stream."""
    key = 0
    for part in (seed, step, index, int(stream)):
        # SplitMix64: neighboring keys must not give correlated Mersenne Twister states
        key = (key + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        key ^= key >> 31
    return key & 0x7FFFFFFFFFFFFFFF


def prompt_generator(
    seed: int, step: int, index: int, stream: RandomStream = RandomStream.SAMPLING
) -> torch.Generator:
    """Return a CPU generator seeded with `prompt_seed`."""
    return torch.Generator().manual_seed(prompt_seed(seed, step, index, stream))
