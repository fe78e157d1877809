"""A run's directory, read for the report."""

import json
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from ..analysis.load import StepRecord, read_records
from ..checkpointing.checkpoint import list_checkpoints
from ..config.base import TokenSelectiveConfig
from ..errors import DataError
from ..evaluation.results import find_results, read_results
from ..run.output_dir import RUN_CONFIG_NAME, read_run_config
from ..trainer.token_records import RECORDS_DIR


@dataclass
class RunReport:
    """A run.

    Attributes:
        name: in the report.
        folder: its directory.
        config: the resolved configuration.
        state: of the trainer, as transformers writes it; empty before the first checkpoint.
        records: see `tsdkd.analysis`; empty where nothing was recorded.
        result_files: of `tsdkd eval`, in the run's directory: name -> `results-*.json`.
        result_tables: their Markdown tables.
        baseline_differences: their entries that compare this run's student with a baseline.
        num_nonfinite_steps: steps whose loss or gradient wasn't finite.
        skipped: why some of it couldn't be read.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    state: dict[str, Any]
    records: list[StepRecord] = field(default_factory=list)
    result_files: dict[str, Path] = field(default_factory=dict)
    result_tables: dict[str, str] = field(default_factory=dict)
    baseline_differences: list[dict[str, Any]] = field(default_factory=list)
    num_nonfinite_steps: int = 0
    skipped: list[str] = field(default_factory=list)

    @cached_property
    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """Metric -> (step, value), of training and evaluation."""
        curves: dict[str, list[tuple[int, float]]] = {}
        for entry in self.state.get("log_history", []):
            for name, value in entry.items():
                if isinstance(value, int | float) and name not in ("step", "epoch"):
                    curves.setdefault(name, []).append((entry["step"], float(value)))
        return curves

    def format_value(self, key: str) -> str:
        """A setting for people who may have another machine: of a path its last component."""
        value = self.config.get(key, getattr(TokenSelectiveConfig, key, None))
        if value is None:
            return "none"
        return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else str(value)

    @property
    def duration(self) -> str | None:
        """h:mm:ss of training, since it was last started; None before its end."""
        seconds = self.curves.get("train_runtime")
        return str(timedelta(seconds=round(seconds[-1][1]))) if seconds else None

    @property
    def is_finished(self) -> bool:
        """Whether the last step was taken."""
        return bool(self.state) and self.state["global_step"] >= self.state["max_steps"] > 0


def load_run(name: str, folder: Path) -> RunReport:
    """Read a run's directory. Records and evaluations that can't be read are skipped.

    Raises:
        DataError: it isn't one, or its configuration or log can't be read.
    """
    if not (folder / RUN_CONFIG_NAME).is_file():
        raise DataError(f"{folder} isn't the directory of a run: it has no {RUN_CONFIG_NAME}")
    run = RunReport(name, folder, read_run_config(folder), _read_trainer_state(folder))
    run.num_nonfinite_steps = len(list(folder.glob("nonfinite_step_*.jsonl")))
    if (folder / RECORDS_DIR).is_dir():
        try:
            run.records = read_records(folder, run.skipped)
        except DataError as error:
            run.skipped.append(str(error))
    for key, path in find_results(folder).items():
        try:
            run.baseline_differences += _read_differences(path, folder.resolve())
            run.result_files[key] = path
            run.result_tables[key] = path.with_suffix(".md").read_text(encoding="utf-8", errors="replace")
        except DataError as error:
            run.skipped.append(str(error))
        except OSError as error:
            run.skipped.append(f"{error.filename} can't be read: {error.strerror}")
    return run


def _read_differences(path: Path, folder: Path) -> list[dict[str, Any]]:
    """Entries that compare the run's student or checkpoints with a baseline."""
    models, entries = read_results(path)
    names = {name for name, model in models.items() if folder in (Path(model), Path(model).parent)}
    return [entry for entry in entries if entry["model"] in names and "difference" in entry]


def _read_trainer_state(folder: Path) -> dict[str, Any]:
    """Trainer state from the end of the run, otherwise from its last checkpoint."""
    newest_first = [folder, *reversed(list_checkpoints(folder))]
    path = next((f / TRAINER_STATE_NAME for f in newest_first if (f / TRAINER_STATE_NAME).is_file()), None)
    if path is None:
        return {}
    try:
        state = dict(json.loads(path.read_text(encoding="utf-8")))
        history = [dict(entry) | {"step": int(entry["step"])} for entry in state["log_history"]]
        steps = {name: int(state[name]) for name in ("global_step", "max_steps")}
        return state | steps | {"log_history": history}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} is damaged: {' '.join(repr(error).split())[:200]}") from error
