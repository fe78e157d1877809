"""pass@k of evaluated models: EOPD's Figures 2, 7 and 8."""

import math
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from ..evaluation.results import read_results
from ..evaluation.suites import benchmark_title
from .figures import COLORS

TITLE, PAPER = "pass@k", "EOPD, Figures 2, 7 and 8"
_COLUMNS = 3
_Curves = dict[str, dict[str, dict[str, list[float]]]]


def read_pass_at_k(files: dict[str, Path]) -> _Curves:
    """Benchmark -> model -> `k` and `percent`; of benchmarks that were sampled.

    Raises:
        DataError: a file isn't from `tsdkd eval`.
    """
    curves: _Curves = {}
    for name, path in files.items():
        for entry in read_results(path)[1]:
            kind, _, k = entry["metric"].partition("@")
            if kind == "accuracy":
                continue
            model = entry["model"] if len(files) == 1 else f"{name}: {entry['model']}"
            curve = curves.setdefault(entry["benchmark"], {}).setdefault(model, {"k": [], "percent": []})
            curve["k"].append(int(k) if kind == "pass" else 1)  # avg@n is pass@1
            curve["percent"].append(entry["mean"])
    return curves


def plot_pass_at_k(curves: _Curves) -> Figure:
    """A plot for each benchmark, for the caller to save and close."""
    columns = min(len(curves), _COLUMNS)
    rows = math.ceil(len(curves) / columns)
    size = (6.4, 3.4) if len(curves) == 1 else (3.4 * columns, 2.9 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    models = list(dict.fromkeys(model for by_model in curves.values() for model in by_model))
    for axis, (benchmark, by_model) in zip(axes.flat, curves.items(), strict=False):
        for model, curve in by_model.items():
            color = COLORS[models.index(model) % len(COLORS)]
            axis.plot(curve["k"], curve["percent"], ".-", color=color, label=model)
        axis.set_xscale("log", base=2)
        ticks = sorted({k for curve in by_model.values() for k in curve["k"]})
        axis.set_xticks(ticks, [str(k) for k in ticks])
        axis.set(title=benchmark_title(benchmark) if len(curves) > 1 else None, xlabel="k", ylabel="pass@k, %")
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(curves) :]:
        axis.remove()
    axes.flat[0].legend(frameon=False, fontsize="small")
    return figure
