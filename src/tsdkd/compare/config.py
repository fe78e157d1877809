"""Reads the YAML file of a comparison, and validates it and all its runs."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

from ..config.aliases import resolve_aliases
from ..config.coercion import coerce, did_you_mean, shorten
from ..config.options import declared_rules, enum_value
from ..errors import ConfigError
from ..run.arguments import resolve_run_values
from ..run.config_file import read_yaml
from .comparison import REFERENCE_MODELS, Comparison, ComparisonTask, order_temperatures

_CONFIGS_DIR = Path(str(resources.files("tsdkd").joinpath("configs")))
_PRESETS_DIR = _CONFIGS_DIR / "compare"
_RESERVED_KEYS = ("seed", "output_dir", "resume")
_RESERVED_NAMES = (*REFERENCE_MODELS, "results", "teacher_completions")
_RENAMED_KEYS = {"eval_problems": "eval_limit"}
_MAX_RUNS = 1000
_FIRST_VALIDATION_SEED = 101


def comparison_names() -> list[str]:
    """The names of the shipped comparisons. Those of docs/evidence.md begin with `lab/`."""
    return sorted(path.name for path in _PRESETS_DIR.glob("*.yaml")) + sorted(
        f"lab/{path.name}" for path in _CONFIGS_DIR.glob("lab/*.yaml")
    )


def describe_comparisons() -> str:
    """One line per shipped comparison: its name, and the first line of its file."""
    names = comparison_names()
    width = max(map(len, names))
    first_lines = (_shipped_path(name).read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for name in names)
    return "\n".join(f"{name:<{width}}  {line}" for name, line in zip(names, first_lines, strict=True))


def read_comparison(name: str) -> Comparison:
    """Read and validate a comparison: a file, or a shipped one.

    Raises:
        ConfigError: lists all problems of the comparison and of its runs, one line each.
    """
    raw = read_yaml(str(_find_comparison(name)))
    problems = _unknown_keys(raw)
    hints, values = get_type_hints(Comparison), {}
    for key, example in (("seeds", [1, 2, 3]), ("validation_seeds", [101])):
        if raw.get(key) is not None and not isinstance(raw[key], list):
            problems.append(f"{key}: must be a list, such as {example}, found {shorten(raw.pop(key))}")
    for key in raw.keys() & hints.keys():
        try:
            values[key] = coerce(raw[key], hints[key])
        except ValueError as error:
            problems.append(f"{key}: {error}")
            continue
        rule = declared_rules(Comparison, key).value
        if rule and values[key] is not None and not rule[0](values[key]):
            problems.append(f"{key}: {rule[1]}, found {shorten(values[key])}")
    problems += [
        f"{key}: missing" for key in ("config", "output_dir", "runs") if not values.get(key) and key not in raw
    ]
    if problems:
        raise ConfigError(problems)
    if isinstance(values["runs"], str):
        other = read_yaml(str(_find_comparison(values["runs"]))).get("runs")
        if not isinstance(other, dict):
            raise ConfigError([f"runs: {values['runs']} must list runs itself, found {shorten(other)}"])
        values["runs"] = other
    values["runs"] = {str(name): run for name, run in values["runs"].items()}
    comparison = Comparison(**values)
    comparison.eval_temperatures = order_temperatures(comparison.eval_temperatures)
    _validate_comparison(comparison)
    _validate_grid(comparison)
    return comparison


def _shipped_path(name: str) -> Path:
    return (_CONFIGS_DIR if name.startswith("lab/") else _PRESETS_DIR) / name


def _find_comparison(name: str) -> Path:
    for path in (Path(name), _shipped_path(name), _shipped_path(f"{name}.yaml")):
        if path.is_file():
            return path
    hint = did_you_mean(name.removesuffix(".yaml"), [shipped.removesuffix(".yaml") for shipped in comparison_names()])
    raise ConfigError(
        [
            f"--config: no file and no shipped comparison is called {name!r}{hint}; "
            "`tsdkd compare --list` lists the shipped ones"
        ]
    )


def _unknown_keys(raw: Mapping[str, Any]) -> list[str]:
    known = [f.name for f in fields(Comparison)]
    return [
        f"{key}: is called {_RENAMED_KEYS[key]}"
        if key in _RENAMED_KEYS
        else f"{key}: unknown key{did_you_mean(key, known)}"
        for key in raw
        if key not in known
    ]


def _validate_comparison(comparison: Comparison) -> None:
    """Check the keys of all runs before the first run starts."""
    runs, problems = comparison.runs, []
    assert isinstance(runs, dict)
    if len(runs) > _MAX_RUNS or len(comparison.seeds) > _MAX_RUNS:
        raise ConfigError([f"runs, seeds: at most {_MAX_RUNS} of each, found {len(runs)} and {len(comparison.seeds)}"])
    if len(comparison.validation_seeds or ()) > _MAX_RUNS:
        raise ConfigError([f"validation_seeds: at most {_MAX_RUNS}, found {len(comparison.validation_seeds or ())}"])
    if not runs or not comparison.seeds:
        problems.append("runs, seeds: at least one of each is needed")
    problems += _validate_seeds("seeds", comparison.seeds)
    folders: dict[Path, str] = {}
    for task in [task for task in comparison.tasks if not task.is_validation]:
        other = folders.setdefault(task.folder.parent if task.seed is not None else task.folder, task.run)
        if other != task.run:
            problems.append(f"runs: {other!r} and {task.run!r} would use the same folder; rename one of them")
    if comparison.baseline is not None and comparison.baseline not in runs:
        problems.append(f"baseline: must be one of {', '.join(runs)}, found {shorten(comparison.baseline)}")
    problems += [
        f"runs: {name}: the comparison uses this name for a file or a model; choose another name"
        for name in runs
        if name.partition(".")[0] in _RESERVED_NAMES
    ]
    for name, values in runs.items():
        if values is None:
            values = runs[name] = {}
        if not isinstance(values, dict):
            problems.append(f"runs: {name}: must be a mapping of keys to values, found {shorten(values)}")
            continue
        problems += [
            f"runs: {name}: {key}: the comparison sets it; remove it" for key in _RESERVED_KEYS if key in values
        ]
        if comparison.x is not None and not _is_number(values.get(comparison.x)):
            found = values.get(comparison.x, "nothing")
            problems.append(
                f"runs: {name}: {comparison.x}: must be a number because it is the key of x, found {shorten(found)}"
            )
        task = ComparisonTask(name, 0, Path("unused"))
        try:
            comparison.train_flags(task)
        except ConfigError as error:
            problems += [f"runs: {name}: {line}" for line in error.problems]
    try:
        comparison.generate_flags(is_on_gpu=False)
    except ConfigError as error:
        problems += [f"config, settings: {line}" for line in error.problems]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))


def _validate_grid(comparison: Comparison) -> None:
    """Check the keys of the grid and of the validation, and fill in their defaults. The runs are valid without it."""
    names = ("validation_dataset_name", "validation_limit", "validation_seeds", "validation_metric")
    if not comparison.grid:
        unused = [name for name in names if getattr(comparison, name) is not None]
        if unused:
            raise ConfigError([f"{name}: has no effect without a grid" for name in unused])
        return
    if comparison.validation_seeds is None:
        unused_seeds = (s for s in itertools.count(_FIRST_VALIDATION_SEED) if s not in comparison.seeds)
        comparison.validation_seeds = [next(unused_seeds)]
    problems = _validate_validation(comparison, comparison.validation_seeds)
    problems += _validate_grid_values(comparison) or _validate_grid_points(comparison)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))


def _validate_validation(comparison: Comparison, seeds: list[Any]) -> list[str]:
    problems = _validate_seeds("validation_seeds", seeds)
    if not seeds:
        problems.append("validation_seeds: at least one is needed")
    problems += [
        f"validation_seeds: {seed} is also one of seeds; no seed may both choose and be compared"
        for seed in seeds
        if seed in comparison.seeds
    ]
    if comparison.validation_dataset_name is None:
        problems.append("validation_dataset_name: missing; the grid's values are chosen on these problems")
    metrics = comparison.accuracy_metrics
    comparison.validation_metric = comparison.validation_metric or f"avg@{comparison.eval_samples}"
    if comparison.validation_metric not in metrics:
        found = shorten(comparison.validation_metric)
        problems.append(f"validation_metric: must be one of {', '.join(metrics)}, found {found}")
    return problems


def _validate_grid_values(comparison: Comparison) -> list[str]:
    """Check the keys and lists of the grid; the values become those of the keys' types."""
    assert isinstance(comparison.runs, dict)
    problems = []
    for key, values in comparison.grid.items():
        name = _canonical_name(key)
        others = {"settings": comparison.settings, **{f"runs: {run}": own for run, own in comparison.runs.items()}}
        problems += [
            f"{where}: {key}: the grid sets it; remove it here or there"
            for where, own in others.items()
            if name in map(_canonical_name, own)
        ]
        if key in _RESERVED_KEYS:
            problems.append(f"grid: {key}: the comparison sets it; remove it")
        if not isinstance(values, list) or not values:
            problems.append(f"grid: {key}: must be a list of values to try, found {shorten(values)}")
    if problems:
        return problems
    num_points = math.prod(map(len, comparison.grid.values()))
    if num_points == 1:
        return ["grid: it has a single point, so there is nothing to choose; write it into settings"]
    num_tasks = num_points * len(comparison.runs) * len(comparison.validation_seeds or ())
    if num_tasks > _MAX_RUNS:
        return [f"grid: at most {_MAX_RUNS} runs (points x runs x validation seeds), found {num_tasks}"]
    for key, values in comparison.grid.items():
        comparison.grid[key] = values = [_convert(comparison, key, value) for value in values]
        problems += [
            f"grid: {key}: {shorten(value)} is listed twice" for i, value in enumerate(values) if value in values[:i]
        ]
    return problems


