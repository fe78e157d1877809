"""The tables of a comparison, in Markdown: means, differences from the baseline, and what the grid chose."""

from collections.abc import Sequence

import numpy as np

from ..errors import escape_line
from ..evaluation.pass_at_k import default_ks
from ..evaluation.problem_set import at_temperature
from ..evaluation.results import format_table
from ..evaluation.scores import NUM_RESAMPLES, format_p_value, paired_permutation_test
from .comparison import Comparison, format_grid_values
from .grid import GridSearch, describe_edge
from .paired import paired_difference
from .summary import RunSummary

_COLUMN_TITLES = {"length": "length, tokens", "entropy": "entropy, nats", "train_seconds": "training, s"}
_DIGITS = {"entropy": 3, "train_seconds": 0}
_MIN_SAMPLES_FOR_CURVE = 4  # below, the first table has every pass@k


def metric_names(comparison: Comparison) -> list[str]:
    """The columns of the first table. The first three are accuracies in percent."""
    n = comparison.eval_samples
    others = [at_temperature(f"{name}@{n}", t) for t in _other_temperatures(comparison) for name in ("avg", "pass")]
    return ["greedy", f"avg@{n}", f"pass@{n}", *others, "length", "entropy", "train_seconds"]


def all_metrics(comparison: Comparison) -> list[str]:
    """Every metric of a result."""
    lengths = [at_temperature("length", t) for t in _other_temperatures(comparison)]
    return [*comparison.accuracy_metrics, "length", *lengths, "entropy", "train_seconds"]


def _other_temperatures(comparison: Comparison) -> list[float]:
    return [t for t in comparison.eval_temperatures if t != 1]


def format_tables(comparison: Comparison, summaries: Sequence[RunSummary], searches: Sequence[GridSearch] = ()) -> str:
    """Format all tables.

    Args:
        comparison: the comparison.
        summaries: the runs and the reference models, at least one.
        searches: the grid of each run.
    """
    base = next((s for s in summaries if s.run_name == comparison.baseline_run), None)
    parts = [_format_means(comparison, summaries, base)]
    if comparison.eval_samples >= _MIN_SAMPLES_FOR_CURVE:
        parts += [_format_pass_at_k(comparison, summaries, t) for t in (1.0, *_other_temperatures(comparison))]
    parts += [_format_paired(comparison, summaries, base)] if base is not None else []
    parts += [_format_grid(comparison, searches)] if searches else []
    return "\n".join(part for part in parts if part)


def _format_means(comparison: Comparison, summaries: Sequence[RunSummary], base: RunSummary | None) -> str:
    """Means over seeds with 95 % intervals, and the test against the baseline."""
    metrics = metric_names(comparison)
    titles = [_COLUMN_TITLES.get(metric, metric) for metric in metrics]
    header = ["", *titles, f"avg@{comparison.eval_samples} against {comparison.baseline_run}"]
    rows = []
    trained = [s for s in summaries if not s.is_reference]
    accuracies = [metric for metric in metrics if metric in comparison.accuracy_metrics]
    best = {metric: max((s.means[metric] for s in trained), default=None) for metric in accuracies}
    for summary in summaries:
        cells = [_format_cell(summary, metric, best.get(metric)) for metric in metrics]
        rows.append([summary.run_name, *cells, _format_difference(summary, base)])
    return f"{format_table(header, rows)}\n{_format_note(len(summaries[0].solve_rates), trained)}\n"


def _format_note(num_problems: int, trained: Sequence[RunSummary]) -> str:
    counts = sorted({len(s.seeds) for s in trained})
    if not counts:
        spread = "No run is finished."
    elif counts == [1]:
        spread = "One seed: no interval."
    else:
        single = " (a run with one seed has no interval)" if counts[0] == 1 else ""
        spread = f"Mean ± half the width of the 95 % interval over {' to '.join(map(str, counts))} seeds{single}."
    return (
        f"{num_problems} problem{'' if num_problems == 1 else 's'}. {spread} Bold: the highest accuracy of the "
        "trained runs. Last column: difference in points, and two-sided p-value of a paired permutation test over the "
        f"problems ({NUM_RESAMPLES:,} sign flips)."
    )


