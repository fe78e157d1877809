"""The charts of the runs' logs, as numbers: which runs share a chart, and its lines. charts.js draws them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..methods import METHODS
from .chart_specs import FOLDED_CHARTS, HIDDEN_METRICS, MAIN_CHARTS, METRIC_HELP, ChartSpec
from .load import RunReport
from .trainer_state import Curve

_MAX_POINTS = 400
_MAX_CHARTS = 100
_MAX_METRICS = 12  # in one chart


@dataclass(frozen=True)
class ChartGroup:
    """Charts under one title; a folded group is closed when the page opens."""

    title: str
    is_folded: bool
    charts: list[dict[str, Any]]


def build_charts(runs: Sequence[RunReport], skipped: list[str]) -> list[ChartGroup]:
    """The charts of the logged metrics, as charts.js takes them; `skipped` takes how many don't fit in a page."""
    logged = dict.fromkeys(name for run in runs for name in run.curves)
    left = [name for name in logged if not name.startswith(HIDDEN_METRICS)]
    groups = []
    for title, specs in (("", MAIN_CHARTS), *FOLDED_CHARTS):
        charts: list[dict[str, Any]] = []
        for spec in specs:
            names = _match(spec, left)
            left = [name for name in left if name not in set(names)]
            charts += _build(spec, names, runs)
        if charts:
            groups.append(ChartGroup(title, bool(title), charts))
    return _limit(groups, skipped)


def _match(spec: ChartSpec, names: Sequence[str]) -> list[str]:
    """The spec's metrics that were logged, in its order. Those that one chart can't hold stay for others."""
    found = []
    for metric in spec.metrics:
        is_prefix = not metric or metric.endswith(("/", "_", "@"))
        found += [name for name in names if (name.startswith(metric) if is_prefix else name == metric)]
    found = list(dict.fromkeys(found))
    return found[:_MAX_METRICS] if spec.together else found


def _build(spec: ChartSpec, names: Sequence[str], runs: Sequence[RunReport]) -> Iterator[dict[str, Any]]:
    """A chart for all metrics or for each, and for each set of runs that may share an axis."""
    for metrics in [names] if spec.together else [[name] for name in names]:
        logged = [i for i, run in enumerate(runs) if any(run.curves.get(name) for name in metrics)]
        panels = _split(spec, logged, runs)
        for panel in panels:
            lines = list(_build_lines(spec, metrics, panel, runs))
            yield {
                "title": spec.title or metrics[0],
                "runs": [runs[i].name for i in panel] if len(runs) > 1 and len(panels) > 1 else [],
                "method": runs[panel[0]].format_value("method") if spec.shared_by == "same loss" else "",
                "help": spec.help or METRIC_HELP.get(metrics[0].removeprefix("eval_"), ""),
                "unit": spec.unit,
                "log": spec.is_log,
                "lines": lines,
                "is_number": all(len(line["x"]) == 1 for line in lines),
            }


def _split(spec: ChartSpec, logged: Sequence[int], runs: Sequence[RunReport]) -> list[list[int]]:
    """Sets of runs that may share an axis."""
    if spec.shared_by == "all runs":
        return [list(logged)] if logged else []
    if spec.shared_by == "one run":
        return [[i] for i in logged]
    by_loss: dict[Any, list[int]] = {}
    for i in logged:
        by_loss.setdefault(_describe_loss(runs[i]), []).append(i)
    return list(by_loss.values())


def _describe_loss(run: RunReport) -> tuple[str, ...]:
    """What a run's loss depends on: the method, and the values of its objective's options."""
    method = run.format_value("method")
    objective = getattr(METHODS.get(method), "objective_class", None)
    names = [f.name for f in fields(objective) if f.init] if objective else []
    return (method, *(f"{name}={run.config.get(name)}" for name in sorted({*names, "temperature"})))


def _build_lines(
    spec: ChartSpec, metrics: Sequence[str], panel: Sequence[int], runs: Sequence[RunReport]
) -> Iterator[dict[str, Any]]:
    """A line for each metric of each run. Colors tell runs apart, or, in a chart of one run alone, metrics."""
    has_many = spec.together and (len(spec.metrics) > 1 or spec.metrics[0].endswith("/"))
    for i in panel:
        for j, metric in enumerate(metrics):
            curve = sorted(runs[i].curves.get(metric, []), key=lambda point: point[0])
            if not curve:
                continue
            short = metric.rpartition("/")[2].removesuffix("_seconds").removeprefix("eval_") if has_many else ""
            name = metric if len(runs) == 1 and not short else short
            is_alone = spec.shared_by == "one run"
            points = _thin_out(curve)
            yield {
                "run": i,
                "name": name,
                "named_by_run": len(runs) > 1 and not is_alone,
                "color": j if is_alone else i,
                "dash": j if not is_alone else 0,
                "x": [step for step, _ in points],
                "y": [_round(spec.scale * value) for _, value in points],
            }


def _thin_out(curve: Curve) -> Curve:
    """At most `_MAX_POINTS` points: of each stretch of steps the lowest and the highest, so that no peak is lost.

    If the curve has values that aren't finite, the first of each stretch is kept, too.
    """
    if len(curve) <= _MAX_POINTS:
        return curve
    inner, is_finite = curve[1:-1], all(math.isfinite(value) for _, value in curve)
    count = (_MAX_POINTS - 2) // (2 if is_finite else 3)
    points = [curve[0]]
    for i in range(count):
        stretch = inner[i * len(inner) // count : (i + 1) * len(inner) // count]
        by_value = sorted((point for point in stretch if math.isfinite(point[1])), key=lambda point: point[1])
        gaps = [point for point in stretch if not math.isfinite(point[1])]
        points += sorted({*by_value[:1], *by_value[-1:], *gaps[:1]}, key=lambda point: point[0])
    return [*points, curve[-1]]


def _round(value: float) -> float | None:
    """Six digits; None, which JSON knows, for a value that isn't finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _limit(groups: Sequence[ChartGroup], skipped: list[str]) -> list[ChartGroup]:
    count = sum(len(group.charts) for group in groups)
    if count <= _MAX_CHARTS:
        return list(groups)
    skipped.append(f"{count - _MAX_CHARTS} of {count} curves: a page has {_MAX_CHARTS}")
    kept, room = [], _MAX_CHARTS
    for group in groups:
        kept.append(ChartGroup(group.title, group.is_folded, group.charts[:room]))
        room -= len(kept[-1].charts)
    return [group for group in kept if group.charts]
