"""Writes the results of a comparison: results.jsonl, statistics in results.csv, Markdown tables, a plot."""

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..analysis.left_out import leave_out_damaged, leave_out_failure, warn_of_skipped
from ..files import write_atomically
from .comparison import REFERENCE_MODELS, Comparison
from .grid import GridSearch, read_final_result, search_grid
from .paired import METRIC_COLUMNS, metric_rows
from .plot import plot_accuracy
from .summary import summarize
from .tables import all_metrics, format_tables, metric_names


def write_results(comparison: Comparison) -> Path | None:
    """Write the finished results to the comparison's folder. Returns the path of the table, or None without results.

    A result that can't be read is skipped with a warning.

    Raises:
        OutputDirError: a result has other settings, or the table can't be written.
    """
    skipped: list[str] = []
    results = _read_results(comparison, skipped)
    path = comparison.folder / "results.md"
    if results:
        write_atomically(comparison.folder / "results.jsonl", "".join(json.dumps(result) + "\n" for result in results))
        metrics = all_metrics(comparison)
        by_run = {run: [r for r in results if r["run"] == run] for run in (*REFERENCE_MODELS, *comparison.runs)}
        summaries = [summarize(run, run_results, metrics) for run, run_results in by_run.items() if run_results]
        write_atomically(path, format_tables(comparison, summaries, _read_grid(comparison, skipped)))
        rows = metric_rows(summaries, comparison.baseline_run, metrics)
        write_atomically(comparison.folder / "results.csv", _to_csv(rows))
        if not all(summary.is_reference for summary in summaries):
            picture = comparison.folder / "results.png"
            with leave_out_failure("results.png", skipped):
                plot_accuracy(comparison, summaries, metric_names(comparison)[:3], picture)
    warn_of_skipped(list(dict.fromkeys(skipped)))
    return path if results else None


def _read_grid(comparison: Comparison, skipped: list[str]) -> list[GridSearch]:
    """The grid of each run, as far as it is finished; nothing without a grid."""
    searches = []
    for run in comparison.runs if comparison.grid else ():
        with leave_out_damaged(skipped):
            searches.append(search_grid(comparison, run))
    return searches


def _to_csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, METRIC_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _read_results(comparison: Comparison, skipped: list[str]) -> list[dict[str, Any]]:
    """Read the finished results. Runs are compared problem by problem, so results are skipped that have another number
    of problems than most."""
    results = []
    for task in [task for task in comparison.tasks if not task.is_validation]:
        with leave_out_damaged(skipped):
            if (result := read_final_result(comparison, task)) is not None:
                results.append(result)
    sizes = Counter(len(result["samples_right"]) for result in results)
    size = max(sizes, key=lambda n: sizes[n], default=0)
    for result in (r for r in results if len(r["samples_right"]) != size):
        title = f"{result['run']}, seed {result['seed']}"
        skipped.append(f"{title}: it has {len(result['samples_right'])} problems, but the others have {size}")
    return [result for result in results if len(result["samples_right"]) == size]
