"""What a comparison writes: results.jsonl, a Markdown table, a plot."""

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from ..evaluation.scores import NUM_RESAMPLES, paired_bootstrap
from .config import REFERENCE_MODELS, Comparison
from .numbers import RunSummary, summarize
from .task import read_result

_SMALL_TEST_SIZE = 100  # problems
_PALE, _DARK = "#9aa5b1", "#1f4e79"


def write_summary(comparison: Comparison) -> Path | None:
    """Write what is finished into the comparison's folder; returns the table's path, None where nothing is."""
    found = [(task, read_result(comparison, task)) for task in comparison.tasks]
    results = [result for _, result in found if result is not None]
    if not results:
        return None
    lines = "".join(json.dumps(result) + "\n" for result in results)
    (comparison.folder / "results.jsonl").write_text(lines, encoding="utf-8")
    metrics = _metric_names(comparison)
    runs = [*REFERENCE_MODELS, *comparison.runs]
    by_run = {run: [result for result in results if result["run"] == run] for run in runs}
    summaries = [summarize(run, some, metrics) for run, some in by_run.items() if some]
    path = comparison.folder / "results.md"
    path.write_text(format_summary(comparison, summaries), encoding="utf-8")
    if any(summary.run_name not in REFERENCE_MODELS for summary in summaries):
        plot_accuracy(comparison, summaries, comparison.folder / "results.png")
    return path


def _metric_names(comparison: Comparison) -> list[str]:
    k = comparison.eval_samples
    return ["greedy", f"avg@{k}", f"pass@{k}", "length", "entropy", "train_seconds"]


def format_summary(comparison: Comparison, summaries: Sequence[RunSummary]) -> str:
    """The table: means over seeds with 95 % intervals, and the test against the baseline."""
    metrics = _metric_names(comparison)
    heads = {"length": "length, tokens", "entropy": "entropy, nats", "train_seconds": "training, s"}
    baseline = comparison.baseline or next(iter(comparison.runs))
    base = next((s for s in summaries if s.run_name == baseline), None)
    columns = [
        "",
        *(heads.get(metric, metric) for metric in metrics),
        f"avg@{comparison.eval_samples} against {baseline}",
    ]
    rows = [columns, ["---", *["---:"] * (len(columns) - 1)]]
    best = {
        m: max((s.means[m] for s in summaries if s.run_name not in REFERENCE_MODELS), default=None)
        for m in metrics[:3]
    }
    for summary in summaries:
        cells = [_format_cell(summary, metric, best.get(metric)) for metric in metrics]
        rows.append([summary.run_name.replace("|", "\\|"), *cells, _format_difference(summary, base)])
    text = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    count = len(summaries[0].solve_rates)
    counts = sorted({s.num_seeds for s in summaries if s.run_name not in REFERENCE_MODELS})
    seeds = " to ".join(map(str, counts)) or "no"
    note = (
        f"{count} problems; mean ± half of the 95 % interval over {seeds} seeds. The last column: the difference in "
        f"points, and in brackets the share of {NUM_RESAMPLES:,} paired bootstrap resamples in which it isn't positive "
        f"(ties count half): resamples of all {count} problems, a p-value; and of {_SMALL_TEST_SIZE}.\n"
    )
    return f"{text}\n{note}"


def _format_cell(summary: RunSummary, metric: str, best: float | None) -> str:
    mean, half = summary.means[metric], summary.half_widths[metric]
    digits = {"entropy": 3, "train_seconds": 0}.get(metric, 1)
    if metric == "train_seconds" and summary.run_name in REFERENCE_MODELS:
        return ""
    text = f"{mean:.{digits}f}"
    text = f"**{text}**" if mean == best and summary.run_name not in REFERENCE_MODELS else text
    return text if half != half else f"{text} ± {half:.{digits}f}"


def _format_difference(summary: RunSummary, base: RunSummary | None) -> str:
    if base is None or summary.run_name == base.run_name or summary.run_name in REFERENCE_MODELS:
        return ""
    difference = 100 * float((summary.solve_rates - base.solve_rates).mean())
    shares = [paired_bootstrap(summary.solve_rates, base.solve_rates, size) for size in (None, _SMALL_TEST_SIZE)]
    return f"{difference:+.1f} (p {shares[0]:.3f}; {shares[1]:.3f})"


def _axis_limits(percents: Sequence[float]) -> tuple[float, float]:
    """Of an axis: with few seeds an interval is far longer than what there is to be seen."""
    low, high = min(percents), max(percents)
    margin = max(2.0, 0.15 * (high - low))
    return max(0.0, low - margin), min(100.0, high + margin)


def plot_accuracy(comparison: Comparison, summaries: Sequence[RunSummary], path: Path) -> None:
    """Accuracy of every run: each seed a dot, the mean with its interval; of a sweep as a line over `x`."""
    metrics = _metric_names(comparison)[:3]
    runs = [s for s in summaries if s.run_name not in REFERENCE_MODELS]
    if comparison.x:
        runs.sort(key=lambda s: comparison.sweep_value(s.run_name))
    references = {s.run_name: s for s in summaries if s.run_name in REFERENCE_MODELS}
    height = 2.8 if comparison.x else 0.9 + 0.38 * len(runs)
    figure, axes = plt.subplots(1, 3, figsize=(11, height), sharey=not comparison.x, layout="constrained")
    for axis, metric in zip(axes, metrics, strict=True):
        places = [comparison.sweep_value(s.run_name) if comparison.x else float(-i) for i, s in enumerate(runs)]
        means, halves = [s.means[metric] for s in runs], [s.half_widths[metric] for s in runs]
        dots = [(place, value) for place, s in zip(places, runs, strict=True) for value in s.seed_values[metric]]
        if comparison.x:
            axis.plot(*zip(*dots, strict=True), ".", color=_PALE, zorder=1)
            axis.errorbar(places, means, yerr=halves, fmt="o-", color=_DARK, capsize=3)
            axis.set_xlabel(comparison.x)
            axis.set_ylabel(f"{metric}, %")
            draw = axis.axhline
        else:
            axis.plot([value for _, value in dots], [place for place, _ in dots], ".", color=_PALE, zorder=1)
            axis.errorbar(means, places, xerr=halves, fmt="o", color=_DARK, capsize=3)
            axis.set_yticks(places, [s.run_name.replace("$", r"\$") for s in runs])
            axis.set_xlabel(f"{metric}, %")
            axis.margins(y=0.12)
            draw = axis.axvline
        shown = [value for _, value in dots]
        if "student" in references:
            before = references["student"].means[metric]
            draw(before, color="black", lw=0.8, ls=":", label="student before")
            shown.append(before)
        (axis.set_ylim if comparison.x else axis.set_xlim)(_axis_limits(shown))
        axis.spines[["top", "right"]].set_visible(False)
    if "student" in references:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)
