"""What items say about a model: means with bootstrap intervals, pass@k, and paired tests between models."""

import numpy as np
from scipy import stats

NUM_RESAMPLES = 10_000


def pass_at_k(scores: np.ndarray, k: int) -> np.ndarray:
    """The unbiased estimator of Chen et al. 2021, `1 - C(n - c, k) / C(n, k)`.

    Args:
        scores: `[items, n]`, 1 where a sample is right.
        k: at most n.

    Returns:
        `[items]`, the probability that one of k samples is right.
    """
    n, wrong = scores.shape[1], (scores < 1).sum(axis=1)
    i = np.arange(k)
    return 1.0 - np.prod(np.clip(wrong[:, None] - i, 0, None) / (n - i), axis=1)


def bootstrap_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean over items, percentile method."""
    if len(values) < 2 or np.ptp(values) == 0:
        mean = float(np.mean(values))
        return mean, mean
    found = stats.bootstrap((values,), np.mean, n_resamples=NUM_RESAMPLES, method="percentile", rng=seed, batch=1000)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def paired_bootstrap(ours: np.ndarray, theirs: np.ndarray, resample_size: int | None = None, seed: int = 0) -> float:
    """How sure it is that one model solves more than another, on the same items.

    Args:
        ours, theirs: `[items]`, what each makes of each item.
        size: items in a resample; by default as many as there are, which makes the result a one-sided p-value. With
            fewer it says how often a test set of that size would show the opposite.
        seed: of the resampling.

    Returns:
        The share of 10,000 resamples in which `ours` hasn't the larger mean; ties count half.
    """
    difference = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    chosen = np.random.default_rng(seed).integers(
        len(difference), size=(NUM_RESAMPLES, resample_size or len(difference))
    )
    means = difference[chosen].mean(axis=1)
    return float(((means < 0).sum() + 0.5 * (means == 0).sum()) / NUM_RESAMPLES)
