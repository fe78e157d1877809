"""pass@k of evaluated models: EOPD's Figures 2, 7 and 8."""

import math
import re
from collections.abc import Mapping, Sequence
from itertools import islice

from matplotlib.figure import Figure

from ..evaluation.results import ResultEntry
from ..evaluation.suites import benchmark_title
from .figures import COLORS, label, plain_ticks

TITLE, PAPER = "pass@k", "EOPD, Figures 2, 7 and 8"
_COLUMNS = 3
_MAX_PLOTS, _MAX_LINES = 24, 24
_Curves = dict[str, dict[str, dict[str, list[float]]]]


def collect_pass_at_k(entries_by_file: Mapping[str, Sequence[ResultEntry]]) -> _Curves:
    """Benchmark -> model -> `k` and `percent`; of benchmarks that were sampled."""
    curves: _Curves = {}
    for name, entries in entries_by_file.items():
        for entry in entries:
            match = re.fullmatch(r"(avg|pass)@([1-9][0-9]{0,6})", entry["metric"])
            if not match:
                continue
            model = entry["model"] if len(entries_by_file) == 1 else f"{name}: {entry['model']}"
            curve = curves.setdefault(entry["benchmark"], {}).setdefault(model, {"k": [], "percent": []})
            curve["k"].append(int(match[2]) if match[1] == "pass" else 1)  # avg@n is pass@1
            curve["percent"].append(entry["mean"])
    return curves


def plot_pass_at_k(curves: _Curves, skipped: list[str]) -> Figure:
    """A plot for each benchmark, for the caller to save; `skipped` takes what doesn't fit."""
    models = list(dict.fromkeys(model for by_model in curves.values() for model in by_model))
    if len(curves) > _MAX_PLOTS or len(models) > _MAX_LINES:
        skipped.append(
            f"pass@k has {len(curves)} benchmarks and {len(models)} models: the first {_MAX_PLOTS} of each are drawn"
        )
    curves, models = dict(islice(curves.items(), _MAX_PLOTS)), models[:_MAX_LINES]
    columns = min(len(curves), _COLUMNS)
    rows = math.ceil(len(curves) / columns)
    size = (6.4, 3.4) if len(curves) == 1 else (3.4 * columns, 2.9 * rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, (benchmark, by_model) in zip(axes.flat, curves.items(), strict=False):
        drawn = {model: curve for model, curve in by_model.items() if model in models}
        for model, curve in drawn.items():
            color = COLORS[models.index(model) % len(COLORS)]
            axis.plot(curve["k"], curve["percent"], ".-", color=color, label=label(model))
        axis.set_xscale("log", base=2)
        ticks = sorted({k for curve in drawn.values() for k in curve["k"]})
        axis.set_xticks(ticks, [str(k) for k in ticks])
        title = label(benchmark_title(benchmark)) if len(curves) > 1 else None
        axis.set(title=title, xlabel="k", ylabel="pass@k, %")
        plain_ticks(axis)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(curves) :]:
        axis.remove()
    axes.flat[0].legend(frameon=False, fontsize="small")
    return figure
