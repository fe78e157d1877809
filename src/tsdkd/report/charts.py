"""matplotlib's figures as inline SVG that follows the page's colours."""

import hashlib
import io
import re
from collections.abc import Sequence
from itertools import cycle

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from ..analysis import pass_at_k
from ..analysis.figures import COLORS, FIGURES, label, plot_figure, save_figure
from ..analysis.left_out import leave_out_failure
from ..errors import escape_line
from .load import RunReport

_METRIC_GROUPS = (  # title, how its metrics begin
    ("Loss", ("loss", "eval_loss")),
    ("Accuracy", ("eval_accuracy",)),
    ("Entropy, nats", ("entropy/",)),
    ("Opener and gate", ("opener/", "gate")),
    ("Completions", ("completions/",)),
    ("Gradient norm", ("grad_norm",)),
    ("Learning rate", ("learning_rate",)),
    ("Speed", ("speed/",)),
)
_MAX_POINTS = 400
_MAX_CHARTS = 60


def plot_metrics(runs: Sequence[RunReport], skipped: list[str]) -> list[tuple[str, Markup]]:
    """The logged metrics: name and chart, with a line a run; `skipped` takes what isn't drawn."""
    names = dict.fromkeys(name for run in runs for name in run.curves)
    ordered = [name for _, starts in _METRIC_GROUPS for name in names if name.startswith(starts)]
    curves = [n for n in dict.fromkeys(ordered) if any(len(run.curves.get(n, [])) > 1 for run in runs)]
    if len(curves) > _MAX_CHARTS:
        skipped.append(f"{len(curves) - _MAX_CHARTS} of {len(curves)} curves: a page has {_MAX_CHARTS}")
    charts = []
    for name in curves[:_MAX_CHARTS]:
        with leave_out_failure(name, skipped):
            charts.append((name, _plot_metric(name, runs)))
    return charts


def plot_figures(runs: Sequence[RunReport], skipped: list[str]) -> list[tuple[str, str, Markup]]:
    """The papers' figures of the runs that recorded or were evaluated: title, paper, chart."""
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


def _plot_metric(name: str, runs: Sequence[RunReport]) -> Markup:
    figure = Figure(figsize=(4.6, 2.4), layout="constrained")
    axis = figure.subplots()
    for run, color in zip(runs, cycle(COLORS), strict=False):
        points = run.curves.get(name, [])
        points = points[:: max(1, len(points) // _MAX_POINTS)]
        axis.plot(*zip(*points, strict=True), color=color, lw=1.2, label=label(run.name)) if points else None
    axis.set_xlabel("step")
    axis.spines[["top", "right"]].set_visible(False)
    if len(runs) > 1:
        axis.legend(frameon=False, fontsize="small")
    return to_svg(figure, name)


def to_svg(figure: Figure, title: str) -> Markup:
    """Without a background, its text as text, in the page's own colours."""
    buffer = io.StringIO()
    prefix = f"c{hashlib.sha256(escape_line(title).encode()).hexdigest()[:12]}"  # an id of the page's own
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix, "font.family": "sans-serif"}):
        save_figure(figure, buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<[^!>][^>]*>", lambda tag: _adapt_tag(tag[0], prefix), text[text.index("<svg") :])
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{Markup.escape(title)}" ', 1))


def _adapt_tag(tag: str, prefix: str) -> str:
    """The page's colours and ids; text between tags is left alone."""
    tag = re.sub(r"#000000|(?<=[:\s])black", "currentColor", tag)
    for number, color in enumerate(COLORS):
        tag = tag.replace(color, f"var(--series-{number})")
    tag = re.sub(r'id="([^"]+)"', lambda m: f'id="{prefix}-{m[1]}"', tag)
    return re.sub(r"(#)((?:[mpC]|clip|image)\w+)(?=[\"')])", lambda m: f"#{prefix}-{m[2]}", tag)
