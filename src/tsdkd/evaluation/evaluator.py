"""Several models, several benchmarks: what is missing is asked, the rest is read."""

import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.task import Task
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..errors import ConfigError, DataError
from ..files import ensure_dir, write_atomically
from ..run.arguments import resolve_path
from . import harness
from .items import ItemResults
from .prompt_format import ENABLE_THINKING, PromptFormat, resolve_prompt_format
from .results import BenchmarkResult
from .sandbox import SandboxError, run_program
from .suites import SUITES, Benchmark, select_benchmarks
from .tasks import build_tasks, hash_local_data

_COMPLETIONS_PER_CHUNK = 64  # completions between two writes of the file


@dataclass
class EvalArguments:
    """What `tsdkd eval` was asked for.

    Args:
        models: name -> folder or hub id.
        suite: of `suites`.
        output_dir: where items, table and numbers go.
        benchmarks: some of the suite's; by default all.
        backend: "hf" or "vllm".
        model_args: of the harness's wrapper of that backend.
        batch_size: completions at a time.
        samples: of each item, where they are sampled.
        ks: of pass@k, at most as many; beside the powers of two.
        limit: only the first items of each task.
        max_new_tokens: of each completion, where they are sampled.
        data_dir: local data instead of the hub's.
        chat: whether prompts go through the chat template; by default the suite's.
        allow_code_execution: run programs that models write, in the sandbox.
        seed: of the samples.
    """

    models: dict[str, str]
    suite: str
    output_dir: Path
    benchmarks: list[str] | None = None
    backend: str = "hf"
    model_args: dict[str, Any] = field(default_factory=dict)
    batch_size: str = "8"
    num_samples: int | None = None
    pass_at_ks: Sequence[int] = ()
    limit: int | None = None
    max_new_tokens: int = 8192
    data_dir: Path | None = None
    apply_chat_template: bool | None = None
    allow_code_execution: bool = False
    seed: int = 0

    @property
    def applies_chat_template(self) -> bool:
        """Of all prompts."""
        return SUITES[self.suite].apply_chat_template if self.apply_chat_template is None else self.apply_chat_template

    def num_samples_of(self, benchmark: Benchmark) -> int:
        """Completions of each item."""
        return self.num_samples if self.num_samples and benchmark.num_samples > 1 else benchmark.num_samples

    def model_path(self, model: str) -> str:
        """Its folder or hub id."""
        return str(resolve_path(self.models[model]))

    @property
    def settings(self) -> dict[str, Any]:
        """What the table is of, for its readers; defaults that the docs tell are left out."""
        found = {
            "backend": self.backend,
            "chat template": "yes" if self.applies_chat_template else "no",
            "max_new_tokens": self.max_new_tokens if self.max_new_tokens != EvalArguments.max_new_tokens else None,
            "seed": self.seed,
            "limit": self.limit,
            "data": self.data_dir,
        }
        found = {name: str(value) for name, value in found.items() if value is not None}
        return found | {name: str(value) for name, value in self.model_args.items()}

    def prompt_file(self, model: str, benchmark: Benchmark) -> Path:
        """The first prompt, as the model sees it."""
        return self.output_dir / model / f"{benchmark.name}.prompt.txt"

    def item_metadata(
        self, model: str, revision: str, rendering: PromptFormat, benchmark: Benchmark, data: str | None
    ) -> dict[str, Any]:
        """All that an item depends on."""
        model_path = Path(self.model_path(model))
        return {
            "model": str(model_path.resolve()) if model_path.is_dir() else self.models[model],
            "revision": revision,
            "backend": self.backend,
            "shots": benchmark.num_fewshot,
            "samples": self.num_samples_of(benchmark),
            "chat_template": rendering.template_hash,
            "chat_template_kwargs": rendering.chat_template_kwargs,
            "data": data,
            "max_new_tokens": self.max_new_tokens if benchmark.is_sampled else None,
            "model_args": self.model_args,
            "seed": self.seed,
        }


def run_evaluation(eval_args: EvalArguments) -> list[BenchmarkResult]:
    """Measure all models on all benchmarks.

    Raises:
        TSDKDError: with all finished items kept.
    """
    benchmarks = _validate_benchmarks(eval_args)
    known = {model: _resolve_model(eval_args, model) for model in eval_args.models}
    ensure_dir(eval_args.output_dir)
    tasks = {
        b.name: build_tasks(b, eval_args.num_samples_of(b), eval_args.max_new_tokens, eval_args.data_dir)
        for b in benchmarks
    }
    wanted = {name: _list_items(some, eval_args.limit) for name, some in tasks.items()}
    data = {name: hash_local_data(some, eval_args.data_dir) for name, some in tasks.items()}
    files = {
        model: {
            b.name: ItemResults(
                eval_args.output_dir / model / f"{b.name}.jsonl",
                eval_args.item_metadata(model, revision, rendering, b, data[b.name]),
            )
            for b in benchmarks
        }
        for model, (revision, rendering) in known.items()
    }
    for model, own in files.items():
        _evaluate_missing(eval_args, model, known[model][1], benchmarks, tasks, wanted, own)
    return [
        BenchmarkResult(model, b, own[b.name].stack_scores(wanted[b.name]), eval_args.pass_at_ks)
        for model, own in files.items()
        for b in benchmarks
    ]


