"""Chooses the grid's values of each run: the point with the best mean accuracy on the validation problems."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from ..errors import DataError
from .comparison import Comparison, ComparisonTask, format_grid_values
from .result_file import RESULT_NAME, read_grid_values, read_result


@dataclass
class GridSearch:
    """The grid of one run.

    Attributes:
        run: its name.
        points: the grid's points.
        means: for each point the mean of the validation metric over the validation seeds, percent; None if a seed
            isn't finished.
    """

    run: str
    points: Sequence[Mapping[str, Any]]
    means: Sequence[float | None]

    @property
    def best(self) -> int | None:
        """The index of the chosen point: the first one with the highest mean. None before all are finished."""
        means = [mean for mean in self.means if mean is not None]
        return means.index(max(means)) if len(means) == len(self.means) else None

    @property
    def chosen(self) -> Mapping[str, Any] | None:
        """The chosen point; None before all are finished."""
        return None if self.best is None else self.points[self.best]

    @property
    def edges(self) -> list[str]:
        """The chosen values that are the lowest or the highest of more than two numbers, such as "beta=0.9"."""
        found = []
        for key, value in (self.chosen or {}).items():
            tried = [point[key] for point in self.points]
            is_numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in tried)
            if is_numeric and len(set(tried)) > 2 and value in (min(tried), max(tried)):
                found.append(format_grid_values({key: value}))
        return found


def search_grid(comparison: Comparison, run: str) -> GridSearch:
    """Read the results of a run's grid.

    Raises:
        OutputDirError, DataError: see `read_result`.
        DataError: the results are of different numbers of problems.
    """
    tasks = [task for task in comparison.grid_tasks if task.run == run]
    means: list[float | None] = []
    sizes: dict[int, Path] = {}
    for point in comparison.grid_points:
        of_point = [task for task in tasks if task.grid_values == point]
        results = [read_result(comparison, task) for task in of_point]
        for task, result in zip(of_point, results, strict=True):
            if result is not None:
                sizes.setdefault(len(result["samples_right"]), task.folder / RESULT_NAME)
        finished = [result[str(comparison.validation_metric)] for result in results if result is not None]
        means.append(fmean(finished) if len(finished) == len(results) else None)
    if len(sizes) > 1:
        found = " and ".join(f"{size} in {path}" for size, path in list(sizes.items())[:2])
        raise DataError(
            f"{run}: the grid's points have different numbers of validation problems: {found}; delete the "
            "results that aren't of the present problems"
        )
    return GridSearch(run, comparison.grid_points, means)


def with_chosen_values(comparison: Comparison, task: ComparisonTask) -> ComparisonTask | None:
    """The task with the values that the grid chooses for its run; None if the grid isn't finished.

    Tasks that need no choice are returned as they are. Raises as `search_grid` does.
    """
    if not comparison.grid or task.seed is None or task.is_validation:
        return task
    chosen = search_grid(comparison, task.run).chosen
    return None if chosen is None else replace(task, grid_values=chosen)


def read_final_result(comparison: Comparison, task: ComparisonTask) -> dict[str, Any] | None:
    """`read_result`, also of a task whose values the grid chooses; None before it has chosen."""
    chosen = with_chosen_values(comparison, task)
    return None if chosen is None else read_result(comparison, chosen)


def read_kept_result(
    comparison: Comparison, task: ComparisonTask, chosen: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """`read_final_result` for a report, with the values that the grid has chosen for the task's run. While it hasn't
    (None), a result keeps its own values.

    Raises:
        OutputDirError, DataError: see `read_result` and `read_grid_values`.
    """
    if not comparison.grid or task.seed is None:
        return read_result(comparison, task)
    values = chosen or read_grid_values(comparison, task)
    return None if values is None else read_result(comparison, replace(task, grid_values=values))


def describe_choice(comparison: Comparison, search: GridSearch) -> str:
    """What was chosen for a run, and by which accuracy."""
    assert search.best is not None
    values = format_grid_values(search.points[search.best])
    return f"{search.run}: the grid chooses {values} ({comparison.validation_metric} {search.means[search.best]:.1f})"


def describe_edge(search: GridSearch) -> str | None:
    """A warning if a chosen value is at an edge of the grid."""
    if not search.edges:
        return None
    return f"{search.run}: {', '.join(search.edges)} is at the edge of the grid; a better value may lie beyond it"
