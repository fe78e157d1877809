"""Reads the `result.json` of a task, and accepts only values that a task can have written."""

from pathlib import Path
from typing import Any

from ..config.coercion import finite_number
from ..errors import DataError, first_line
from ..files import parse_json, read_bounded

_MAX_FILE_MIB = 16
_MAX_PROBLEMS = 100_000
_PERCENT = (0.0, 100.0)


def read_result_file(path: Path) -> dict[str, Any]:
    """Read a result: a mapping that has the mapping `settings`. Raises `DataError`."""
    result = parse_json(read_bounded(path, _MAX_FILE_MIB), path)
    if not isinstance(result, dict) or not isinstance(result.get("settings"), dict):
        raise _damaged(path, "it must be a mapping that has settings")
    return result


def validate_result(path: Path, result: dict[str, Any], run: str, seed: int | None, num_samples: int) -> None:
    """Raise `DataError` unless the result has every value that the table and the plot need, each within its range."""
    ranges = {
        "greedy": _PERCENT,
        f"avg@{num_samples}": _PERCENT,
        f"pass@{num_samples}": _PERCENT,
        "length": (0.0, 1e9),
        "entropy": (-1.0, 1e6),
        "train_seconds": (0.0, 1e10),
    }
    if (result.get("run"), result.get("seed")) != (run, seed):
        raise _damaged(path, "it is the result of another task")
    for name, (low, high) in ranges.items():
        try:
            finite_number(result.get(name), low, high)
        except ValueError as error:
            raise _damaged(path, f"{name}: {first_line(error)}") from error
    counts = result.get("samples_right")
    if not isinstance(counts, list) or not 0 < len(counts) <= _MAX_PROBLEMS:
        raise _damaged(path, f"samples_right: must be a list of 1 to {_MAX_PROBLEMS:,} whole numbers")
    if not all(type(count) is int and 0 <= count <= num_samples for count in counts):
        raise _damaged(path, f"samples_right: must be whole numbers from 0 to {num_samples}")


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(f"{path} is damaged: {reason}; delete it to evaluate the task again")