def read_first_prompts(eval_args: EvalArguments) -> dict[str, tuple[Benchmark, str]]:
    """Of each model a benchmark and its first prompt as the model sees it, template and all."""
    found = {}
    for model in eval_args.models:
        for benchmark in select_benchmarks(eval_args.suite, eval_args.benchmarks, eval_args.allow_code_execution):
            model_path = eval_args.prompt_file(model, benchmark)
            if model not in found and model_path.is_file():
                found[model] = benchmark, model_path.read_text(encoding="utf-8", errors="replace")
    return found


def _validate_benchmarks(eval_args: EvalArguments) -> list[Benchmark]:
    """The benchmarks. What can't be done is said before the first model is loaded."""
    benchmarks = select_benchmarks(eval_args.suite, eval_args.benchmarks, eval_args.allow_code_execution)
    if any(b.requires_code_execution for b in benchmarks) and not run_program("print('here')").passed:
        raise SandboxError("the sandbox doesn't run programs here")
    return benchmarks


def _resolve_model(eval_args: EvalArguments, model: str) -> tuple[str, PromptFormat]:
    """A model's revision, and how prompts are put to it."""
    model_path, given = eval_args.model_path(model), eval_args.model_args
    revision, tokenizer = harness.load_revision_and_tokenizer(model_path, given)
    defaults = SUITES[eval_args.suite].chat_template_kwargs
    is_explicit = eval_args.apply_chat_template is not None
    rendering = resolve_prompt_format(
        model_path, tokenizer, eval_args.applies_chat_template, is_explicit, defaults, given
    )
    if rendering is None:
        raise ConfigError(
            [
                f"--apply_chat_template: {model} has no chat template, suite {eval_args.suite} uses one by default; "
                "false does without, for all models"
            ]
        )
    if rendering.chat_template_kwargs.get(ENABLE_THINKING) and "think_end_token" not in given:
        raise ConfigError(
            [
                f"--model_args: {model} thinks ({ENABLE_THINKING}), and the harness must know where that ends: "
                f"think_end_token=</think>, or {ENABLE_THINKING}=false"
            ]
        )
    return revision, rendering


def _list_items(tasks: Sequence[Task], limit: int | None) -> list[tuple[str, int]]:
    found = [(t.task_name, i) for t in tasks for i in range(min(limit or len(t.eval_docs), len(t.eval_docs)))]
    if not found:
        raise DataError("no items")
    return found


def _evaluate_missing(
    eval_args: EvalArguments,
    model: str,
    rendering: PromptFormat,
    benchmarks: Sequence[Benchmark],
    tasks: dict[str, list[Task]],
    wanted: dict[str, list[tuple[str, int]]],
    files: dict[str, ItemResults],
) -> None:
    missing = {b.name: set(wanted[b.name]) - files[b.name].results.keys() for b in benchmarks}
    if not any(missing.values()):
        return
    model_path = eval_args.model_path(model)
    lm = harness.load_lm(model_path, eval_args.backend, eval_args.batch_size, eval_args.model_args, rendering)
    _validate_context_length(model, lm, benchmarks, tasks)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(file=sys.stderr)) as progress:
        for benchmark in benchmarks:
            name, total = benchmark.name, len(wanted[benchmark.name])
            bar = progress.add_task(f"{model}: {benchmark.title}", total=total, completed=total - len(missing[name]))
            size = max(1, _COMPLETIONS_PER_CHUNK // eval_args.num_samples_of(benchmark))
            for task, docs in _missing_chunks(tasks[name], wanted[name], missing[name], size):
                seed = _derive_seed(eval_args.seed, task.task_name, docs[0])
                before = len(files[name].results)
                items, prompt = harness.evaluate_docs(lm, task, docs, benchmark, rendering.applies_chat_template, seed)
                if (task.task_name, docs[0]) == wanted[name][0]:
                    write_atomically(eval_args.prompt_file(model, benchmark), prompt)
                files[name].add(items)
                progress.advance(bar, len(files[name].results) - before)
    harness.release_memory(lm)


def _validate_context_length(
    model: str, lm: LM, benchmarks: Sequence[Benchmark], tasks: dict[str, list[Task]]
) -> None:
    for benchmark in benchmarks:
        task = tasks[benchmark.name][0]
        if task.OUTPUT_TYPE != "generate_until":
            continue
        count = (task.config.generation_kwargs or {}).get("max_gen_toks", lm.max_gen_toks)
        if count >= lm.max_length:
            hint = "--max_new_tokens bounds it" if benchmark.is_sampled else "leave it out with --benchmarks"
            raise ConfigError(
                [
                    f"{benchmark.title}: up to {count} tokens are generated, and the context of {model} has "
                    f"{lm.max_length}; {hint}"
                ]
            )


def _derive_seed(*parts: object) -> int:
    """Of a chunk: what it samples doesn't depend on those before it, and no two have one stream."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4])


def _missing_chunks(
    tasks: Sequence[Task], wanted: Sequence[tuple[str, int]], missing: set[tuple[str, int]], size: int
) -> Iterator[tuple[Task, list[int]]]:
    """Those of which something is missing. Samples depend on what is asked together, so a chunk is asked whole."""
    for task in tasks:
        docs = [doc for name, doc in wanted if name == task.task_name]
        for start in range(0, len(docs), size):
            chunk = docs[start : start + size]
            if any((task.task_name, doc) in missing for doc in chunk):
                yield task, chunk
