"""Paired statistics over seeds: the difference from the baseline, and the smallest one that the seeds can show."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from scipy import optimize, stats

from .summary import RunSummary

METRIC_COLUMNS = (
    *("run", "metric", "seeds", "mean", "std"),
    *("paired_seeds", "difference", "difference_low", "difference_high", "detectable_difference"),
)
_SIGNIFICANCE, _POWER = 0.05, 0.8
_NUM_QUANTILES = 10_000
_ROUNDING = 1e-9  # differences of equal differences, in any of the metrics' units


@dataclass
class PairedDifference:
    """The difference of two runs in one metric, seed by seed; nan where fewer than two seeds, or no scatter, leave it
    open.

    Attributes:
        num_seeds: number of seeds that both runs have.
        mean: mean difference.
        low, high: its 95 % interval (Student's t).
        detectable: the smallest true difference that a paired two-sided t-test at 5 % finds with a power of 80 %, if
            the differences scatter as they do here.
    """

    num_seeds: int
    mean: float
    low: float
    high: float
    detectable: float


def paired_difference(summary: RunSummary, base: RunSummary, metric: str) -> PairedDifference:
    """The difference of a run from another one, over the seeds that both have."""
    theirs = dict(zip(base.seeds, base.seed_values[metric], strict=True))
    ours = zip(summary.seeds, summary.seed_values[metric], strict=True)
    differences = np.array([value - theirs[seed] for seed, value in ours if seed in theirs])
    n = len(differences)
    mean = float(differences.mean()) if n else math.nan
    if n < 2 or np.ptp(differences) < _ROUNDING:  # seeds that all agree don't say how much others would scatter
        return PairedDifference(n, mean, math.nan, math.nan, math.nan)
    error = float(differences.std(ddof=1)) / math.sqrt(n)
    half_width = float(stats.t.ppf(1 - _SIGNIFICANCE / 2, n - 1)) * error
    return PairedDifference(n, mean, mean - half_width, mean + half_width, detectable_effect(n) * error)


@cache
def detectable_effect(num_seeds: int) -> float:
    """The true difference that a paired two-sided t-test at 5 % finds with a power of 80 %, in standard errors.

    With a true difference of d standard errors, the statistic is (Z + d) / S, where Z is standard normal and S is the
    estimated standard deviation over the true one. The power is the mean of P(Z > t S - d) over S, for the critical
    value t; the test's other side is negligible.

    Args:
        num_seeds: number of pairs, at least 2.
    """
    df = num_seeds - 1
    critical = float(stats.t.ppf(1 - _SIGNIFICANCE / 2, df))
    quantiles = (np.arange(_NUM_QUANTILES) + 0.5) / _NUM_QUANTILES  # scipy's noncentral t is nan for few seeds
    scales = stats.chi.ppf(quantiles, df) / math.sqrt(df)

    def missing_power(effect: float) -> float:
        return float(stats.norm.cdf(effect - critical * scales).mean()) - _POWER

    return float(optimize.brentq(missing_power, 0.0, 2 * critical + 2))


def metric_rows(summaries: Sequence[RunSummary], baseline: str, metrics: Sequence[str]) -> list[dict[str, Any]]:
    """The statistics of each run and metric, as rows with `METRIC_COLUMNS`; unknown values are left out."""
    base = next((s for s in summaries if s.run_name == baseline), None)
    rows = []
    for summary in summaries:
        for metric in metrics:
            values = summary.seed_values[metric]
            row: dict[str, Any] = {"run": summary.run_name, "metric": metric, "mean": summary.means[metric]}
            if not summary.is_reference:
                row |= {"seeds": len(values), "std": float(np.std(values, ddof=1)) if len(values) > 1 else math.nan}
            if base is not None and summary is not base and not summary.is_reference:
                paired = paired_difference(summary, base, metric)
                row |= {"paired_seeds": paired.num_seeds, "difference": paired.mean}
                row |= {"difference_low": paired.low, "difference_high": paired.high}
                row |= {"detectable_difference": paired.detectable}
            rows.append({name: value for name, value in row.items() if value == value})
    return rows
