"""Statistics over items: means with bootstrap intervals, and a paired test of two models."""

import numpy as np
from scipy import stats

NUM_RESAMPLES = 10_000


def bootstrap_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean over items, percentile method.

    Args:
        values: `[items]`, scores of a model, or differences between the scores of two models.
        seed: seed of the resampling.
    """
    if len(values) < 2 or np.ptp(values) == 0:
        mean = float(np.mean(values))
        return mean, mean
    result = stats.bootstrap(
        (values,), np.mean, n_resamples=NUM_RESAMPLES, method="percentile", rng=seed, batch=_batch_size(values)
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def paired_permutation_test(ours: np.ndarray, theirs: np.ndarray, seed: int = 0) -> float:
    """A paired permutation test of the hypothesis that two models have the same mean score.

    It flips the signs of the items' differences. If all scores are 0 or 1, this is McNemar's exact test, up to the
    randomness of the flips. With at most 13 differing items, all sign patterns are enumerated.

    Args:
        ours, theirs: `[items]`, the scores of two models on the same items.
        seed: seed of the flips.

    Returns:
        The two-sided p-value.
    """
    differences = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    differences = differences[differences != 0]  # flipping the sign of 0 changes nothing
    if len(differences) < 2:
        return 1.0
    return float(
        stats.permutation_test(
            (differences,),
            lambda x, axis: x.sum(axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=NUM_RESAMPLES - 1,  # scipy adds the observed signs, so p is at least 2 / NUM_RESAMPLES
            batch=_batch_size(differences),
            alternative="two-sided",
            rng=seed,
        ).pvalue
    )


def format_p_value(p: float) -> str:
    """Format a p-value as "p = 0.050", with three decimals, or as "p < 0.001"."""
    return f"p = {p:.3f}" if p >= 0.001 else "p < 0.001"


def _batch_size(values: np.ndarray) -> int:
    """Resamples per batch, so that memory is bounded."""
    return max(1, min(1000, 10_000_000 // len(values)))
