"""`tsdkd eval`."""

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, escape_controls, escape_line, install_hint
from .arguments import ArgumentParser, int_at_least

_FILE_OPTIONS = ("prompt_column", "answer_column", "grader")
_EPILOG = """examples:
  tsdkd eval before=Qwen/Qwen2.5-1.5B-Instruct after=runs/student --benchmarks my_problems.jsonl
  tsdkd eval before=Qwen/Qwen3-1.7B-Base after=runs/eopd --suite eopd --backend vllm
  tsdkd eval runs/student --benchmarks gsm8k,math
  tsdkd eval before=Qwen/Qwen3-0.6B after=runs/student --benchmarks reasoning_gym:chain_sum,reasoning_gym:gsm_symbolic
  tsdkd eval tsdkd://demo/student after=runs/demo teacher=tsdkd://demo/teacher --suite demo
A model is a folder or a hub id. NAME is its name in the table; by default it is the last part of MODEL. If the command
is interrupted, run it again: items that have results are not evaluated again."""


def main(argv: Sequence[str]) -> int:
    """Parse the arguments and hand over to `tsdkd.evaluation.evaluator`."""
    args = _parser().parse_args(argv)
    models = _parse_models(args.models)
    baseline = args.baseline or next(iter(models))
    if baseline not in models:
        raise ConfigError([f"--baseline: must be one of {', '.join(models)}, found {baseline!r}"])
    samples = args.samples or 8
    if args.k and max(args.k) > samples:
        raise ConfigError([f"--k: pass@{max(args.k)} needs at least {max(args.k)} samples, found {samples}"])
    if args.data_dir is not None and not args.data_dir.is_dir():
        raise ConfigError([f"--data_dir: no such directory: {args.data_dir}"])

    if "," in args.benchmarks and os.path.isfile(args.benchmarks):
        raise ConfigError(
            [f"--benchmarks: {args.benchmarks}: commas separate files, so rename this file to a name without a comma"]
        )

    from ..evaluation.suites import resolve_suite  # torch from here on

    suite = resolve_suite(
        args.suite,
        [name for name in args.benchmarks.split(",") if name],
        args.allow_code_execution,
        **{name: getattr(args, name) for name in _FILE_OPTIONS},
    )
    if args.data_dir is not None and suite.benchmarks[0].problem_file is not None:
        raise ConfigError(["--data_dir: it replaces the data of a suite, and has no use with a file of problems"])
    evaluator, results = _import_evaluation()
    eval_args = evaluator.EvalArguments(
        models,
        suite=suite,
        output_dir=args.output_dir,
        backend=args.backend,
        model_args=_parse_model_args(args.model_args),
        batch_size=args.batch_size,
        num_samples=args.samples,
        pass_at_ks=args.k,
        limit=args.limit,
        max_new_tokens=args.max_new_tokens,
        data_dir=args.data_dir,
        apply_chat_template=None if args.apply_chat_template is None else args.apply_chat_template == "true",
        seed=args.seed,
    )
    path = results.write_results(
        evaluator.run_evaluation(eval_args), models, baseline, args.output_dir, suite.name, eval_args.settings
    )
    print(escape_controls(path.read_text(encoding="utf-8")))
    _print_prompts(evaluator.read_first_prompts(eval_args))
    names = f"{path.name}, {path.with_suffix('.json').name} and all items"
    print(escape_line(f"wrote {names} to {args.output_dir}"))
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="tsdkd eval",
        description="Evaluate models on the papers' benchmarks or on your own problems, with intervals and tests.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("models", nargs="+", metavar="[NAME=]MODEL")
    _add_benchmark_flags(parser)
    parser.add_argument(
        "--output_dir", type=Path, metavar="DIR", default=Path("runs/eval"), help="default: %(default)s"
    )
    parser.add_argument(
        "--baseline", metavar="NAME", help="the model that the others are compared with; default: the first"
    )
    parser.add_argument("--backend", choices=["hf", "vllm"], default="hf", help="default: %(default)s")
    parser.add_argument(
        "--model_args",
        metavar="K=V,K=V",
        default="",
        help="arguments of lm-evaluation-harness's model class; enable_thinking overrides the run's and the suite's",
    )
    parser.add_argument(
        "--batch_size",
        type=_parse_batch_size,
        metavar="N",
        default="8",
        help="completions per batch, or auto; default: %(default)s",
    )
    parser.add_argument(
        "--apply_chat_template",
        choices=["true", "false"],
        help="whether to render prompts with the chat template; default: the suite's setting, true for your own file",
    )
    parser.add_argument(
        "--allow_code_execution",
        action="store_true",
        help="run the programs that models write, in a sandbox (docs/evaluation.md)",
    )
    _add_sampling_flags(parser)
    return parser


