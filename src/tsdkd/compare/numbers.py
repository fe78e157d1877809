"""What can be said of a comparison's results: intervals over seeds, and a paired bootstrap over problems."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

RESAMPLES = 10_000


@dataclass
class Summary:
    """A run over its seeds.

    Attributes:
        run: its name.
        seeds: how many are finished.
        means: metric -> mean over seeds.
        halves: metric -> half of the 95 % interval of that mean (Student's t); nan with one seed.
        points: metric -> the seeds' values.
        solved: `[problems]`, the share of right samples of each problem, over all seeds.
    """

    run: str
    seeds: int
    means: dict[str, float]
    halves: dict[str, float]
    points: dict[str, list[float]]
    solved: np.ndarray


def summarize(run: str, results: Sequence[dict[str, Any]], metrics: Sequence[str]) -> Summary:
    """Of the results of one run, a seed each."""
    points = {metric: [float(result[metric]) for result in results] for metric in metrics}
    means = {metric: float(np.mean(values)) for metric, values in points.items()}
    halves = {metric: _half_interval(values) for metric, values in points.items()}
    samples = results[0]["settings"]["eval_samples"]
    solved = np.mean([result["samples_right"] for result in results], axis=0) / samples
    return Summary(run, len(results), means, halves, points, solved)


def _half_interval(values: Sequence[float]) -> float:
    if len(values) < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def paired_bootstrap(ours: np.ndarray, theirs: np.ndarray, size: int | None = None, seed: int = 0) -> float:
    """How sure it is that one run solves more than another, on the same problems.

    Args:
        ours, theirs: `[problems]`, what each run makes of each problem.
        size: problems in a resample; by default as many as there are, which makes the result a one-sided p-value. With
            fewer it says how often a test set of that size would show the opposite.
        seed: of the resampling.

    Returns:
        The share of 10,000 resamples in which `ours` hasn't the larger mean; ties count half.
    """
    difference = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    chosen = np.random.default_rng(seed).integers(len(difference), size=(RESAMPLES, size or len(difference)))
    means = difference[chosen].mean(axis=1)
    return float(((means < 0).sum() + 0.5 * (means == 0).sum()) / RESAMPLES)
