"""The configuration of a comparison: reads its YAML file, and turns each run and seed into flags of `tsdkd train`."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

from ..config.aliases import resolve_aliases
from ..config.coercion import coerce, did_you_mean, shorten
from ..config.options import AT_LEAST_ONE, declared_rules, enum_value, option
from ..errors import ConfigError
from ..files import resolve_path
from ..launch.processes import LaunchSpec, resolve_launch
from ..methods import find_method
from ..run.arguments import RunArguments, parse_args_and_config, resolve_run_values
from ..run.config_file import read_yaml

_PRESETS_DIR = Path(str(resources.files("tsdkd").joinpath("configs/compare")))
_RESERVED_KEYS = ("seed", "output_dir", "resume")
REFERENCE_MODELS = ("student", "teacher")
"""Models that are evaluated without training, next to the runs."""
_RESERVED_NAMES = (*REFERENCE_MODELS, "results", "teacher_completions")
_RENAMED_KEYS = {"eval_problems": "eval_limit"}
_MAX_RUNS = 1000


@dataclass(frozen=True)
class ComparisonTask:
    """One run with one seed, or one of `REFERENCE_MODELS`.

    Attributes:
        run: its name in the comparison's file.
        seed: the seed; None for a reference model.
        folder: the folder for its output.
    """

    run: str
    seed: int | None
    folder: Path

    @property
    def title(self) -> str:
        """The name in messages."""
        return self.run if self.seed is None else f"{self.run}, seed {self.seed}"


@dataclass
class Comparison:
    """The content of a comparison's file. docs/configuration.md lists the keys."""

    config: str = option("", "Configuration that all runs share: a file, or the name of a shipped one.")
    output_dir: str = option("", "Folder for the runs, the results, the table and the plot.")
    runs: dict[str, Any] | str = option(
        dict,
        "Run name -> the keys of `tsdkd train` that differ in this run; or another comparison, to use its runs.",
    )
    seeds: list[Any] = option(lambda: [1, 2, 3, 4, 5], "Every run is trained once with each seed.")
    settings: dict[str, Any] = option(dict, "Keys of `tsdkd train` for all runs; they override those of `config`.")
    baseline: str | None = option(None, "Run that the others are tested against; default: the first.")
    x: str | None = option(None, "The key that the runs vary; the plot then has it on its x-axis.")
    teacher_completions: bool = option(
        False, "Generate the teacher's completions first, and train the runs that need completions on them."
    )
    eval_dataset_name: str | None = option(
        None, "Problems to evaluate on, with an `answer`; default: those of `config`."
    )
    eval_limit: int | None = option(None, "Use only the first N of these problems; default: all.", AT_LEAST_ONE)
    eval_samples: int = option(8, "Completions per problem at temperature 1.", AT_LEAST_ONE)
    eval_batch_size: int = option(256, "Completions per batch.", AT_LEAST_ONE)
    accelerate_config: str | None = option(None, "Launch configuration of each run; default: the one in `config`.")
    num_processes: int | None = option(None, "Processes of each run.", AT_LEAST_ONE)

    @property
    def folder(self) -> Path:
        """`output_dir`."""
        return Path(self.output_dir)

    @property
    def teacher_completions_path(self) -> Path:
        """The file with the teacher's completions."""
        return self.folder / "teacher_completions.jsonl"

    @property
    def tasks(self) -> list[ComparisonTask]:
        """All tasks: the reference models, then all runs with the first seed, then with the second, and so on."""
        assert isinstance(self.runs, dict)
        references = [ComparisonTask(name, None, self.folder / name) for name in REFERENCE_MODELS]
        folders = {name: self.folder / (re.sub(r"[^\w.-]+", "_", name).lstrip(".") or "_") for name in self.runs}
        return references + [
            ComparisonTask(run, s, folders[run] / f"seed-{s}") for s in self.seeds for run in self.runs
        ]

    def train_flags(self, task: ComparisonTask) -> list[str]:
        """Flags of `tsdkd train` for this task. Raises `ConfigError`."""
        return _to_flags(self.config, self.train_values(task))

    def train_values(self, task: ComparisonTask) -> dict[str, Any]:
        """The values of these flags, by name. Raises `ConfigError`."""
        assert isinstance(self.runs, dict)
        reserved = {"output_dir": str(task.folder), "resume": True}
        if task.seed is not None:
            reserved["seed"] = task.seed
        values = {**self.settings, **self.runs.get(task.run, {}), **reserved}
        if self.teacher_completions and self._needs_completions(values):
            values["dataset_name"] = str(self.teacher_completions_path)
        return values

    def _needs_completions(self, values: Mapping[str, Any]) -> bool:
        run = resolve_run_values(self.config, values)
        return find_method(run.method).config_class.always_needs_completions or run.values["lmbda"] < 1

    def parse_arguments(self, task: ComparisonTask) -> RunArguments:
        """The arguments of the run, parsed and validated. Raises `ConfigError`."""
        return parse_args_and_config(self.config, self.train_flags(task))

    def launch_spec(self, task: ComparisonTask) -> LaunchSpec | None:
        """The processes that the run needs. Raises `ConfigError`."""
        reserved = {"accelerate_config": self.accelerate_config, "num_processes": self.num_processes}
        reserved = {name: value for name, value in reserved.items() if value is not None}
        return resolve_launch({**resolve_run_values(self.config, self.train_flags(task)).values, **reserved}, reserved)

    @property
    def shared_flags(self) -> list[str]:
        """The flags that all runs share, with `--lmbda 1`: for the teacher's completions and for the evaluation."""
        values = {**self.settings, "output_dir": self.output_dir}
        method = resolve_run_values(self.config, values).method
        return _to_flags(self.config, {**values, "lmbda": 1} if find_method(method).config_class.has_lmbda else values)

    def generate_flags(self, is_on_gpu: bool) -> list[str]:
        """Flags of `tsdkd generate` for the teacher's completions.

        On a GPU, `vllm_gpu_memory_utilization` is left out, because vLLM has the GPU to itself there.
        """
        left_out = {"vllm_gpu_memory_utilization"} if is_on_gpu else set()
        return replace(self, settings={k: v for k, v in self.settings.items() if k not in left_out}).shared_flags

    def parse_shared_arguments(self) -> RunArguments:
        """`shared_flags`, parsed and validated. Raises `ConfigError`."""
        return parse_args_and_config(self.config, self.shared_flags)

    def sweep_value(self, run: str) -> float:
        """The value that a run has for `x`."""
        assert isinstance(self.runs, dict) and self.x is not None
        return float(self.runs[run][self.x])


