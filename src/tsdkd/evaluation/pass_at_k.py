"""pass@k from counts of right samples."""

import numpy as np


def pass_at_k(num_correct: np.ndarray, num_samples: int, k: int) -> np.ndarray:
    """The unbiased estimator of Chen et al. 2021, `1 - C(n - c, k) / C(n, k)`.

    Args:
        num_correct: `[items]`, c, the number of right samples of each item.
        num_samples: n, samples per item.
        k: at most n.

    Returns:
        `[items]`, float64, the probability that at least one of k samples is right.
    """
    wrong, i = num_samples - np.asarray(num_correct)[:, None], np.arange(k)
    return 1.0 - np.prod(np.clip(wrong - i, 0, None) / (num_samples - i), axis=1)


def default_ks(num_samples: int) -> list[int]:
    """The k that are reported: the powers of two up to the number of samples, and that number."""
    return sorted({2**i for i in range(num_samples.bit_length())} | {num_samples})
