"""Summarizes a comparison over its seeds in a Markdown table: means, intervals, and the test against the baseline."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from ..evaluation.results import format_table
from ..evaluation.scores import NUM_RESAMPLES, format_p_value, paired_permutation_test
from .config import REFERENCE_MODELS, Comparison

_COLUMN_TITLES = {"length": "length, tokens", "entropy": "entropy, nats", "train_seconds": "training, s"}
_DIGITS = {"entropy": 3, "train_seconds": 0}


@dataclass
class RunSummary:
    """The results of one run over its seeds.

    Attributes:
        run_name: name in the comparison's file, or one of `REFERENCE_MODELS`.
        num_seeds: number of finished seeds.
        means: metric -> mean over seeds.
        half_widths: metric -> half the width of the 95 % interval of the mean (Student's t); nan with one seed.
        seed_values: metric -> one value per seed.
        solve_rates: `[problems]`, share of the samples that are right, over all seeds.
    """

    run_name: str
    num_seeds: int
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
    return RunSummary(run_name, len(results), means, half_widths, seed_values, solve_rates)


def _half_width(values: Sequence[float]) -> float:
    if len(values) < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def metric_names(comparison: Comparison) -> list[str]:
    """The columns of the table. The first three are accuracies in percent."""
    k = comparison.eval_samples
    return ["greedy", f"avg@{k}", f"pass@{k}", "length", "entropy", "train_seconds"]


def format_summary(comparison: Comparison, summaries: Sequence[RunSummary]) -> str:
    """Format the table: means over seeds with 95 % intervals, and the test against the baseline."""
    metrics = metric_names(comparison)
    baseline = comparison.baseline or next(iter(comparison.runs))
    base = next((s for s in summaries if s.run_name == baseline), None)
    titles = [_COLUMN_TITLES.get(metric, metric) for metric in metrics]
    header = ["", *titles, f"avg@{comparison.eval_samples} against {baseline}"]
    rows = []
    trained = [s for s in summaries if not s.is_reference]
    best = {metric: max((s.means[metric] for s in trained), default=None) for metric in metrics[:3]}
    for summary in summaries:
        cells = [_format_cell(summary, metric, best.get(metric)) for metric in metrics]
        rows.append([summary.run_name, *cells, _format_difference(summary, base)])
    return f"{format_table(header, rows)}\n{_format_note(len(summaries[0].solve_rates), trained)}\n"


def _format_note(num_problems: int, trained: Sequence[RunSummary]) -> str:
    counts = sorted({s.num_seeds for s in trained})
    if not counts:
        spread = "No run is finished."
    elif counts == [1]:
        spread = "One seed: no interval."
    else:
        single = " (a run with one seed has no interval)" if counts[0] == 1 else ""
        spread = f"Mean ± half the width of the 95 % interval over {' to '.join(map(str, counts))} seeds{single}."
    return (
        f"{num_problems} problem{'' if num_problems == 1 else 's'}. {spread} Bold: the highest accuracy of the "
        "trained runs. Last column: difference in points, and two-sided p-value of a paired permutation test over the "
        f"problems ({NUM_RESAMPLES:,} sign flips)."
    )


def _format_cell(summary: RunSummary, metric: str, best: float | None) -> str:
    mean, half_width = summary.means[metric], summary.half_widths[metric]
    if metric == "train_seconds" and summary.is_reference:
        return ""
    digits = _DIGITS.get(metric, 1)
    text = f"{mean:.{digits}f}"
    text = f"**{text}**" if mean == best and not summary.is_reference else text
    return text if np.isnan(half_width) else f"{text} ± {half_width:.{digits}f}"


def _format_difference(summary: RunSummary, base: RunSummary | None) -> str:
    if base is None or summary.run_name == base.run_name or summary.is_reference:
        return ""
    difference = 100 * float((summary.solve_rates - base.solve_rates).mean())
    p = paired_permutation_test(summary.solve_rates, base.solve_rates)
    return f"{difference:+.1f} ({format_p_value(p)})"
