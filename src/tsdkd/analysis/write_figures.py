"""Every figure of some runs, as pictures and as numbers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from ..errors import DataError
from ..evaluation.results import find_results
from ..files import ensure_dir, write_atomically
from ..trainer.token_records import RECORDS_DIR
from . import pass_at_k
from .figures import FIGURES, plot_figure
from .load import StepRecord, read_records


def write_figures(folders: Sequence[Path], output: Path) -> None:
    """Write `<name>.png` of every figure and `analysis.json` with all their numbers.

    Raises:
        DataError: a folder with neither records nor evaluations.
        OutputDirError: `output` can't be made.
    """
    runs, result_files = _load_runs(folders)
    curves = pass_at_k.read_pass_at_k(result_files)
    ensure_dir(output, "--figures_dir")
    numbers_by_figure: dict[str, Any] = {}
    table = Table("figure", "shows", "in the paper")

    def save(name: str, numbers: Any, figure: Figure, title: str, paper: str) -> None:
        numbers_by_figure[name] = numbers
        figure.suptitle(title)
        figure.savefig(output / f"{name}.png", dpi=150)
        plt.close(figure)
        table.add_row(f"{name}.png", title, paper)

    for spec in FIGURES if runs else ():
        data = spec.compute(runs)
        save(spec.name, data, plot_figure(spec, data), spec.title, spec.paper)
    if curves:
        save("pass_at_k", curves, pass_at_k.plot_pass_at_k(curves), pass_at_k.TITLE, pass_at_k.PAPER)
    write_atomically(output / "analysis.json", json.dumps(numbers_by_figure, indent=1, allow_nan=False))
    console = Console(highlight=False)
    console.print(table)
    for run, records in runs.items():
        console.print(_summarize_run(run, records))
    console.print(f"written to {output}, the numbers in analysis.json")


def _load_runs(folders: Sequence[Path]) -> tuple[dict[str, list[StepRecord]], dict[str, Path]]:
    """Records of the folders that have some, and results of evaluations. Raises `DataError`."""
    runs: dict[str, list[StepRecord]] = {}
    result_files: dict[str, Path] = {}
    for name, folder in name_folders(folders).items():
        results = {f"{name}/{key}": path for key, path in find_results(folder).items()}
        result_files |= results
        if not results or (folder / RECORDS_DIR).is_dir():
            runs[name] = read_records(folder)
    return runs, result_files


def name_folders(folders: Sequence[Path]) -> dict[str, Path]:
    """Name -> folder: its last component, or its whole path where two folders share that. Raises `DataError`."""
    missing = [str(folder) for folder in folders if not folder.is_dir()]
    if missing:
        raise DataError(f"no such directory: {', '.join(missing)}")
    names = [folder.resolve().name for folder in folders]
    return {name if names.count(name) == 1 else str(f): f for name, f in zip(names, folders, strict=True)}


def _summarize_run(run: str, records: Sequence[StepRecord]) -> str:
    last = records[-1]
    ours, theirs = (100 * float((last.columns[f"{who}_entropy"] >= 1.0).mean()) for who in ("student", "teacher"))
    return (
        f"{run}: {len(records)} records, the last after {last.step} steps, {len(last.samples)} completions; tokens of "
        f"1 nat or more: student {ours:.1f} %, teacher {theirs:.1f} % (EOPD, Sec. 3.1: 6.8 and 18.5)"
    )
