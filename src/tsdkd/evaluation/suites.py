"""The papers' benchmarks, with their shots, and what of each item counts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..config.coercion import did_you_mean
from ..errors import ConfigError


@dataclass(frozen=True)
class Benchmark:
    """One column of a table.

    Attributes:
        name: on the command line and in files.
        title: in tables.
        task: the harness's task or group, or one of `tasks.CUSTOM_TASKS`.
        num_fewshot: examples before each question.
        metric: of each item, in [0, 1].
        filter: the harness's name for how the answer is taken from the text.
        num_samples: completions of each item.
        is_sampled: at temperature 1 and top-p 0.8, up to 8192 tokens; `--samples` says how many.
        requires_code_execution: the grade comes from running what the model wrote.
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


@dataclass(frozen=True)
class Suite:
    """Benchmarks that belong together.

    Attributes:
        benchmarks: the benchmarks, in the order of the table.
        apply_chat_template: prompts go through the model's chat template, if the command line says nothing else.
        paper: where shots and settings are from.
        chat_template_kwargs: for chat templates that know them, for models that no run of tsdkd made.
    """

    benchmarks: tuple[Benchmark, ...]
    apply_chat_template: bool
    paper: str
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)


_NOT_THINKING = {"enable_thinking": False}  # EOPD, section 5.1: the teacher; appendix C: the template of training


def _sampled_benchmark(name: str, title: str) -> Benchmark:
    return Benchmark(name, title, name, 0, "score", "all", num_samples=8, is_sampled=True)


SUITES = {
    "tsd-kd": Suite(
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
    "eopd": Suite(
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
    "ood": Suite(
        (
            _sampled_benchmark("gpqa_diamond", "GPQA-Diamond"),
            Benchmark("mmlu_pro", "MMLU-Pro", "mmlu_pro", 5, "exact_match", "custom-extract", is_sampled=True),
        ),
        apply_chat_template=True,
        paper="EOPD, section 5.3 and appendix C",
        chat_template_kwargs=_NOT_THINKING,
    ),
    "demo": Suite(
        (
            Benchmark("demo_greedy", "demo, greedy", "demo_greedy", 0, "score", "all"),
            _sampled_benchmark("demo", "demo"),
        ),
        apply_chat_template=True,
        paper="the embedded demo",
    ),
}


def benchmark_title(name: str) -> str:
    """A benchmark's title; of an unknown one its name."""
    return next((b.title for suite in SUITES.values() for b in suite.benchmarks if b.name == name), name)


def select_benchmarks(suite: str, names: list[str] | None, allow_code_execution: bool = False) -> list[Benchmark]:
    """The suite's benchmarks, or those of them that are named.

    Raises:
        ConfigError: the suite hasn't one of them, or it runs programs and that isn't allowed.
    """
    known = {benchmark.name: benchmark for benchmark in SUITES[suite].benchmarks}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        has = f"it has {', '.join(known)}"
        raise ConfigError(
            [
                f"--benchmarks: {name!r} is not of suite {suite}{did_you_mean(name, list(known))}; {has}"
                for name in unknown
            ]
        )
    chosen = [known[name] for name in names or known]
    code_benchmarks = [b.title for b in chosen if b.requires_code_execution]
    if code_benchmarks and not allow_code_execution:
        others = ",".join(b.name for b in chosen if not b.requires_code_execution)
        alternative = f", or leave it out: --benchmarks {others}" if others else ""
        raise ConfigError(
            [
                f"{', '.join(code_benchmarks)}: its programs, which the model writes, would have to be run; allow it "
                f"with --allow_code_execution{alternative}"
            ]
        )
    return chosen