def _canonical_name(key: str) -> str:
    return next(iter(resolve_aliases({key: None}, [])))


def _convert(comparison: Comparison, key: str, value: Any) -> Any:
    """A value as the type of its key: PyYAML reads 1e-3 as a string. An invalid value is returned as it is."""
    assert isinstance(comparison.runs, dict)
    for own in comparison.runs.values():
        try:
            run = resolve_run_values(comparison.config, {**comparison.settings, **own, key: value})
        except ConfigError:
            continue
        return enum_value(run.values.get(_canonical_name(key), run.method))
    return value


def _validate_grid_points(comparison: Comparison) -> list[str]:
    """Check every run with every point. A problem that all runs have is one line."""
    assert isinstance(comparison.runs, dict)
    runs_by_line: dict[str, list[str]] = {}
    for run in comparison.runs:
        for point in comparison.grid_points:
            try:
                comparison.train_flags(ComparisonTask(run, 0, Path("unused"), True, point))
            except ConfigError as error:
                for line in error.problems:
                    runs_by_line.setdefault(line, []).append(run)
    if runs_by_line:
        all_runs = set(comparison.runs)
        return [
            f"grid: {line}" if set(runs) == all_runs else f"grid: {line} (run {', '.join(dict.fromkeys(runs))})"
            for line, runs in runs_by_line.items()
        ]
    points = [(task.run, task.folder.parent) for task in comparison.grid_tasks]
    seeds = len(comparison.validation_seeds or ())
    return ["grid: two of its points would use the same folder"] if len(set(points)) * seeds < len(points) else []


def _validate_seeds(key: str, seeds: list[Any]) -> list[str]:
    wrong = [seed for seed in seeds if type(seed) is not int or not 0 <= seed < 2**32]
    twice = {seed for seed in seeds if type(seed) is int and seeds.count(seed) > 1}
    return [
        *(f"{key}: must be whole numbers of at least 0 and below 2**32, found {shorten(seed)}" for seed in wrong),
        *(f"{key}: {seed} is listed twice" for seed in twice),
    ]


def _is_number(value: Any) -> bool:
    try:
        return type(value) is not bool and float(value) == float(value)
    except (TypeError, ValueError):
        return False