def _format_cell(summary: RunSummary, metric: str, best: float | None) -> str:
    mean, half_width = summary.means[metric], summary.half_widths[metric]
    if metric == "train_seconds" and summary.is_reference:
        return ""
    digits = _DIGITS.get(metric, 1)
    text = f"{mean:.{digits}f}"
    text = f"**{text}**" if mean == best and not summary.is_reference else text
    return text if np.isnan(half_width) else f"{text} ± {half_width:.{digits}f}"


def _format_difference(summary: RunSummary, base: RunSummary | None) -> str:
    if base is None or summary.run_name == base.run_name or summary.is_reference:
        return ""
    difference = 100 * float((summary.solve_rates - base.solve_rates).mean())
    p = paired_permutation_test(summary.solve_rates, base.solve_rates)
    return f"{difference:+.1f} ({format_p_value(p)})"


def _format_pass_at_k(comparison: Comparison, summaries: Sequence[RunSummary], temperature: float) -> str:
    names = [at_temperature(f"pass@{k}", temperature) for k in default_ks(comparison.eval_samples)]
    rows = [[s.run_name, *(f"{s.means[name]:.1f}" for name in names)] for s in summaries]
    title = f"at temperature {temperature:g}"
    title += f", top-p {comparison.eval_top_p:g}" if comparison.eval_top_p != 1 else ""
    return format_table([title, *(name.partition(" ")[0] for name in names)], rows)


def _format_paired(comparison: Comparison, summaries: Sequence[RunSummary], base: RunSummary) -> str:
    """The differences from the baseline, seed by seed."""
    metrics = [name for name in metric_names(comparison) if name != "train_seconds"]
    others = [s for s in summaries if not s.is_reference and s is not base]
    rows = [[s.run_name, *(_format_paired_cell(s, base, metric) for metric in metrics)] for s in others]
    if not any(any(row[1:]) for row in rows):  # a single seed
        return ""
    titles = [_COLUMN_TITLES.get(metric, metric) for metric in metrics]
    note = (
        f"Difference from {base.run_name}, paired by seed, with its 95 % interval (Student's t). After the slash: the "
        "smallest true difference that a paired t-test at 5 % finds with a power of 80 %, with these seeds and this "
        "scatter. Smaller ones can't be decided here. Without scatter there is neither."
    )
    return f"{format_table([f'difference from {base.run_name}', *titles], rows)}\n{escape_line(note)}\n"


def _format_paired_cell(summary: RunSummary, base: RunSummary, metric: str) -> str:
    paired, digits = paired_difference(summary, base, metric), _DIGITS.get(metric, 1)
    if paired.num_seeds < 2:
        return ""
    if np.isnan(paired.low):
        return f"{paired.mean:+.{digits}f}"
    numbers = (f"{value:+.{digits}f}" for value in (paired.mean, paired.low, paired.high))
    return "{} [{}, {}]".format(*numbers) + f" / {paired.detectable:.{digits}f}"


def _format_grid(comparison: Comparison, searches: Sequence[GridSearch]) -> str:
    """The mean on the validation problems for each point of the grid and each run; the chosen ones are bold."""
    rows = []
    for index, point in enumerate(comparison.grid_points):
        means = [_format_grid_cell(search, index) for search in searches]
        rows.append([format_grid_values(point), *means])
    seeds = comparison.validation_seeds or ()
    spread = f"{'mean over seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}"
    edges = " ".join(f"{edge}." for edge in map(describe_edge, searches) if edge)
    note = (
        f"{comparison.validation_metric} on the validation problems, {spread}. Bold: what the grid "
        f"chose, once it is finished; the runs above were trained with it. {edges}"
    )
    table = format_table(["grid", *(search.run for search in searches)], rows)
    return f"{table}\n{escape_line(note.strip())}\n"


def _format_grid_cell(search: GridSearch, index: int) -> str:
    mean = search.means[index]
    text = "" if mean is None else f"{mean:.1f}"
    return f"**{text}**" if index == search.best else text
