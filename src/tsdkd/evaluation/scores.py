"""Statistics of a model's items: means with bootstrap intervals, pass@k, and a paired test between two models."""

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
    """The 95 % bootstrap interval of the mean over items, percentile method.

    Args:
        values: `[items]`, a model's scores, or the differences between two models' scores.
        seed: of the resampling.
    """
    if len(values) < 2 or np.ptp(values) == 0:
        mean = float(np.mean(values))
        return mean, mean
    result = stats.bootstrap(
        (values,), np.mean, n_resamples=NUM_RESAMPLES, method="percentile", rng=seed, batch=_batch_size(values)
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def paired_permutation_test(ours: np.ndarray, theirs: np.ndarray, seed: int = 0) -> float:
    """The two-sided p value of "both models score alike on average", by sign flips of the items' differences.

    Where each item is right or wrong, this is McNemar's exact test up to the randomness of the flips. Up to 13
    differing items, all sign patterns are enumerated.

    Args:
        ours, theirs: `[items]`, the scores of two models on the same items.
        seed: of the flips.
    """
    differences = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    differences = differences[differences != 0]  # a flip doesn't change the others
    if len(differences) < 2:
        return 1.0
    return float(
        stats.permutation_test(
            (differences,),
            lambda x, axis: x.sum(axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=NUM_RESAMPLES - 1,  # the observed signs are one more: p is at least 2 / NUM_RESAMPLES
            batch=_batch_size(differences),
            alternative="two-sided",
            rng=seed,
        ).pvalue
    )


def format_p_value(p: float) -> str:
    """Format a p-value with three decimals; below 0.001 as a bound."""
    return f"p {p:.3f}" if p >= 0.001 else "p < 0.001"


def _batch_size(values: np.ndarray) -> int:
    """Resamples at a time, in bounded memory."""
    return max(1, min(1000, 10_000_000 // len(values)))
