"""Writes the results of a comparison: results.jsonl, a Markdown table, a plot."""

import json
from pathlib import Path

from ..files import write_atomically
from .config import REFERENCE_MODELS, Comparison
from .plot import plot_accuracy
from .summary import format_summary, metric_names, summarize
from .task import read_result


def write_results(comparison: Comparison) -> Path | None:
    """Write what is finished into the comparison's folder; returns the table's path, None where nothing is."""
    results = [result for task in comparison.tasks if (result := read_result(comparison, task)) is not None]
    if not results:
        return None
    write_atomically(comparison.folder / "results.jsonl", "".join(json.dumps(result) + "\n" for result in results))
    metrics = metric_names(comparison)
    by_run = {run: [r for r in results if r["run"] == run] for run in (*REFERENCE_MODELS, *comparison.runs)}
    summaries = [summarize(run, run_results, metrics) for run, run_results in by_run.items() if run_results]
    path = comparison.folder / "results.md"
    write_atomically(path, format_summary(comparison, summaries))
    if not all(summary.is_reference for summary in summaries):
        plot_accuracy(comparison, summaries, metrics[:3], comparison.folder / "results.png")
    return path
