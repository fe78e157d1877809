"""A run's directory, read for the report."""

import re
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from ..analysis.left_out import leave_out_damaged, shorten_reasons
from ..analysis.load import StepRecord, read_records
from ..config.base import TokenSelectiveConfig
from ..config.coercion import shorten
from ..errors import DataError
from ..evaluation.results import ResultEntry, find_results, read_results
from ..files import read_bounded, wrap_os_errors
from ..run.output_dir import RUN_CONFIG_NAME, read_run_config
from ..trainer.token_records import RECORDS_DIR
from .completions import LoggedCompletions, read_completions
from .trainer_state import Curve, TrainerState, read_trainer_state

_MAX_CONFIG_MIB, _MAX_TABLE_MIB = 1, 0.125
_MAX_SECONDS = 1e9
_MAX_VALUE = 200  # characters


@dataclass
class RunReport:
    """A run.

    Attributes:
        name: in the report.
        folder: its directory.
        config: the resolved configuration, as text; a path is shortened to its last component.
        config_text: its file.
        state: the trainer's log; None before the first checkpoint.
        records: see `tsdkd.analysis`; empty where nothing was recorded.
        results: of `tsdkd eval`, in the run's directory: name -> entries of a `results-*.json`.
        result_models: their models: name of the results -> name of the model -> its path or its name on the hub.
        result_tables: their Markdown tables.
        baseline_differences: their entries that compare this run's student with a baseline.
        completions: some of the last rollout and of the last evaluation, if they were logged.
        num_nonfinite_steps: steps whose loss or gradient wasn't finite.
        skipped: why some of it couldn't be read.
    """

    name: str
    folder: Path
    config: dict[str, str] = field(default_factory=dict)
    config_text: str = ""
    state: TrainerState | None = None
    records: list[StepRecord] = field(default_factory=list)
    results: dict[str, list[ResultEntry]] = field(default_factory=dict)
    result_models: dict[str, dict[str, str]] = field(default_factory=dict)
    result_tables: dict[str, str] = field(default_factory=dict)
    baseline_differences: list[ResultEntry] = field(default_factory=list)
    completions: list[LoggedCompletions] = field(default_factory=list)
    num_nonfinite_steps: int = 0
    skipped: list[str] = field(default_factory=list)

    @property
    def curves(self) -> dict[str, Curve]:
        """Metric -> (step, value), of training and evaluation."""
        return self.state.curves if self.state else {}

    @property
    def accuracy(self) -> Curve:
        """Share of right completions of held-out prompts: of the most completions of each that were sampled."""
        averages = [name for name in self.curves if re.fullmatch(r"eval_avg@\d{1,6}", name)]
        name = max(averages, key=lambda name: int(name.partition("@")[2]), default="eval_accuracy")
        return self.curves.get(name, [])

    def format_value(self, key: str) -> str:
        """A setting for people who may have another machine: of a path its last component."""
        value = self.config.get(key, _describe_value(getattr(TokenSelectiveConfig, key, None)))
        return Path(value).name if Path(value).is_absolute() else value

    @property
    def duration(self) -> str | None:
        """h:mm:ss of training, since it was last started; None before its end."""
        seconds = self.curves.get("train_runtime", [(0, -1.0)])[-1][1]
        return str(timedelta(seconds=round(seconds))) if 0 <= seconds <= _MAX_SECONDS else None


def load_run(name: str, folder: Path) -> RunReport:
    """Read a run's directory. What can't be read is left out.

    Raises:
        DataError: it isn't one.
        OutputDirError: it can't be listed.
    """
    with wrap_os_errors(folder, "RUN_DIR", "read"):
        if not (folder / RUN_CONFIG_NAME).exists():
            raise DataError(f"{folder} isn't the directory of a run: it has no {RUN_CONFIG_NAME}")
        run = RunReport(name, folder)
        with leave_out_damaged(run.skipped):
            run.config_text = read_bounded(folder / RUN_CONFIG_NAME, _MAX_CONFIG_MIB).decode("utf-8", "replace")
            run.config = {_describe_value(k): _describe_value(v) for k, v in read_run_config(folder).items()}
        run.num_nonfinite_steps = len(list(folder.glob("nonfinite_step_*.jsonl")))
        with leave_out_damaged(run.skipped):
            run.state = read_trainer_state(folder, run.skipped)
        if (folder / RECORDS_DIR).is_dir():
            with leave_out_damaged(run.skipped):
                run.records = read_records(folder, run.skipped)
        run.completions = read_completions(folder, run.skipped)
        for key, path in find_results(folder, run.skipped).items():
            with leave_out_damaged(run.skipped):
                models, entries = read_results(path)
                table = read_bounded(path.with_suffix(".md"), _MAX_TABLE_MIB)
                run.baseline_differences += _select_differences(models, entries, folder.resolve())
                run.results[key], run.result_models[key] = entries, models
                run.result_tables[key] = table.decode("utf-8", "replace")
    run.skipped = shorten_reasons(run.skipped)
    return run


def _describe_value(value: Any) -> str:
    """A value of a configuration, which may be anything that YAML knows."""
    if isinstance(value, str):
        return value if len(value) <= _MAX_VALUE else f"{value[:_MAX_VALUE]}…"
    return "none" if value is None else shorten(value)


def _select_differences(models: dict[str, str], entries: list[ResultEntry], folder: Path) -> list[ResultEntry]:
    """Entries that compare the run's student or checkpoints with a baseline."""
    names = {name for name, model in models.items() if folder in (Path(model), Path(model).parent)}
    return [entry for entry in entries if entry["model"] in names and "difference" in entry]
