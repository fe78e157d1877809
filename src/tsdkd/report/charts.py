"""matplotlib's figures as inline SVG that follows the page's colours."""

import io
import re
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")
from markupsafe import Markup
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from ..analysis import pass_at_k
from ..analysis.figures import COLORS, FIGURES, plot_figure
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


def plot_metrics(runs: Sequence[RunReport]) -> list[tuple[str, Markup]]:
    """Every logged metric: its name and its chart, with a line a run."""
    names = dict.fromkeys(name for run in runs for name in run.curves)
    ordered = [name for _, starts in _METRIC_GROUPS for name in names if name.startswith(starts)]
    charts = []
    for name in dict.fromkeys(ordered):
        if any(len(run.curves.get(name, [])) > 1 for run in runs):
            charts.append((name, _plot_metric(name, runs)))
    return charts


def plot_figures(runs: Sequence[RunReport]) -> list[tuple[str, str, Markup]]:
    """The papers' figures of the runs that recorded or were evaluated: title, paper, chart."""
    recorded = {run.name: run.records for run in runs if run.records}
    figures = FIGURES if recorded else ()
    charts = [(f.title, f.paper, to_svg(plot_figure(f, f.compute(recorded)), f.title)) for f in figures]
    files = {f"{run.name}/{name}": path for run in runs for name, path in run.result_files.items()}
    if curves := pass_at_k.read_pass_at_k(files):
        title = pass_at_k.TITLE
        charts.append((title, pass_at_k.PAPER, to_svg(pass_at_k.plot_pass_at_k(curves), title)))
    return charts


def _plot_metric(name: str, runs: Sequence[RunReport]) -> Markup:
    figure, axis = plt.subplots(figsize=(4.6, 2.4), layout="constrained")
    for run, color in zip(runs, COLORS * 4, strict=False):
        points = run.curves.get(name, [])
        points = points[:: max(1, len(points) // _MAX_POINTS)]
        axis.plot(*zip(*points, strict=True), color=color, lw=1.2, label=run.name) if points else None
    axis.set_xlabel("step")
    axis.spines[["top", "right"]].set_visible(False)
    if len(runs) > 1:
        axis.legend(frameon=False, fontsize="small")
    return to_svg(figure, name)


def to_svg(figure: Figure, label: str) -> Markup:
    """Without a background, its text as text, in the page's own colours."""
    buffer = io.StringIO()
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": label, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"#000000|(?<=[:\s])black", "currentColor", text)
    for number, color in enumerate(COLORS):
        text = text.replace(color, f"var(--series-{number})")
    text = re.sub(r'id="([^"]+)"', lambda m: f'id="{_slug(label)}-{m[1]}"', text)
    text = re.sub(r"(#)((?:[mpC]|clip|image)\w+)(?=[\"')])", lambda m: f"#{_slug(label)}-{m[2]}", text)
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{Markup.escape(label)}" ', 1))


def _slug(text: str) -> str:
    return re.sub(r"\W+", "-", text)
