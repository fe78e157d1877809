"""What can be said of a comparison's results over seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats


@dataclass
class RunSummary:
    """A run over its seeds.

    Attributes:
        run: its name.
        seeds: how many are finished.
        means: metric -> mean over seeds.
        halves: metric -> half of the 95 % interval of that mean (Student's t); nan with one seed.
        points: metric -> the seeds' values.
        solved: `[problems]`, the share of right samples of each problem, over all seeds.
    """

    run_name: str
    num_seeds: int
    means: dict[str, float]
    half_widths: dict[str, float]
    seed_values: dict[str, list[float]]
    solve_rates: np.ndarray


def summarize(run_name: str, results: Sequence[dict[str, Any]], metrics: Sequence[str]) -> RunSummary:
    """Of the results of one run, a seed each."""
    seed_values = {metric: [float(result[metric]) for result in results] for metric in metrics}
    means = {metric: float(np.mean(values)) for metric, values in seed_values.items()}
    half_widths = {metric: _half_width(values) for metric, values in seed_values.items()}
    samples = results[0]["settings"]["eval_samples"]
    solve_rates = np.mean([result["samples_right"] for result in results], axis=0) / samples
    return RunSummary(run_name, len(results), means, half_widths, seed_values, solve_rates)


def _half_width(values: Sequence[float]) -> float:
    if len(values) < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
