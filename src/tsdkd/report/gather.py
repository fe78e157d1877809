"""What a run has left in its directory."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from ..analysis.load import Record, read
from ..errors import DataError
from ..evaluation.table import read as read_results
from ..evaluation.table import results_in
from ..records import FOLDER
from ..run_dir import RUN_FILE

_STATE = "trainer_state.json"


@dataclass
class Run:
    """A run.

    Attributes:
        name: in the report.
        folder: its directory.
        config: the resolved configuration.
        state: of the trainer, as transformers writes it; empty before the first checkpoint.
        records: see `tsdkd.analysis`; empty where nothing was recorded.
        evaluations: the Markdown tables of `tsdkd eval` that lie in the run's directory.
        differences: what they say of this run's student against their baseline, entries of `results-*.json`.
        nonfinite: steps whose loss or gradient wasn't finite.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    state: dict[str, Any]
    records: list[Record]
    evaluations: dict[str, str]
    differences: list[dict[str, Any]]
    nonfinite: int

    @cached_property
    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """Metric -> (step, value), of training and evaluation."""
        found: dict[str, list[tuple[int, float]]] = {}
        for entry in self.state.get("log_history", []):
            for name, value in entry.items():
                if isinstance(value, int | float) and name not in ("step", "epoch"):
                    found.setdefault(name, []).append((entry["step"], float(value)))
        return found

    def shown(self, key: str) -> str:
        """A setting for people who may have another machine: of a path its last component."""
        value = str(self.config.get(key) or "none")
        return Path(value).name if Path(value).is_absolute() else value

    @property
    def is_finished(self) -> bool:
        """Whether the last step was taken."""
        return bool(self.state) and self.state["global_step"] >= self.state["max_steps"] > 0


def gather(name: str, folder: Path) -> Run:
    """Read a run's directory.

    Raises:
        DataError: it isn't one, or something in it can't be read.
    """
    config = folder / RUN_FILE
    if not config.is_file():
        raise DataError(f"{folder} isn't the directory of a run: it has no {RUN_FILE}")
    records = read(folder) if (folder / FOLDER).is_dir() else []
    results = results_in(folder)
    tables = {
        key: path.with_suffix(".md").read_text(encoding="utf-8", errors="replace") for key, path in results.items()
    }
    differences = [entry for path in results.values() for entry in _differences(path, folder.resolve())]
    nonfinite = len(list(folder.glob("nonfinite_step_*.jsonl")))
    return Run(name, folder, _config(config), _newest_state(folder), records, tables, differences, nonfinite)


def _config(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        return dict(values)
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise _damaged(path, error) from error


def _differences(path: Path, folder: Path) -> list[dict[str, Any]]:
    """Of the run's student, and of its checkpoints."""
    models, entries = read_results(path)
    own = {name for name, model in models.items() if folder in (Path(model), Path(model).parent)}
    return [entry for entry in entries if entry["model"] in own and "difference" in entry]


def _newest_state(folder: Path) -> dict[str, Any]:
    """Of the end, or else of the last checkpoint."""
    checkpoints = [path for path in folder.glob(f"checkpoint-*/{_STATE}") if path.parent.name[11:].isdigit()]
    newest = max(checkpoints, key=lambda path: int(path.parent.name[11:]), default=None)
    path = folder / _STATE if (folder / _STATE).is_file() else newest
    if path is None:
        return {}
    try:
        state = dict(json.loads(path.read_text(encoding="utf-8")))
        history = [dict(entry) | {"step": int(entry["step"])} for entry in state["log_history"]]
        steps = {name: int(state[name]) for name in ("global_step", "max_steps")}
        return state | steps | {"log_history": history}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is damaged: {' '.join(repr(error).split())[:200]}")
