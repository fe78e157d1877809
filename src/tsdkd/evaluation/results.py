"""Writes the table: models and benchmarks, intervals, tests, and the papers' results for the same pair."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..config.coercion import finite_number, shorten
from ..errors import DataError, escape_line, explain_damage
from ..files import parse_json, read_bounded, write_atomically
from ..run.output_dir import RUN_CONFIG_NAME, read_run_config
from .pass_at_k import default_ks, pass_at_k
from .scores import NUM_RESAMPLES, bootstrap_interval, format_p_value, paired_permutation_test
from .suites import Benchmark

ResultEntry = dict[str, Any]
"""`model`, `benchmark`, `metric`, `mean`; except for the baseline also `difference`, its interval, `p`, `baseline`."""
MAX_RESULTS = 24
_MAX_FILE_MIB = 16


@dataclass
class BenchmarkResult:
    """The result of one model on one benchmark.

    Attributes:
        model: name of the model.
        benchmark: the benchmark.
        scores: `[items, samples]`, in [0, 1].
        pass_at_ks: the k of pass@k in the Markdown table, each at most the number of samples; empty: that number.
    """

    model: str
    benchmark: Benchmark
    scores: np.ndarray
    pass_at_ks: Sequence[int] = ()

    @property
    def item_metrics(self) -> dict[str, np.ndarray]:
        """Metric -> `[items]`: accuracy, or avg@n and pass@k for `pass_at_ks`, the powers of two up to n, and n.

        There is no pass@1, which is avg@n.
        """
        n, num_correct = self.scores.shape[1], (self.scores >= 1).sum(axis=1)
        ks = sorted(k for k in {*default_ks(n), *self.pass_at_ks} if 1 < k <= n)
        pass_at_ks = {f"pass@{k}": pass_at_k(num_correct, n, k) for k in ks}
        return {self._mean_metric: self.scores.mean(axis=1), **pass_at_ks}

    @property
    def table_metrics(self) -> list[str]:
        """The metrics in the Markdown table."""
        n = self.scores.shape[1]
        ks = [k for k in self.pass_at_ks or (n,) if 1 < k <= n]
        return [self._mean_metric, *(f"pass@{k}" for k in ks)]

    @property
    def _mean_metric(self) -> str:
        return f"avg@{self.scores.shape[1]}" if self.benchmark.num_samples > 1 else "accuracy"


def write_results(
    results: Sequence[BenchmarkResult],
    models: dict[str, str],
    baseline: str,
    folder: Path,
    suite: str,
    settings: dict[str, Any] | None = None,
) -> Path:
    """Write `results-<suite>.json` and `results-<suite>.md`, with the settings. Returns the path of the latter."""
    result_entries = [
        entry for m in results for entry in _build_entries(m, _find_result(results, baseline, m.benchmark))
    ]
    paths = {name: str(Path(model).resolve()) if Path(model).is_dir() else model for name, model in models.items()}
    text = json.dumps({"models": paths, "settings": settings or {}, "results": result_entries}, indent=1)
    path = folder / f"results-{suite}.md"
    settings_line = ", ".join(f"{name} {value}" for name, value in (settings or {}).items())
    settings_line = f"\nSettings of {suite}: {escape_line(settings_line)}.\n" if settings_line else ""
    write_atomically(path.with_suffix(".json"), text)
    write_atomically(path, _format_markdown(results, result_entries, models, baseline) + settings_line)
    return path


def find_results(folder: Path, skipped: list[str]) -> dict[str, Path]:
    """Find the JSON files that `write_results` wrote, in a folder and its subfolders `eval*`. Returns name -> file.

    Returns at most `MAX_RESULTS` files; a message about the others is added to `skipped`.
    """
    paths = [*sorted(folder.glob("results-*.json")), *sorted(folder.glob("eval*/results-*.json"))]
    if len(paths) > MAX_RESULTS:
        skipped.append(f"{folder}: {len(paths) - MAX_RESULTS} results of evaluations, beyond the first {MAX_RESULTS}")
    return {f"{path.parent.name}/{path.stem.removeprefix('results-')}": path for path in paths[:MAX_RESULTS]}


def read_results(path: Path) -> tuple[dict[str, str], list[ResultEntry]]:
    """Read and check a `results-<suite>.json`. Returns its models and its entries. Raises `DataError`."""
    content = parse_json(read_bounded(path, _MAX_FILE_MIB), path)
    try:
        models = {name: _check_text("models", model) for name, model in content["models"].items()}
        return models, [_check_entry(entry) for entry in content["results"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} wasn't written by tsdkd eval: {explain_damage(error)}") from error


def _check_entry(entry: Any) -> ResultEntry:
    texts, numbers = ["model", "benchmark", "metric"], ["mean"]
    if "difference" in entry:
        texts, numbers = [*texts, "baseline"], [*numbers, "difference", "difference_low", "difference_high", "p"]
    checked = {name: _check_text(name, entry[name]) for name in texts}
    return checked | {name: _check_number(name, entry[name]) for name in numbers}


def _check_text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}: must be a string, found {shorten(value)}")
    return value


def _check_number(name: str, value: Any) -> float:
    try:
        return finite_number(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _build_entries(result: BenchmarkResult, base: BenchmarkResult) -> list[dict[str, Any]]:
    entries = []
    for metric, values in result.item_metrics.items():
        low, high = bootstrap_interval(values)
        entry: dict[str, Any] = {"model": result.model, "benchmark": result.benchmark.name, "metric": metric}
        entry |= {"items": len(values), "mean": 100 * float(values.mean()), "low": 100 * low, "high": 100 * high}
        if base.model != result.model:
            theirs = base.item_metrics[metric]
            low, high = bootstrap_interval(values - theirs)
            entry |= {"baseline": base.model, "difference": 100 * float((values - theirs).mean())}
            entry |= {"difference_low": 100 * low, "difference_high": 100 * high}
            entry |= {"p": paired_permutation_test(values, theirs)}
        entries.append(entry)
    return entries


def _find_result(results: Sequence[BenchmarkResult], model: str, benchmark: Benchmark) -> BenchmarkResult:
    return next(m for m in results if m.model == model and m.benchmark == benchmark)


def _format_markdown(
    results: Sequence[BenchmarkResult], result_entries: Sequence[dict[str, Any]], models: dict[str, str], baseline: str
) -> str:
    """Format means with 95 % intervals, then the differences from the baseline, then the papers' results."""
    entries = {(e["model"], e["benchmark"], e["metric"]): e for e in result_entries}
    benchmarks = list(dict.fromkeys(m.benchmark for m in results))
    columns = [(b, metric) for b in benchmarks for metric in _find_result(results, baseline, b).table_metrics]
    heads = [b.title if metric == "accuracy" else f"{b.title} {metric}" for b, metric in columns]

    def row(model: str, cell: Any) -> list[str]:
        return [model, *(cell(entries[model, b.name, metric]) for b, metric in columns)]

    means = [row(m, lambda e: f"{e['mean']:.1f} [{e['low']:.1f}, {e['high']:.1f}]") for m in models]
    parts = [format_table(["", *heads], means)]
    others = [m for m in models if m != baseline]
    if others:
        tests = [row(m, format_difference) for m in others]
        parts.append(format_table([f"difference from {baseline}", *heads], tests))
    parts += [_format_published(pair, [b.name for b in benchmarks]) for pair in _find_published(models)]
    items = "; ".join(f"{b.title}: {len(_find_result(results, baseline, b).scores)}" for b in benchmarks)
    notes = [f"Percent, with 95 % bootstrap intervals over the items ({items})."]
    if any(metric.startswith("avg@") for _, metric in columns):
        notes.append("avg@n is the mean over n samples, which is pass@1.")
    if others:
        notes.append(f"p: two-sided p-value of a paired permutation test ({NUM_RESAMPLES:,} sign flips).")
    parts.append(f"{' '.join(notes)}\n")
    return "\n".join(part for part in parts if part)


