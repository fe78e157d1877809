"""What the top of the page says about a run: a few numbers, and the evaluations of student and teacher."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..evaluation.results import ResultEntry
from ..evaluation.suites import benchmark_title
from .load import RunReport
from .trainer_state import Curve

_MAX_SCORES = 12


@dataclass(frozen=True)
class Headline:
    """A number at the start and at the end of training.

    Attributes:
        title: what it is.
        text: the number, or both, with an arrow between.
        when: at which steps it was measured, and the change.
    """

    title: str
    text: str
    when: str


@dataclass(frozen=True)
class Score:
    """One metric of one benchmark, in percent; None where a model wasn't evaluated."""

    title: str
    before: float | None
    after: float | None
    teacher: float | None


def list_scores(run: RunReport) -> list[Score]:
    """Scores of the run's student, of the model that it started from, and of the teacher, from `tsdkd eval`."""
    return [score for key in run.results for score in _list_scores(run, key)][:_MAX_SCORES]


def list_headlines(run: RunReport) -> list[Headline]:
    """The accuracy and the loss, as far as they were measured."""
    accuracy = _accuracy_curve(run)
    scores = [score for score in list_scores(run) if score.before is not None and score.after is not None]
    headlines = []
    if scores and not (accuracy and accuracy[0][0] == 0 and len(accuracy) > 1):
        before, after = scores[0].before or 0.0, scores[0].after or 0.0
        change = f"before training → after training ({after - before:+.1f} points)"
        headlines.append(Headline(scores[0].title, f"{before:.1f} % → {after:.1f} %", change))
    elif accuracy:
        headlines.append(_compare_ends("Held-out accuracy", accuracy, "{:.1f} %", " points"))
    loss = [point for point in run.curves.get("loss", []) if math.isfinite(point[1])]
    if loss:
        headlines.append(_compare_ends("Loss", loss, "{:.4g}"))
    return headlines


def _compare_ends(title: str, curve: Curve, template: str, points: str = "") -> Headline:
    """First and last value. "Before training" is only what was measured at step 0."""
    (start, first), (end, last) = curve[0], curve[-1]
    if len(curve) == 1:
        return Headline(title, template.format(last), _describe_step(end))
    when = f"{_describe_step(start)} → {_describe_step(end)}"
    when += f" ({last - first:+.1f}{points})" if points else ""
    return Headline(title, f"{template.format(first)} → {template.format(last)}", when)


def _describe_step(step: int) -> str:
    return "before training (step 0)" if step == 0 else f"step {step}"


def _accuracy_curve(run: RunReport) -> Curve:
    """In percent."""
    return [(step, 100 * value) for step, value in run.accuracy if math.isfinite(value)]


def _list_scores(run: RunReport, key: str) -> Iterator[Score]:
    names = _find_models(run, run.result_models[key])
    if "after" not in names:
        return
    means: dict[tuple[str, str], dict[str, float]] = {}
    for entry in run.results[key]:
        for role, name in names.items():
            if entry["model"] == name:
                means.setdefault((entry["benchmark"], entry["metric"]), {})[role] = entry["mean"]
    for benchmark, metric in means:
        if _is_main_metric(metric, run.results[key]):
            found = means[benchmark, metric]
            title = benchmark_title(benchmark) if metric == "accuracy" else f"{benchmark_title(benchmark)}, {metric}"
            yield Score(title, found.get("before"), found.get("after"), found.get("teacher"))


def _find_models(run: RunReport, models: dict[str, str]) -> dict[str, str]:
    """Role -> name of the model that has it, by the models' paths."""
    paths = {
        "before": run.config.get("model_name_or_path"),
        "after": str(run.folder),
        "teacher": run.config.get("teacher_model_name_or_path"),
    }
    return {
        role: name
        for role, path in paths.items()
        for name, model in reversed(models.items())
        if path and model in (path, _resolve(path))
    }


def _resolve(path: str) -> str:
    """The path as `tsdkd eval` writes it; anything else, such as a name on the hub, compares with nothing."""
    try:
        return str(Path(path).resolve())
    except (OSError, RuntimeError, ValueError):
        return path


def _is_main_metric(metric: str, entries: list[ResultEntry]) -> bool:
    """Accuracy, avg@n and pass@n; not pass@k of fewer samples."""
    if not (match := re.fullmatch(r"pass@([1-9][0-9]{0,6})", metric)):
        return True
    return any(entry["metric"] == f"avg@{match[1]}" for entry in entries)
