"""Writes all figures of one or more runs, as pictures and as numbers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from ..config.console import PlainConsole
from ..errors import DataError, escape_line
from ..evaluation.results import ResultEntry, find_results, read_results
from ..files import atomic_path, ensure_dir, wrap_os_errors, write_atomically
from ..trainer.token_records import RECORDS_DIR
from . import pass_at_k
from .figures import FIGURES, plot_figure, save_figure
from .left_out import leave_out_damaged, leave_out_failure, warn_of_skipped
from .load import StepRecord, read_records


def write_figures(folders: Sequence[Path], output: Path) -> None:
    """Write each figure as `<name>.png`, and the numbers of all figures as `analysis.json`.

    A file that can't be read is skipped with a warning.

    Raises:
        DataError: a folder has neither readable records nor readable evaluations.
        OutputDirError: `output` can't be written.
    """
    skipped: list[str] = []
    runs, entries_by_file = _load_runs(folders, skipped)
    curves = pass_at_k.collect_pass_at_k(entries_by_file)
    ensure_dir(output, "--output_dir")
    numbers_by_figure: dict[str, Any] = {}
    table = Table("figure", "shows", "in the paper")

    def save(name: str, numbers: Any, figure: Figure, title: str, paper: str) -> None:
        figure.suptitle(title)
        with atomic_path(output / f"{name}.png", "--output_dir") as temporary:
            save_figure(figure, temporary, format="png", dpi=150)
        numbers_by_figure[name] = numbers
        table.add_row(f"{name}.png", title, paper)

    for spec in FIGURES if runs else ():
        with leave_out_failure(spec.title, skipped):
            data = spec.compute(runs)
            save(spec.name, data, plot_figure(spec, data), spec.title, spec.paper)
    if curves:
        with leave_out_failure(pass_at_k.TITLE, skipped):
            figure = pass_at_k.plot_pass_at_k(curves, skipped)
            save("pass_at_k", curves, figure, pass_at_k.TITLE, pass_at_k.PAPER)
    numbers = json.dumps(numbers_by_figure, indent=1, allow_nan=False)
    write_atomically(output / "analysis.json", numbers, "--output_dir")
    warn_of_skipped(skipped)
    console = PlainConsole()
    console.print(table)
    for run, records in runs.items():
        console.print(_summarize_run(run, records))
    console.print(escape_line(f"wrote the figures to {output}, and their numbers to analysis.json"))


def _load_runs(
    folders: Sequence[Path], skipped: list[str]
) -> tuple[dict[str, list[StepRecord]], dict[str, list[ResultEntry]]]:
    """Read the records and the results of evaluations in the folders. Raises `DataError`."""
    runs: dict[str, list[StepRecord]] = {}
    entries_by_file: dict[str, list[ResultEntry]] = {}
    for name, folder in name_folders(folders).items():
        before = len(skipped)
        with wrap_os_errors(folder, "RUN_DIR", "read"):
            paths = find_results(folder, skipped)
            for key, path in paths.items():
                with leave_out_damaged(skipped):
                    entries_by_file[f"{name}/{key}"] = read_results(path)[1]
            if not paths or (folder / RECORDS_DIR).is_dir():
                with leave_out_damaged(skipped):
                    runs[name] = read_records(folder, skipped)
        if not runs.get(name) and not any(f"{name}/{key}" in entries_by_file for key in paths):
            raise DataError(skipped[before])
    runs = {name: records for name, records in runs.items() if records}
    return runs, entries_by_file


def name_folders(folders: Sequence[Path]) -> dict[str, Path]:
    """Name -> folder: the name is the last component, or the whole path if folders share it. Raises `DataError`."""
    with wrap_os_errors(folders[0], "RUN_DIR", "read"):
        missing = [str(folder) for folder in folders if not folder.is_dir()]
    if missing:
        raise DataError(f"no such directory: {', '.join(missing)}")
    names = [folder.resolve().name or str(folder) for folder in folders]
    return {name if names.count(name) == 1 else str(f): f for name, f in zip(names, folders, strict=True)}


def _summarize_run(run: str, records: Sequence[StepRecord]) -> str:
    last = records[-1]
    ours, theirs = (100 * float((last.columns[f"{who}_entropy"] >= 1.0).mean()) for who in ("student", "teacher"))
    return escape_line(
        f"{run}: {len(records)} records; the last one, after {last.step} steps, has {len(last.samples)} completions. "
        f"Tokens with an entropy of at least 1 nat: student {ours:.1f} %, teacher {theirs:.1f} % (EOPD, Sec. 3.1: 6.8 "
        "and 18.5)"
    )
