"""Plots the accuracy of each run of a comparison, with one dot per seed."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..analysis.figures import label, save_figure
from ..files import atomic_path
from .comparison import Comparison
from .summary import RunSummary

_PALE, _DARK = "#9aa5b1", "#1f4e79"


def plot_accuracy(comparison: Comparison, summaries: Sequence[RunSummary], metrics: Sequence[str], path: Path) -> None:
    """Plot the accuracy of each run: one dot per seed, the mean and its interval. A sweep becomes a line over `x`.

    Args:
        comparison: its `x` is the key that a sweep varies.
        summaries: the runs and the reference models.
        metrics: metrics in percent; each gets its own axes.
        path: the PNG file to write.
    """
    runs = [s for s in summaries if not s.is_reference]
    if comparison.x:
        runs.sort(key=lambda s: comparison.sweep_value(s.run_name))
    student = next((s for s in summaries if s.run_name == "student"), None)
    height = 2.8 if comparison.x else 0.9 + 0.38 * len(runs)
    size = (11, height)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(metrics), sharey=not comparison.x)
    for axis, metric in zip(axes, metrics, strict=True):
        _plot_sweep(axis, comparison, runs, metric) if comparison.x else _plot_runs(axis, runs, metric)
        percents = [value for s in runs for value in s.seed_values[metric]]
        if student is not None:
            draw_line = axis.axhline if comparison.x else axis.axvline
            draw_line(student.means[metric], color="black", lw=0.8, ls=":", label="student before")
            percents.append(student.means[metric])
        set_limits = axis.set_ylim if comparison.x else axis.set_xlim
        set_limits(_axis_limits(percents))
        axis.spines[["top", "right"]].set_visible(False)
    if student is not None:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", frameon=False, fontsize="small")
    with atomic_path(path) as temporary:
        save_figure(figure, temporary, format="png", dpi=150)


def _plot_sweep(axis: Axes, comparison: Comparison, runs: Sequence[RunSummary], metric: str) -> None:
    x = [comparison.sweep_value(s.run_name) for s in runs]
    for value, s in zip(x, runs, strict=True):
        axis.plot([value] * len(s.seed_values[metric]), s.seed_values[metric], ".", color=_PALE, zorder=1)
    means, half_widths = [s.means[metric] for s in runs], [s.half_widths[metric] for s in runs]
    axis.errorbar(x, means, yerr=half_widths, fmt="o-", color=_DARK, capsize=3)
    axis.set(xlabel=label(str(comparison.x)), ylabel=f"{metric}, %")


def _plot_runs(axis: Axes, runs: Sequence[RunSummary], metric: str) -> None:
    y = [-i for i in range(len(runs))]
    for value, s in zip(y, runs, strict=True):
        axis.plot(s.seed_values[metric], [value] * len(s.seed_values[metric]), ".", color=_PALE, zorder=1)
    means, half_widths = [s.means[metric] for s in runs], [s.half_widths[metric] for s in runs]
    axis.errorbar(means, y, xerr=half_widths, fmt="o", color=_DARK, capsize=3)
    axis.set_yticks(y, [label(s.run_name) for s in runs])
    axis.set(xlabel=f"{metric}, %")
    axis.margins(y=0.12)


def _axis_limits(percents: Sequence[float]) -> tuple[float, float]:
    """Axis limits for the seeds' values. Intervals are ignored: with few seeds they are far wider."""
    low, high = min(percents), max(percents)
    margin = max(2.0, 0.15 * (high - low))
    return max(0.0, low - margin), min(100.0, high + margin)
