"""A comparison: its keys, its tasks, and the flags of `tsdkd train` for each task."""

import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..config.aliases import resolve_aliases
from ..config.coercion import shorten
from ..config.options import AT_LEAST_ONE, POSITIVE_FRACTION, ValueRule, enum_value, option
from ..errors import ConfigError
from ..evaluation.pass_at_k import default_ks
from ..evaluation.problem_set import at_temperature
from ..launch.processes import LaunchSpec, resolve_launch
from ..methods import find_method
from ..run.arguments import RunArguments, parse_args_and_config, resolve_run_values

REFERENCE_MODELS = ("student", "teacher")
"""Models that are evaluated without training, next to the runs."""
_TEMPERATURES: ValueRule = (
    lambda v: 1 in v and all(0.01 <= t <= 100 for t in v) and len({f"{t:g}" for t in v}) == len(v),
    "must be different numbers from 0.01 to 100, one of them 1.0",
)


@dataclass(frozen=True)
class ComparisonTask:
    """One run with one seed, or one of `REFERENCE_MODELS`.

    Attributes:
        run: its name in the comparison's file.
        seed: the seed; None for a reference model.
        folder: the folder for its output.
        is_validation: whether it only helps to choose the grid's values: it is evaluated on the validation problems.
        grid_values: the grid's values that it is trained with. Of the other runs they are empty until they are chosen
            (`grid.with_chosen_values`).
    """

    run: str
    seed: int | None
    folder: Path
    is_validation: bool = False
    grid_values: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def title(self) -> str:
        """The name in messages."""
        point = f", {format_grid_values(self.grid_values)}" if self.is_validation else ""
        return self.run if self.seed is None else f"{self.run}{point}, seed {self.seed}"


def order_temperatures(temperatures: Iterable[Any]) -> list[Any]:
    """1.0 first; the order in which they are listed changes no result."""
    return sorted(temperatures, key=lambda t: (t != 1, str(t)))


def format_grid_values(values: Mapping[str, Any]) -> str:
    """Values of the grid in one line, such as "learning_rate=0.002, beta=0.5"."""
    texts = {key: value if isinstance(value, str) else shorten(value) for key, value in values.items()}
    return ", ".join(f"{key}={text}" for key, text in texts.items())


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
    eval_samples: int = option(8, "Completions per problem and temperature.", AT_LEAST_ONE)
    eval_temperatures: list[float] = option(
        lambda: [1.0],
        "Temperatures of these completions. Length, entropy and the test over problems are those at 1.0.",
        _TEMPERATURES,
    )
    eval_top_p: float = option(1.0, "Nucleus mass of these completions (EOPD, Sec. 5.1: 0.8).", POSITIVE_FRACTION)
    eval_batch_size: int = option(256, "Completions per batch.", AT_LEAST_ONE)
    grid: dict[str, Any] = option(
        dict,
        "Key of `tsdkd train` -> the values to try. Every run is trained with all combinations, and keeps the one "
        "with the best mean of `validation_metric`.",
    )
    validation_dataset_name: str | None = option(
        None, "Problems on which the grid's values are chosen, with an `answer`; none may be among the test problems."
    )
    validation_limit: int | None = option(
        None, "Use only the first N of the validation problems; default: all.", AT_LEAST_ONE
    )
    validation_seeds: list[Any] | None = option(
        None, "Seeds of the grid's runs, none of them among `seeds`; default: 101, or the next that isn't among them."
    )
    validation_metric: str | None = option(
        None, "Accuracy that decides: `greedy`, `avg@n` or `pass@k`, such as `avg@8 T=0.6`; default: `avg@n`."
    )
    accelerate_config: str | None = option(None, "Launch configuration of each run; default: the one in `config`.")
    num_processes: int | None = option(None, "Processes of each run.", AT_LEAST_ONE)

    @property
    def folder(self) -> Path:
        """`output_dir`."""
        return Path(self.output_dir)

    @property
    def baseline_run(self) -> str:
        """The run that the others are tested against."""
        return self.baseline or next(iter(self.runs))

    @property
    def teacher_completions_path(self) -> Path:
        """The file with the teacher's completions."""
        return self.folder / "teacher_completions.jsonl"

    @property
    def tasks(self) -> list[ComparisonTask]:
        """All tasks: the reference models, the grid's runs, then all runs with the first seed, with the second, …"""
        references = [ComparisonTask(name, None, self.folder / name) for name in REFERENCE_MODELS]
        return [*references, *self.grid_tasks, *self.final_tasks]

    @property
    def grid_points(self) -> list[dict[str, Any]]:
        """All combinations of the grid's values; none without a grid."""
        combinations = itertools.product(*self.grid.values()) if self.grid else ()
        return [dict(zip(self.grid, values, strict=True)) for values in combinations]

    @property
    def grid_tasks(self) -> list[ComparisonTask]:
        """Every run with every point of the grid and every validation seed."""
        return [
            ComparisonTask(run, s, self._run_folder(run) / "grid" / _point_folder(point) / f"seed-{s}", True, point)
            for s in self.validation_seeds or ()
            for run in self.runs
            for point in self.grid_points
        ]

    @property
    def final_tasks(self) -> list[ComparisonTask]:
        """Every run with every seed."""
        return [ComparisonTask(run, s, self._run_folder(run) / f"seed-{s}") for s in self.seeds for run in self.runs]

    def _run_folder(self, run: str) -> Path:
        return self.folder / (re.sub(r"[^\w.-]+", "_", run).lstrip(".") or "_")

    @property
    def accuracy_metrics(self) -> list[str]:
        """The accuracies of a result: greedy, then avg@n and pass@k at each temperature."""
        n = self.eval_samples
        names = [f"avg@{n}", *(f"pass@{k}" for k in default_ks(n))]
        return ["greedy", *(at_temperature(name, t) for t in self.eval_temperatures for name in names)]

    def train_flags(self, task: ComparisonTask) -> list[str]:
        """Flags of `tsdkd train` for this task. Raises `ConfigError`."""
        return _to_flags(self.config, self.train_values(task))

    def train_values(self, task: ComparisonTask) -> dict[str, Any]:
        """The values of these flags, by name. Raises `ConfigError`."""
        assert isinstance(self.runs, dict)
        reserved = {"output_dir": str(task.folder), "resume": True}
        if task.seed is not None:
            reserved["seed"] = task.seed
        values = {**self.settings, **self.runs.get(task.run, {}), **task.grid_values, **reserved}
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


def _point_folder(point: Mapping[str, Any]) -> str:
    return re.sub(r"[^\w.=,-]+", "_", ",".join(f"{key}={value}" for key, value in point.items()))


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