def comparison_names() -> list[str]:
    """The names of the shipped comparisons."""
    return sorted(path.name for path in _PRESETS_DIR.glob("*.yaml"))


def describe_comparisons() -> str:
    """One line per shipped comparison: its name, and the first line of its file."""
    names = comparison_names()
    width = max(map(len, names))
    first_lines = ((_PRESETS_DIR / name).read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for name in names)
    return "\n".join(f"{name:<{width}}  {line}" for name, line in zip(names, first_lines, strict=True))


def read_comparison(name: str) -> Comparison:
    """Read and validate a comparison: a file, or a shipped one.

    Raises:
        ConfigError: lists all problems of the comparison and of its runs, one line each.
    """
    raw = read_yaml(str(_find_comparison(name)))
    problems = _unknown_keys(raw)
    hints, values = get_type_hints(Comparison), {}
    if "seeds" in raw and not isinstance(raw["seeds"], list):
        problems.append(f"seeds: must be a list, such as [1, 2, 3], found {shorten(raw.pop('seeds'))}")
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
    values["eval_dataset_name"] = resolve_path(values.get("eval_dataset_name"))
    comparison = Comparison(**values)
    _validate_comparison(comparison)
    return comparison


def _find_comparison(name: str) -> Path:
    for path in (Path(name), _PRESETS_DIR / name, _PRESETS_DIR / f"{name}.yaml"):
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
    if not runs or not comparison.seeds:
        problems.append("runs, seeds: at least one of each is needed")
    problems += _validate_seeds(comparison.seeds)
    folders: dict[Path, str] = {}
    for task in comparison.tasks:
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


def _validate_seeds(seeds: list[Any]) -> list[str]:
    wrong = [seed for seed in seeds if type(seed) is not int or not 0 <= seed < 2**32]
    twice = {seed for seed in seeds if seeds.count(seed) > 1}
    return [
        *(f"seeds: must be whole numbers of at least 0 and below 2**32, found {shorten(seed)}" for seed in wrong),
        *(f"seeds: {seed} is listed twice" for seed in twice),
    ]


def _is_number(value: Any) -> bool:
    try:
        return type(value) is not bool and float(value) == float(value)
    except (TypeError, ValueError):
        return False


def _to_flags(config: str, values: Mapping[str, Any]) -> list[str]:
    """Values as flags that `tsdkd train` reads as the same values. Raises `ConfigError` if no flags would be."""
    run = resolve_run_values(config, values)
    expected = {name: run.values.get(name, run.method) for name in resolve_aliases(values, [])}
    flags = [word for name, value in expected.items() for word in _to_flag(name, enum_value(value))]
    refused = [name for name, value in expected.items() if _has_flag_like_element(value)]
    if not refused:
        found = {"method": run.method, **resolve_run_values(config, flags).values}
        refused = [name for name, value in expected.items() if found[name] != value]
    if refused:
        raise ConfigError([f"{name}: {shorten(expected[name])} can't be passed to a run" for name in refused])
    return flags


def _has_flag_like_element(value: Any) -> bool:
    """Whether argparse could mistake an element for an option of the command."""
    return isinstance(value, list) and len(value) > 1 and any(str(element).startswith("-") for element in value)


def _to_flag(key: str, value: Any) -> list[str]:
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)] if len(value) > 1 else [f"--{key}={text}" for text in map(str, value)]
    if isinstance(value, dict):
        return [f"--{key}={json.dumps(value)}"]
    return [f"--{key}={'null' if value is None else str(value).lower() if isinstance(value, bool) else value}"]
