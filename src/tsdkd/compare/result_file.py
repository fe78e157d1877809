"""Reads the `result.json` of a task, and accepts only values that a task can have written, with the same settings."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..config.aliases import rename_deprecated, resolve_aliases
from ..config.coercion import finite_number, shorten
from ..errors import DataError, OutputDirError, first_line
from ..evaluation.problem_set import at_temperature, sampled_accuracies
from ..files import parse_json, read_bounded
from ..run.config_file import read_yaml
from .comparison import Comparison, ComparisonTask, order_temperatures

RESULT_NAME = "result.json"
_MAX_FILE_MIB = 16
_MAX_PROBLEMS = 100_000
_ROUNDING = 1e-6  # percent
_REMEDY = "delete it to evaluate the task again"
_LATER_SETTINGS = {"eval_temperatures": [1.0], "eval_top_p": 1.0}  # what earlier versions did, and didn't write
_PERCENT, _LENGTH = (0.0, 100.0), (0.0, 1e9)


def read_result(comparison: Comparison, task: ComparisonTask) -> dict[str, Any] | None:
    """Read the result of a task, or None if the task isn't finished.

    Raises:
        OutputDirError: the result has other settings.
        DataError: the result is damaged.
    """
    path = task.folder / RESULT_NAME
    if not path.exists():
        return None
    result = _read_file(path)
    before = _normalize(result["settings"])
    now = result_settings(comparison, task)
    differing = [name for name in now.keys() | before.keys() if now.get(name) != before.get(name)]
    if differing:
        name = min(differing)
        raise OutputDirError(
            f"output_dir: {path} has other settings ({name} was {shorten(before.get(name))}, now "
            f"{shorten(now.get(name))}); {describe_remedy(task, differing) or 'choose another directory'}"
        )
    return _validate_result(comparison, task, path, result)


def describe_remedy(task: ComparisonTask, differing: Collection[str]) -> str | None:
    """What to do if all settings that differ are those of the grid's choice; None if others differ too."""
    if task.is_validation or not set(differing) <= resolve_aliases(task.grid_values, []).keys():
        return None
    return f"the grid now chooses another value, so delete {task.folder.parent}/seed-*"


def result_settings(comparison: Comparison, task: ComparisonTask) -> dict[str, Any]:
    """All settings that the result of a task depends on."""
    assert isinstance(comparison.runs, dict)
    run_values = {} if task.seed is None else {**comparison.runs[task.run], **task.grid_values, "seed": task.seed}
    problems = "validation" if task.is_validation else "eval"
    names = ["config", f"{problems}_dataset_name", f"{problems}_limit", "eval_samples", "teacher_completions"]
    names += [name for name, value in _LATER_SETTINGS.items() if getattr(comparison, name) != value]
    eval_values = {name: getattr(comparison, name) for name in names}
    values = {**read_yaml(comparison.config), **comparison.settings, **run_values, **eval_values}
    return _normalize(values)


def read_grid_values(comparison: Comparison, task: ComparisonTask) -> dict[str, Any] | None:
    """The point of the grid that a finished task was trained with; None if the task isn't finished.

    Raises:
        DataError: the result is damaged, or has none of the grid's points.
    """
    path = task.folder / RESULT_NAME
    if not path.exists():
        return None
    settings = _normalize(_read_file(path)["settings"])
    for point in comparison.grid_points:
        if all(settings.get(name) == value for name, value in rename_deprecated(point).items()):
            return point
    found = {name: settings.get(name) for name in rename_deprecated(comparison.grid)}
    raise DataError(f"{path}: {shorten(found)} is none of the grid's points, and the grid isn't finished")


def _normalize(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with their present names, and with the temperatures in one order, whatever they are."""
    settings = rename_deprecated(settings)
    if isinstance(temperatures := settings.get("eval_temperatures"), list):
        settings["eval_temperatures"] = order_temperatures(temperatures)
    return settings


def _read_file(path: Path) -> dict[str, Any]:
    """Read a result: a mapping that has the mapping `settings`. Raises `DataError`."""
    try:
        result = parse_json(read_bounded(path, _MAX_FILE_MIB), path)
    except DataError as error:
        raise DataError(f"{error}; {_REMEDY}") from error
    if not isinstance(result, dict) or not isinstance(result.get("settings"), dict):
        raise _damaged(path, "it must be a mapping that has settings")
    return result


def _validate_result(
    comparison: Comparison, task: ComparisonTask, path: Path, result: dict[str, Any]
) -> dict[str, Any]:
    """Raise `DataError` unless the result has every value that the table and the plot need, each within its range.

    The accuracies must be those that follow from its counts. Earlier versions didn't write all of them: they are added
    to the returned result.
    """
    if (result.get("run"), result.get("seed")) != (task.run, task.seed):
        raise _damaged(path, "it is the result of another task")
    derived: dict[str, float] = {}
    lengths = [at_temperature("length", t) for t in comparison.eval_temperatures]
    for t in comparison.eval_temperatures:
        counts = _validate_counts(path, result, at_temperature("samples_right", t), comparison.eval_samples)
        metrics = sampled_accuracies(counts, comparison.eval_samples)
        derived |= {at_temperature(name, t): value for name, value in metrics.items()}
    if "greedy_right" in result:  # earlier versions didn't write it
        counts = _validate_counts(path, result, "greedy_right", 1)
        derived["greedy"] = 100 * sum(counts) / len(counts)
    result |= {name: value for name, value in derived.items() if name not in result}
    ranges: Mapping[str, tuple[float, float]] = {
        **dict.fromkeys(comparison.accuracy_metrics, _PERCENT),
        **dict.fromkeys(lengths, _LENGTH),
        "entropy": (-1.0, 1e6),
        "train_seconds": (0.0, 1e10),
    }
    for name, (low, high) in ranges.items():
        try:
            finite_number(result.get(name), low, high)
        except ValueError as error:
            raise _damaged(path, f"{name}: {first_line(error)}") from error
    for name, value in derived.items():
        if not math.isclose(result[name], value, abs_tol=_ROUNDING):
            raise _damaged(path, f"{name} is {result[name]:g}, but its counts give {value:g}")
    return result


def _validate_counts(path: Path, result: dict[str, Any], name: str, num_samples: int) -> list[int]:
    """The number of right samples of each problem, at one temperature."""
    counts = result.get(name)
    if not isinstance(counts, list) or not 0 < len(counts) <= _MAX_PROBLEMS:
        raise _damaged(path, f"{name}: must be a list of 1 to {_MAX_PROBLEMS:,} whole numbers")
    if not all(type(count) is int and 0 <= count <= num_samples for count in counts):
        raise _damaged(path, f"{name}: must be whole numbers from 0 to {num_samples}")
    return counts


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(f"{path} is damaged: {reason}; {_REMEDY}")
