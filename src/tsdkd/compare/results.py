"""Writes the results of a comparison: results.jsonl, statistics in results.csv, Markdown tables, a plot."""

import csv
import io
import json
import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..analysis.left_out import leave_out_damaged, leave_out_failure, warn_of_skipped
from ..config.aliases import rename_deprecated
from ..errors import DataError
from ..files import parse_json, read_bounded, write_atomically
from .comparison import REFERENCE_MODELS, Comparison, format_grid_values
from .grid import GridSearch, read_kept_result, search_grid
from .paired import METRIC_COLUMNS, metric_rows
from .plot import plot_accuracy
from .result_file import RESULT_NAME
from .summary import summarize
from .tables import all_metrics, format_tables, metric_names

logger = logging.getLogger(__name__)
_MAX_JSONL_MIB = 256


def write_results(comparison: Comparison) -> Path | None:
    """Write the finished results to the comparison's folder. Returns the path of the table, or None without results.

    A result that can't be read is skipped with a warning. So is one of the earlier tables whose file is gone. Results
    of a run whose grid isn't finished are kept, with a warning.

    Raises:
        OutputDirError: a result has other settings, or the table can't be written.
    """
    skipped: list[str] = []
    of_grid: list[str] = []
    searches = _read_grid(comparison, of_grid)
    results = _read_results(comparison, {search.run: search.chosen for search in searches}, skipped)
    skipped += of_grid + _describe_gone(comparison)
    path = comparison.folder / "results.md"
    if results:
        write_atomically(comparison.folder / "results.jsonl", "".join(json.dumps(result) + "\n" for result in results))
        metrics = all_metrics(comparison)
        by_run = {run: [r for r in results if r["run"] == run] for run in (*REFERENCE_MODELS, *comparison.runs)}
        summaries = [summarize(run, run_results, metrics) for run, run_results in by_run.items() if run_results]
        write_atomically(path, format_tables(comparison, summaries, searches))
        rows = metric_rows(summaries, comparison.baseline_run, metrics)
        write_atomically(comparison.folder / "results.csv", _to_csv(rows))
        if not all(summary.is_reference for summary in summaries):
            picture = comparison.folder / "results.png"
            with leave_out_failure("results.png", skipped):
                plot_accuracy(comparison, summaries, metric_names(comparison)[:3], picture)
    warn_of_skipped(skipped)
    _warn_of_unfinished_grid(comparison, results, {search.run for search in searches if search.chosen is not None})
    return path if results else None


def _read_grid(comparison: Comparison, skipped: list[str]) -> list[GridSearch]:
    """The grid of each run, as far as it is finished; nothing without a grid."""
    searches = []
    for run in comparison.runs if comparison.grid else ():
        with leave_out_damaged(skipped):
            searches.append(search_grid(comparison, run))
    return searches


def _warn_of_unfinished_grid(
    comparison: Comparison, results: Sequence[dict[str, Any]], finished: Collection[str]
) -> None:
    """A line for each run that has results, but whose grid hasn't chosen its values."""
    for run in comparison.runs if comparison.grid else ():
        own = [rename_deprecated(result["settings"]) for result in results if result["run"] == run]
        if own and run not in finished:
            keys = rename_deprecated(comparison.grid)
            used = dict.fromkeys(format_grid_values({key: settings.get(key) for key in keys}) for settings in own)
            logger.warning(
                "%s: its grid isn't finished or can't be read; its results are those with %s", run, " and ".join(used)
            )


def _describe_gone(comparison: Comparison) -> list[str]:
    """The results that the earlier tables have, and whose files are gone or belong to no task any more."""
    path = comparison.folder / "results.jsonl"
    if not path.exists():
        return []
    rows: list[Any] = []
    with suppress(DataError):  # a damaged file is only overwritten
        rows = [parse_json(line, path) for line in read_bounded(path, _MAX_JSONL_MIB).splitlines()]
    tasks = [task for task in comparison.tasks if (task.folder / RESULT_NAME).exists() and not task.is_validation]
    present = [(task.run, task.seed) for task in tasks]
    earlier = [(row.get("run"), row.get("seed")) for row in rows if isinstance(row, dict)]
    titles = [run if seed is None else f"{run}, seed {seed}" for run, seed in earlier if (run, seed) not in present]
    return [f"{title}: the earlier results.jsonl has it, but no task has this result" for title in titles]


def _to_csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, METRIC_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _read_results(
    comparison: Comparison, chosen: Mapping[str, Mapping[str, Any] | None], skipped: list[str]
) -> list[dict[str, Any]]:
    """Read the finished results, with the grid's choice for each run. Runs are compared problem by problem, so results
    are skipped that have another number of problems than most."""
    results = []
    for task in [task for task in comparison.tasks if not task.is_validation]:
        with leave_out_damaged(skipped):
            if (result := read_kept_result(comparison, task, chosen.get(task.run))) is not None:
                results.append(result)
    sizes = Counter(len(result["samples_right"]) for result in results)
    size = max(sizes, key=lambda n: sizes[n], default=0)
    for result in (r for r in results if len(r["samples_right"]) != size):
        title = f"{result['run']}, seed {result['seed']}"
        skipped.append(f"{title}: it has {len(result['samples_right'])} problems, but the others have {size}")
    return [result for result in results if len(result["samples_right"]) == size]