def format_difference(entry: dict[str, Any]) -> str:
    """Format a difference in points, with its interval and p-value."""
    low, high = entry["difference_low"], entry["difference_high"]
    return f"{entry['difference']:+.1f} [{low:+.1f}, {high:+.1f}] ({format_p_value(entry['p'])})"


def format_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table. Vertical bars and line breaks in cells are escaped."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    escaped = ([escape_line(cell).replace("|", r"\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


def _find_published(models: dict[str, str]) -> list[dict[str, Any]]:
    """The papers' results for a student that is one of the models, by its name on the hub."""
    text = resources.files("tsdkd").joinpath("evaluation/published.yaml").read_text(encoding="utf-8")
    names = {name for path in models.values() for name in _model_names(path)}
    return [pair for pair in yaml.safe_load(text) if pair["student"] in names]


def _model_names(path: str) -> set[str]:
    """The name of a model and, if a run trained it, the name of the model that the run started from."""
    names = {Path(path).name}
    if Path(path, RUN_CONFIG_NAME).is_file():
        with suppress(DataError):  # a damaged configuration is no reason to lose the table
            names.add(Path(str(read_run_config(Path(path)).get("model_name_or_path"))).name)
    return names


def _format_published(pair: dict[str, Any], benchmarks: list[str]) -> str:
    columns = [name for name in pair["columns"] if name in benchmarks]
    if not columns:
        return ""
    places = [pair["columns"].index(name) for name in columns]
    rows = [[name, *("" if row[i] is None else f"{row[i]}" for i in places)] for name, row in pair["rows"].items()]
    return format_table([f"{pair['table']}: {pair['teacher']} to {pair['student']}", *columns], rows)
