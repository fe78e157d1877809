"""Summarizes the results of a run over its seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from .comparison import REFERENCE_MODELS


@dataclass
class RunSummary:
    """The results of one run over its seeds.

    Attributes:
        run_name: name in the comparison's file, or one of `REFERENCE_MODELS`.
        seeds: the finished seeds.
        means: metric -> mean over seeds.
        half_widths: metric -> half the width of the 95 % interval of the mean (Student's t); nan with one seed.
        seed_values: metric -> one value per seed.
        solve_rates: `[problems]`, share of the samples that are right, over all seeds.
    """

    run_name: str
    seeds: list[int | None]
    means: dict[str, float]
    half_widths: dict[str, float]
    seed_values: dict[str, list[float]]
    solve_rates: np.ndarray

    @property
    def is_reference(self) -> bool:
        """Whether this is a model that was evaluated without training."""
        return self.run_name in REFERENCE_MODELS


def summarize(run_name: str, results: Sequence[dict[str, Any]], metrics: Sequence[str]) -> RunSummary:
    """Summarize the results of one run, one result per seed."""
    seed_values = {metric: [float(result[metric]) for result in results] for metric in metrics}
    means = {metric: float(np.mean(values)) for metric, values in seed_values.items()}
    half_widths = {metric: _half_width(values) for metric, values in seed_values.items()}
    num_samples = results[0]["settings"]["eval_samples"]
    solve_rates = np.mean([result["samples_right"] for result in results], axis=0) / num_samples
    seeds = [result["seed"] for result in results]
    return RunSummary(run_name, seeds, means, half_widths, seed_values, solve_rates)


def _half_width(values: Sequence[float]) -> float:
    if len(values) < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
