"""The papers' benchmarks with their settings, and which of them a call of `tsdkd eval` evaluates."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..config.coercion import did_you_mean
from ..data import default_grader
from ..errors import ConfigError
from .problem_file import ProblemFile, is_problem_file, problem_file_title


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: one column of the table, or several.

    Attributes:
        name: name on the command line and in files.
        title: name in tables.
        task: a task or group of the harness, one of `tasks.CUSTOM_TASKS`, or the task of `problem_file`.
        num_fewshot: examples before each question.
        metric: the harness's metric of an item, in [0, 1].
        filter: the harness's filter, which extracts the answer from the text.
        num_samples: completions per item.
        is_sampled: completions are sampled, not decoded greedily: in the papers' suites at temperature 1 and top-p
            0.8, up to 8192 tokens.
        requires_code_execution: an item is graded by running the program that the model wrote.
        problem_file: the user's file that has the items; None: a data set of the suite.
    """

    name: str
    title: str
    task: str
    num_fewshot: int
    metric: str
    filter: str = "none"
    num_samples: int = 1
    is_sampled: bool = False
    requires_code_execution: bool = False
    problem_file: ProblemFile | None = None

    @property
    def uses_max_new_tokens(self) -> bool:
        """Whether `--max_new_tokens` limits the completions, rather than the harness's task."""
        return self.is_sampled or self.problem_file is not None


@dataclass(frozen=True)
class Suite:
    """Benchmarks that are evaluated together.

    Attributes:
        name: name on the command line and in the names of the result files.
        benchmarks: the benchmarks, in the order of the table.
        apply_chat_template: whether prompts are rendered with the model's chat template by default.
        paper: the source of the settings.
        chat_template_kwargs: arguments for chat templates that know them, except for models that tsdkd trained.
    """

    name: str
    benchmarks: tuple[Benchmark, ...]
    apply_chat_template: bool
    paper: str
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)


_NOT_THINKING = {"enable_thinking": False}  # EOPD, section 5.1: the teacher; appendix C: the template of training


def _sampled_benchmark(name: str, title: str) -> Benchmark:
    return Benchmark(name, title, name, 0, "score", "all", num_samples=8, is_sampled=True)


_ALL_SUITES = (
    Suite(
        "tsd-kd",
        (
            Benchmark("gsm8k", "GSM8K", "gsm8k", 5, "exact_match", "strict-match"),
            Benchmark("gsm_plus", "GSM-Plus", "gsm_plus", 5, "exact_match", "strict-match"),
            Benchmark("math", "MATH", "minerva_math", 4, "exact_match"),
            Benchmark("mbpp", "MBPP", "mbpp", 0, "pass_at_1", requires_code_execution=True),
            Benchmark("ifeval", "IFEval", "ifeval", 0, "prompt_level_strict_acc"),
            Benchmark("mmlu_stem", "MMLU-STEM", "mmlu_stem", 5, "acc"),
            Benchmark("mmlu_pro_math", "MMLU-Pro-Math", "mmlu_pro_math", 5, "exact_match", "custom-extract"),
            Benchmark("sciq", "SciQ", "sciq", 0, "acc"),
            Benchmark("bbh", "BBH", "bbh_cot_fewshot", 3, "exact_match", "get-answer"),
            Benchmark("musr", "MuSR", "leaderboard_musr", 0, "acc_norm"),
        ),
        apply_chat_template=False,
        paper="TSD-KD, appendix A.10",
    ),
    Suite(
        "eopd",
        (
            _sampled_benchmark("math500", "MATH500"),
            _sampled_benchmark("amc23", "AMC23"),
            _sampled_benchmark("minerva", "Minerva"),
            _sampled_benchmark("olympiadbench", "OlympiadBench"),
            _sampled_benchmark("aime24", "AIME24"),
            _sampled_benchmark("aime25", "AIME25"),
        ),
        apply_chat_template=True,
        paper="EOPD, section 5.1 and appendix C",
        chat_template_kwargs=_NOT_THINKING,
    ),
    Suite(
        "ood",
        (
            _sampled_benchmark("gpqa_diamond", "GPQA-Diamond"),
            Benchmark("mmlu_pro", "MMLU-Pro", "mmlu_pro", 5, "exact_match", "custom-extract", is_sampled=True),
        ),
        apply_chat_template=True,
        paper="EOPD, section 5.3 and appendix C",
        chat_template_kwargs=_NOT_THINKING,
    ),
    Suite(
        "demo",
        (
            Benchmark("demo_greedy", "demo, greedy", "demo_greedy", 0, "score", "all"),
            _sampled_benchmark("demo", "demo"),
        ),
        apply_chat_template=True,
        paper="the embedded demo",
    ),
)
SUITES = {suite.name: suite for suite in _ALL_SUITES}
_MAX_NAME = 100  # characters of a suite of files


def benchmark_title(name: str) -> str:
    """The title of a benchmark; of an unknown one its name."""
    return next((b.title for suite in SUITES.values() for b in suite.benchmarks if b.name == name), name)


