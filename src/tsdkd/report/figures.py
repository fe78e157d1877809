"""The papers' figures, drawn by matplotlib, as inline SVG in the page's colors."""

import hashlib
import io
import re
from collections.abc import Sequence

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from ..analysis import pass_at_k
from ..analysis.figures import COLORS, FIGURES, plot_figure, save_figure
from ..analysis.left_out import leave_out_failure
from ..errors import escape_line
from .load import RunReport


def plot_figures(runs: Sequence[RunReport], skipped: list[str]) -> list[tuple[str, str, Markup]]:
    """The papers' figures of the runs that have records or evaluations: title, paper, SVG.

    `skipped` takes the figures that can't be drawn, with the reason.
    """
    recorded = {run.name: run.records for run in runs if run.records}
    charts = []
    for figure in FIGURES if recorded else ():
        with leave_out_failure(figure.title, skipped):
            chart = to_svg(plot_figure(figure, figure.compute(recorded)), figure.title)
            charts.append((figure.title, figure.paper, chart))
    entries_by_file = {f"{run.name}/{name}": entries for run in runs for name, entries in run.results.items()}
    title = pass_at_k.TITLE
    with leave_out_failure(title, skipped):
        if curves := pass_at_k.collect_pass_at_k(entries_by_file):
            chart = to_svg(pass_at_k.plot_pass_at_k(curves, skipped), title)
            charts.append((title, pass_at_k.PAPER, chart))
    return charts


def to_svg(figure: Figure, title: str) -> Markup:
    """SVG without a background, with its text as text, in the page's colors."""
    buffer = io.StringIO()
    prefix = f"c{hashlib.sha256(escape_line(title).encode()).hexdigest()[:12]}"  # unique in the page
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix, "font.family": "sans-serif"}):
        save_figure(figure, buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<[^!>][^>]*>", lambda tag: _adapt_tag(tag[0], prefix), text[text.index("<svg") :])
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{Markup.escape(title)}" ', 1))


def _adapt_tag(tag: str, prefix: str) -> str:
    """Use the page's colors, and ids that are unique in the page. Text between tags doesn't change."""
    tag = re.sub(r"#000000|(?<=[:\s])black", "currentColor", tag)
    for number, color in enumerate(COLORS):
        tag = tag.replace(color, f"var(--series-{number})")
    tag = re.sub(r'id="([^"]+)"', lambda m: f'id="{prefix}-{m[1]}"', tag)
    return re.sub(r"(#)((?:[mpC]|clip|image)\w+)(?=[\"')])", lambda m: f"#{prefix}-{m[2]}", tag)