def _add_benchmark_flags(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("what to evaluate on")
    group.add_argument("--suite", choices=["tsd-kd", "eopd", "ood", "demo"], help="default: the suite of --benchmarks")
    group.add_argument(
        "--benchmarks",
        metavar="A,B",
        default="",
        help="names of benchmarks (default: all of the suite), or files of your own problems (.jsonl, .json, .csv, "
        ".parquet) with a column prompt or messages and a column answer, or reasoning_gym:TASK",
    )
    group.add_argument("--prompt_column", metavar="NAME", help="of your own file; default: prompt, else messages")
    group.add_argument("--answer_column", metavar="NAME", help="of your own file; default: answer")
    group.add_argument(
        "--grader",
        metavar="MODULE:FUNCTION",
        help="grades completions of your own file: (completion, answer) -> bool; default: math-verify, or "
        "the verifier of a reasoning_gym task",
    )
    group.add_argument(
        "--data_dir", type=Path, metavar="DIR", help="local copies of a suite's data: DIR/<task>/<split>.jsonl"
    )
    group.add_argument("--limit", type=int_at_least(1), metavar="N", help="use only the first N items of each task")


def _add_sampling_flags(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("benchmarks with sampled completions")
    group.add_argument("--samples", type=int_at_least(1), metavar="N", help="completions per item; default: 8")
    group.add_argument(
        "--k",
        type=_parse_ks,
        metavar="K,K",
        default=(),
        help="values of k for pass@k in the table; default: --samples",
    )
    group.add_argument(
        "--max_new_tokens",
        type=int_at_least(1),
        metavar="N",
        default=8192,
        help="maximum completion length (for your own file, also of the greedy completion); default: %(default)s",
    )
    group.add_argument("--seed", type=int_at_least(0), metavar="N", default=0, help="default: %(default)s")


def _print_prompts(prompts: dict[str, tuple[Any, str]]) -> None:
    """Print each prompt once, with the models that get it."""
    seen_by: dict[tuple[str, str], list[str]] = {}
    for model, (benchmark, text) in prompts.items():
        seen_by.setdefault((benchmark.title, text), []).append(model)
    for (title, text), names in seen_by.items():
        print(escape_line(f"first prompt of {title} for {', '.join(names)}:"))
        print(f"{escape_controls(_truncate_middle(text))}\n")


def _truncate_middle(text: str) -> str:
    """Keep both ends, which show the template: few-shot examples are long."""
    return text if len(text) <= 1600 else f"{text[:800]}\n[… {len(text) - 1600} characters …]\n{text[-800:]}"


def _parse_models(models: Sequence[str]) -> dict[str, str]:
    """Name -> model. The default name is the last component. Names become folders in the output directory."""
    found: dict[str, str] = {}
    for text in models:
        name, given, path = text.rpartition("=")
        path = path.rstrip("/")
        name = name if given else Path(path).name
        if not re.fullmatch(r"\w[\w.+-]*", name) or not path:
            raise ConfigError(
                [f"models: {text!r}: give it a name of letters, digits and . _ + -: NAME={path or 'MODEL'}"]
            )
        if name in found:
            raise ConfigError([f"models: two are called {name!r}; name one of them: {name}-2={path}"])
        found[name] = path
    return found


def _parse_ks(text: str) -> tuple[int, ...]:
    return tuple(sorted({int_at_least(1)(part) for part in text.split(",")}))


def _parse_batch_size(text: str) -> str:
    return text if text == "auto" else str(int_at_least(1)(text))


def _parse_model_args(text: str) -> dict[str, object]:
    from lm_eval.utils import simple_parse_args_string

    bad = [part for part in text.split(",") if part and not re.fullmatch(r"\w+=.+", part)]
    if bad:
        raise ConfigError([f"--model_args: expected name=value, found {bad[0]!r}"])
    found = dict(simple_parse_args_string(text)) if text else {}
    if taken := found.keys() & {"pretrained", "peft", "lora_local_path", "batch_size"}:
        raise ConfigError(
            [f"--model_args: {min(taken)} can't be set here; it follows from the model or from --batch_size"]
        )
    return found


def _import_evaluation():  # type: ignore[no-untyped-def]
    try:
        from ..evaluation import evaluator, results
    except ImportError as error:
        raise ConfigError([f"eval needs {error.name}; {install_hint('eval')}"]) from error
    return evaluator, results
