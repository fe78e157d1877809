"""The page: template, style and script, with everything in it."""

import sys
from collections.abc import Sequence
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ..analysis.write_figures import named
from ..errors import OutputDirError
from ..run.output_dir import make_folder, writing
from . import charts
from .findings import verdict
from .load import Run, gather
from .tokens import pack

_MARK = "<footer>Written by tsdkd "


def write_report(folders: Sequence[Path], output: Path) -> Path:
    """One HTML file about some runs.

    Raises:
        DataError: a directory isn't a run's, or something in it can't be read.
        OutputDirError: the file can't be written, or is something else than a report.
    """
    with writing(output, "--output"):
        if output.exists() and _MARK.encode() not in output.read_bytes():
            raise OutputDirError(f"--output: {output} isn't a report; choose another file")
    runs = [gather(name, folder) for name, folder in named(folders).items()]
    for reason in (reason for run in runs for reason in run.left_out):
        print(f"left out: {reason}", file=sys.stderr)
    make_folder(output.parent, "--output")
    page = render(runs)
    with writing(output, "--output"):
        output.write_text(page, encoding="utf-8")
    return output


def render(runs: Sequence[Run]) -> str:
    """The page. Whatever comes from runs is escaped."""
    environment = Environment(undefined=StrictUndefined, autoescape=True, trim_blocks=True)
    template = environment.from_string(_part("page.html.j2"))
    packed: dict[str, Any] = {run.name: pack(run.records) for run in runs if run.records}
    return template.render(
        title=" and ".join(run.name for run in runs),
        style=Markup(_part("page.css")),
        script=Markup(_part("page.js")),
        footer=Markup(_MARK + version("tsdkd")),
        verdicts=[(run, verdict(run)) for run in runs],
        evaluations=[(f"{run.name}: {name}", _table(text)) for run in runs for name, text in run.evaluations.items()],
        curves=charts.curves(runs),
        analyses=charts.analyses(runs),
        recorded=[(run.name, run.records) for run in runs if run.records],
        packed=packed,
        names=[run.name for run in runs],
        differing=_differing(runs),
        configurations=[(run, yaml.safe_dump(run.config, allow_unicode=True)) for run in runs],
    )


def _differing(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Key -> what each run has, where they differ; a key that wasn't set has the default of all."""
    keys = sorted({key for run in runs for key in run.config} - {"output_dir", "run_name"})
    values = {key: [str(run.config.get(key, "default")) for run in runs] for key in keys}
    return {key: of for key, of in values.items() if len(set(of)) > 1}


def _part(name: str) -> str:
    return resources.files("tsdkd").joinpath("report", name).read_text(encoding="utf-8")


def _table(markdown: str) -> Markup:
    """Of the tables that tsdkd writes itself: rows of cells between bars, and paragraphs."""
    parts: list[Markup] = []
    lines: list[list[str]] = []

    def close() -> None:
        if lines:
            rows = Markup("").join(
                Markup("<tr>{}</tr>").format(
                    Markup("").join(Markup("<{0}>{1}</{0}>").format(kind, cell.strip("* ")) for cell in cells)
                )
                for kind, cells in zip(["th"] + ["td"] * len(lines), lines, strict=False)
            )
            parts.append(Markup("<table>{}</table>").format(rows))
            lines.clear()

    for line in markdown.splitlines():
        if line.startswith("|"):
            cells = line.strip("|").split(" | ")
            if not set("".join(cells)) <= set("-: |"):
                lines.append(cells)
            continue
        close()
        if line.strip():
            parts.append(Markup("<p>{}</p>").format(line))
    close()
    return Markup("").join(parts)
