"""The page: one HTML file with its data, style and scripts."""

from collections.abc import Sequence
from importlib import resources
from importlib.metadata import version
from itertools import chain, groupby, repeat
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from ..analysis.left_out import leave_out_failure, shorten_reasons, warn_of_skipped
from ..analysis.write_figures import name_folders
from ..errors import DataError, OutputDirError
from ..files import read_bounded, wrap_os_errors, write_atomically
from .charts import build_charts
from .figures import plot_figures
from .findings import find_notable
from .glossary import GLOSSARY
from .load import RunReport, load_run
from .summary import list_headlines, list_scores
from .tokens import pack_records

_REPORT_MARKER = "<footer>Written by tsdkd "
_MAX_REPORT_MIB = 256


def write_report(folders: Sequence[Path], output: Path) -> Path:
    """One HTML file about some runs.

    Raises:
        DataError: a directory isn't a run's, or something in it can't be read.
        OutputDirError: the file can't be written, or is something else than a report.
    """
    with wrap_os_errors(output, "--output_file"):
        if output.exists() and not _is_report(output):
            raise OutputDirError(f"--output_file: {output} isn't a report; choose another file")
    runs = [load_run(name, folder) for name, folder in name_folders(folders).items()]
    skipped: list[str] = []
    page = render_page(runs, skipped)
    warn_of_skipped([*(reason for run in runs for reason in run.skipped), *skipped])
    write_atomically(output, page, "--output_file")
    return output


def _is_report(path: Path) -> bool:
    try:
        return _REPORT_MARKER.encode() in read_bounded(path, _MAX_REPORT_MIB)
    except DataError:
        return False


def render_page(runs: Sequence[RunReport], skipped: list[str]) -> str:
    """The page. Whatever comes from runs is escaped; `skipped` takes the parts that can't be shown."""
    environment = Environment(undefined=StrictUndefined, autoescape=True, trim_blocks=True)
    template = environment.from_string(_read_asset("page.html.j2"))
    curves, figures = build_charts(runs, skipped), plot_figures(runs, skipped)
    charts = [chart for group in curves for chart in group.charts]
    for number, chart in enumerate(charts):
        chart["id"] = number
    packed: list[dict[str, Any]] = []
    for run in runs:
        with leave_out_failure(f"{run.name}: tokens", skipped):
            packed += [pack_records(run.name, run.records)] if run.records else []
    return template.render(
        title=f"tsdkd report: {' and '.join(run.name for run in runs)}",
        style=Markup(_read_asset("page.css")),
        scripts=[Markup(_read_asset(name)) for name in ("charts.js", "tokens.js")],
        footer=Markup(_REPORT_MARKER + version("tsdkd")),
        skipped=shorten_reasons(skipped),
        summaries=[_summarize(run) for run in runs],
        result_tables=[
            (f"{run.name}: {name}", _markdown_to_html(text))
            for run in runs
            for name, text in run.result_tables.items()
        ],
        curves=curves,
        charts=charts,
        figures=figures,
        recorded=[(run.name, run.records) for run in runs if run.records],
        completions=[(run.name, table) for run in runs for table in run.completions],
        packed=packed,
        names=[run.name for run in runs],
        differing=_differing_values(runs),
        configurations=[(run.name, run.config_text) for run in runs],
        glossary=GLOSSARY,
    )


def _summarize(run: RunReport) -> dict[str, Any]:
    """What the template says about a run at the top."""
    done, planned = (run.state.global_step, run.state.max_steps) if run.state else (0, 0)
    return {
        "name": run.name,
        "method": run.format_value("method"),
        "student": run.format_value("model_name_or_path"),
        "teacher": run.format_value("teacher_model_name_or_path"),
        "teacher_prompts": run.config.get("teacher_chat_template_kwargs", "none"),
        "prompts": run.format_value("dataset_name"),
        "num_generations": run.config.get("num_generations", "1"),
        "steps": f"{done} of {planned}" if planned > 0 else str(done) if run.state else "no log yet",
        "duration": run.duration,
        "headlines": list_headlines(run),
        "scores": list_scores(run),
        "findings": find_notable(run),
    }


def _differing_values(runs: Sequence[RunReport]) -> dict[str, list[str]]:
    """Key -> what each run has, where they differ; a key that wasn't set has the default of all."""
    keys = sorted({key for run in runs for key in run.config} - {"output_dir", "run_name"})
    values_by_key = {key: [run.config.get(key, "default") for run in runs] for key in keys}
    return {key: values for key, values in values_by_key.items() if len(set(values)) > 1}


def _read_asset(name: str) -> str:
    return resources.files("tsdkd").joinpath("report", name).read_text(encoding="utf-8")


def _markdown_to_html(markdown: str) -> Markup:
    """Convert the Markdown that tsdkd writes itself: tables (rows of cells between bars) and paragraphs."""
    parts: list[str] = []
    for is_table, lines in groupby(markdown.splitlines(), lambda line: line.startswith("|")):
        if is_table:
            rows = [[cell.replace("\\|", "|") for cell in line.strip("|").split(" | ")] for line in lines]
            rows = [cells for cells in rows if not set("".join(cells)) <= set("-: |")]
            html = [_row_to_html(kind, cells) for kind, cells in zip(chain(["th"], repeat("td")), rows, strict=False)]
            parts += ["<table>", *html, "</table>"]
        else:
            parts += [f"<p>{escape(line)}</p>" for line in lines if line.strip()]
    return Markup("".join(parts))


def _row_to_html(kind: str, cells: Sequence[str]) -> str:
    return "".join(["<tr>", *(f"<{kind}>{escape(cell.strip('* '))}</{kind}>" for cell in cells), "</tr>"])