def resolve_suite(
    suite: str | None,
    benchmarks: Sequence[str] | None,
    allow_code_execution: bool = False,
    **file_options: str | None,
) -> Suite:
    """The suite to evaluate, with only the chosen benchmarks.

    Args:
        suite: one of `SUITES`; None: the suite that has the benchmarks.
        benchmarks: names of benchmarks, or files of problems or tasks of reasoning-gym; None: all benchmarks of the
            suite.
        allow_code_execution: whether programs that models write may be run.
        **file_options: the other fields of `ProblemFile`, for files of problems.

    Raises:
        ConfigError: there is no such suite, benchmark or combination, or running programs isn't allowed.
    """
    names = list(benchmarks or ())
    files = [name for name in names if is_problem_file(name)]
    if files:
        others = [name for name in names if name not in files]
        if suite is not None or others:
            other = f"benchmark {others[0]}" if others else f"--suite {suite}"
            raise ConfigError([f"--benchmarks: {files[0]} can't be combined with {other}; evaluate it separately"])
        options = [{**file_options, "grader": file_options.get("grader") or default_grader(file)} for file in files]
        return _build_file_suite([ProblemFile(file, **given) for file, given in zip(files, options, strict=True)])
    if given := [name for name, value in file_options.items() if value is not None]:
        raise ConfigError([f"--{given[0]}: only with a file of problems as --benchmarks"])
    chosen = SUITES[suite] if suite is not None else _find_suite(names)
    selected = select_benchmarks(chosen.name, names, allow_code_execution)
    return replace(chosen, benchmarks=tuple(selected))


def _find_suite(names: Sequence[str]) -> Suite:
    """The only suite that has all these benchmarks. Raises `ConfigError`."""
    if not names:
        suites = ", ".join(SUITES)
        raise ConfigError(
            [f"--suite: missing; choose {suites}, or name benchmarks or your own file with --benchmarks"]
        )
    suites_of = {name: [s for s in SUITES.values() if any(b.name == name for b in s.benchmarks)] for name in names}
    known = [b.name for s in SUITES.values() for b in s.benchmarks]
    unknown = [name for name in names if not suites_of[name]]
    if unknown:
        has = "; ".join(f"{s.name} has {', '.join(b.name for b in s.benchmarks)}" for s in SUITES.values())
        raise ConfigError([f"--benchmarks: unknown {name!r}{did_you_mean(name, known)} ({has})" for name in unknown])
    common = [s for s in suites_of[names[0]] if all(s in suites_of[name] for name in names)]
    if len(common) == 1:
        return common[0]
    places = ", ".join(f"{name} is in {' and '.join(s.name for s in suites_of[name])}" for name in names)
    advice = "their settings differ, choose one with --suite" if common else "evaluate one suite at a time"
    raise ConfigError([f"--benchmarks: {places}; {advice}"])


def _build_file_suite(files: Sequence[ProblemFile]) -> Suite:
    """Two benchmarks for each file: greedy, and sampled at temperature 1. Raises `ConfigError`."""
    benchmarks: list[Benchmark] = []
    for file in files:
        name = problem_file_title(file)
        taken = {b.name for suite in SUITES.values() for b in suite.benchmarks} | {b.name for b in benchmarks}
        if not re.fullmatch(r"\w[\w.+-]{0,99}", name):
            raise ConfigError([f"--benchmarks: {file.path}: its name must have letters, digits and . _ + - only"])
        if name in SUITES:
            raise ConfigError([f"--benchmarks: {file.path}: a suite is called {name!r}; rename the file"])
        if {name, f"{name}_greedy"} & taken:
            raise ConfigError([f"--benchmarks: {file.path}: another benchmark is called {name!r}; rename the file"])
        shared: dict[str, Any] = {"num_fewshot": 0, "metric": "score", "filter": "all", "problem_file": file}
        greedy, sampled = f"{name}_greedy", name
        benchmarks.append(Benchmark(greedy, f"{name}, greedy", greedy, **shared))
        benchmarks.append(Benchmark(sampled, name, sampled, num_samples=8, is_sampled=True, **shared))
    return Suite(
        _file_suite_name([problem_file_title(file) for file in files]),
        tuple(benchmarks),
        apply_chat_template=True,
        paper="the user's problems",
    )


def _file_suite_name(titles: Sequence[str]) -> str:
    """The titles, joined by "+". A digest tells apart names that would be equal: long ones, and a file `a+b`."""
    name = "+".join(titles)
    if len(name) <= _MAX_NAME and not any("+" in title for title in titles):
        return name
    digest = hashlib.sha256("\n".join(titles).encode()).hexdigest()[:8]
    return f"{name[: _MAX_NAME - 9]}-{digest}"


def select_benchmarks(suite: str, names: Sequence[str] | None, allow_code_execution: bool = False) -> list[Benchmark]:
    """The benchmarks of a suite, or the named ones among them.

    Raises:
        ConfigError: the suite doesn't have a benchmark, or has one that runs programs, which isn't allowed.
    """
    known = {benchmark.name: benchmark for benchmark in SUITES[suite].benchmarks}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ConfigError(
            [
                f"--benchmarks: suite {suite} doesn't have {name!r}{did_you_mean(name, list(known))}; it has "
                f"{', '.join(known)}"
                for name in unknown
            ]
        )
    chosen = [known[name] for name in dict.fromkeys(names or known)]
    code_benchmarks = [b.title for b in chosen if b.requires_code_execution]
    if code_benchmarks and not allow_code_execution:
        others = ",".join(b.name for b in chosen if not b.requires_code_execution)
        alternative = f", or leave it out with --benchmarks {others}" if others else ""
        raise ConfigError(
            [
                f"{', '.join(code_benchmarks)}: grading runs the programs that the model writes; allow this with "
                f"--allow_code_execution{alternative}"
            ]
        )
    return chosen
