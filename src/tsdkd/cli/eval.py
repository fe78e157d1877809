"""`tsdkd eval`."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, escape_controls, escape_line
from .arguments import ArgumentParser, int_at_least

_EPILOG = """examples:
  tsdkd eval tsdkd://demo/student after=runs/demo teacher=tsdkd://demo/teacher --suite demo
  tsdkd eval before=Qwen/Qwen3-1.7B-Base after=runs/eopd --suite eopd --backend vllm
  tsdkd eval runs/student --suite tsd-kd --benchmarks gsm8k,math --data_dir benchmarks
Each model is a folder or hub id, optionally as NAME=MODEL. Items that have results aren't evaluated again: the same
command goes on where it stopped."""


def main(argv: Sequence[str]) -> int:
    """Parse, and hand over to `tsdkd.evaluation.evaluator`."""
    args = _parser().parse_args(argv)
    models = _parse_models(args.models)
    baseline = args.baseline or next(iter(models))
    if baseline not in models:
        raise ConfigError([f"--baseline: must be one of {', '.join(models)}, found {baseline!r}"])
    samples = args.samples or 8
    if args.k and max(args.k) > samples:
        raise ConfigError([f"--k: pass@{max(args.k)} needs as many samples, found {samples}; set --samples"])
    if args.data_dir is not None and not args.data_dir.is_dir():
        raise ConfigError([f"--data_dir: no such directory: {args.data_dir}"])

    from ..evaluation.suites import select_benchmarks  # torch from here on

    benchmarks = args.benchmarks.split(",") if args.benchmarks else None
    select_benchmarks(args.suite, benchmarks, args.allow_code_execution)
    evaluator, results = _import_evaluation()
    eval_args = evaluator.EvalArguments(
        models,
        suite=args.suite,
        output_dir=args.output_dir,
        benchmarks=benchmarks,
        backend=args.backend,
        model_args=_parse_model_args(args.model_args),
        batch_size=args.batch_size,
        num_samples=args.samples,
        pass_at_ks=args.k,
        limit=args.limit,
        max_new_tokens=args.max_new_tokens,
        data_dir=args.data_dir,
        apply_chat_template=None if args.apply_chat_template is None else args.apply_chat_template == "true",
        allow_code_execution=args.allow_code_execution,
        seed=args.seed,
    )
    path = results.write_results(
        evaluator.run_evaluation(eval_args), models, baseline, args.output_dir, args.suite, eval_args.settings
    )
    print(escape_controls(path.read_text(encoding="utf-8")))
    _print_prompts(evaluator.read_first_prompts(eval_args))
    print(escape_line(f"written to {path}, with {path.with_suffix('.json').name} and every item beside it"))
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="tsdkd eval",
        description="Measure models on the papers' benchmarks: one table, with intervals and paired tests.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("models", nargs="+", metavar="[NAME=]MODEL")
    parser.add_argument("--suite", choices=["tsd-kd", "eopd", "ood", "demo"], required=True)
    parser.add_argument("--benchmarks", metavar="A,B", help="some of the suite's; default: all")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/eval"), help="default: %(default)s")
    parser.add_argument(
        "--baseline", metavar="NAME", help="the model that the others are tested against; default: the first"
    )
    parser.add_argument("--backend", choices=["hf", "vllm"], default="hf", help="default: %(default)s")
    parser.add_argument(
        "--model_args",
        metavar="K=V,K=V",
        default="",
        help="of lm-evaluation-harness's model class; enable_thinking wins over a run's and the suite's",
    )
    parser.add_argument(
        "--batch_size", type=_parse_batch_size, default="8", help="a number or auto; default: %(default)s"
    )
    parser.add_argument(
        "--samples", type=int_at_least(2), metavar="N", help="of each item, where it is sampled; default: 8"
    )
    parser.add_argument(
        "--k", type=_parse_ks, metavar="K,K", default=(), help="of pass@k in the table; default: the samples"
    )
    parser.add_argument("--limit", type=int_at_least(1), metavar="N", help="only the first items of each task")
    parser.add_argument(
        "--max_new_tokens",
        type=int_at_least(1),
        metavar="N",
        default=8192,
        help="where they are sampled; default: 8192",
    )
    parser.add_argument("--data_dir", type=Path, metavar="DIR", help="local data: DIR/<task>/<split>.jsonl")
    parser.add_argument("--apply_chat_template", choices=["true", "false"], help="default: the suite's")
    parser.add_argument("--seed", type=int_at_least(0), default=0, help="of the samples; default: %(default)s")
    parser.add_argument(
        "--allow_code_execution", action="store_true", help="run what models write, in a sandbox (docs/evaluation.md)"
    )
    return parser


def _print_prompts(prompts: dict[str, tuple[Any, str]]) -> None:
    """Each once, however many models see it so."""
    seen_by: dict[tuple[str, str], list[str]] = {}
    for model, (benchmark, text) in prompts.items():
        seen_by.setdefault((benchmark.title, text), []).append(model)
    for (title, text), names in seen_by.items():
        print(escape_line(f"first prompt of {title}, for {', '.join(names)}:"))
        print(f"{escape_controls(_truncate_middle(text))}\n")


def _truncate_middle(text: str) -> str:
    """Both ends, where the template shows; few-shot examples are long."""
    return text if len(text) <= 1600 else f"{text[:800]}\n[… {len(text) - 1600} characters …]\n{text[-800:]}"


def _parse_models(models: Sequence[str]) -> dict[str, str]:
    """Name -> model; by default its last component. Names are folders of the output directory."""
    found: dict[str, str] = {}
    for text in models:
        name, given, path = text.rpartition("=")
        path = path.rstrip("/")
        name = name if given else Path(path).name
        if not re.fullmatch(r"\w[\w.+-]*", name) or not path:
            raise ConfigError([f"models: {text!r}: name it: NAME={path or 'MODEL'}, of letters, digits and . _ + -"])
        if name in found:
            raise ConfigError([f"models: two are called {name!r}; name them: {name}-2={path}"])
        found[name] = path
    return found


def _parse_ks(text: str) -> tuple[int, ...]:
    return tuple(sorted({int_at_least(2)(part) for part in text.split(",")}))


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
            [f"--model_args: {min(taken)} is set by the model's name, --batch_size, or an adapter's folder"]
        )
    return found


def _import_evaluation():  # type: ignore[no-untyped-def]
    try:
        from ..evaluation import evaluator, results
    except ImportError as error:
        raise ConfigError([f"eval needs {error.name}; pip install 'tsdkd[eval]'"]) from error
    return evaluator, results
