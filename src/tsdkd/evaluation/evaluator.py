"""Several models on several benchmarks: items without a result are evaluated, the others are read."""

import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.task import Task
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..config.console import PlainConsole
from ..errors import ConfigError, DataError, escape_line
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
    """The arguments of `tsdkd eval`.

    Args:
        models: name -> folder or hub id.
        suite: one of `SUITES`.
        output_dir: where items, table and numbers are written.
        benchmarks: some of the suite's; by default all.
        backend: "hf" or "vllm".
        model_args: arguments of the harness's model class of that backend.
        batch_size: completions at a time.
        num_samples: completions of each item, where they are sampled.
        pass_at_ks: the k of pass@k in the table, at most as many as samples.
        limit: only the first items of each task.
        max_new_tokens: of each completion, where they are sampled.
        data_dir: local data instead of the hub's.
        apply_chat_template: whether prompts go through the chat template; by default the suite's.
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
        """Whether prompts go through the models' chat templates."""
        return SUITES[self.suite].apply_chat_template if self.apply_chat_template is None else self.apply_chat_template

    def num_samples_of(self, benchmark: Benchmark) -> int:
        """Completions of each item."""
        return self.num_samples if self.num_samples and benchmark.num_samples > 1 else benchmark.num_samples

    def model_path(self, model: str) -> str:
        """Folder or hub id of a model."""
        return str(resolve_path(self.models[model]))

    @property
    def settings(self) -> dict[str, Any]:
        """The settings for readers of the table, without documented defaults."""
        settings = {
            "backend": self.backend,
            "chat template": "yes" if self.applies_chat_template else "no",
            "max_new_tokens": self.max_new_tokens if self.max_new_tokens != EvalArguments.max_new_tokens else None,
            "seed": self.seed,
            "limit": self.limit,
            "data": self.data_dir,
        }
        settings = {name: str(value) for name, value in settings.items() if value is not None}
        return settings | {name: str(value) for name, value in self.model_args.items()}

    def prompt_file(self, model: str, benchmark: Benchmark) -> Path:
        """The first prompt, as the model sees it."""
        return self.output_dir / model / f"{benchmark.name}.prompt.txt"

    def item_metadata(
        self, model: str, revision: str, prompt_format: PromptFormat, benchmark: Benchmark, data: str | None
    ) -> dict[str, Any]:
        """All that an item depends on."""
        model_path = Path(self.model_path(model))
        return {
            "model": str(model_path.resolve()) if model_path.is_dir() else self.models[model],
            "revision": revision,
            "backend": self.backend,
            "shots": benchmark.num_fewshot,
            "samples": self.num_samples_of(benchmark),
            "chat_template": prompt_format.template_hash,
            "chat_template_kwargs": prompt_format.chat_template_kwargs,
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
    formats = {model: _resolve_model(eval_args, model) for model in eval_args.models}
    ensure_dir(eval_args.output_dir)
    tasks = {
        b.name: build_tasks(b, eval_args.num_samples_of(b), eval_args.max_new_tokens, eval_args.data_dir)
        for b in benchmarks
    }
    items = {name: _list_items(parts, eval_args.limit) for name, parts in tasks.items()}
    data = {name: hash_local_data(parts, eval_args.data_dir) for name, parts in tasks.items()}
    files = {
        model: {
            b.name: ItemResults(
                eval_args.output_dir / model / f"{b.name}.jsonl",
                eval_args.item_metadata(model, revision, prompt_format, b, data[b.name]),
            )
            for b in benchmarks
        }
        for model, (revision, prompt_format) in formats.items()
    }
    for model, model_files in files.items():
        _evaluate_missing(eval_args, model, formats[model][1], benchmarks, tasks, items, model_files)
    return [
        BenchmarkResult(model, b, model_files[b.name].stack_scores(items[b.name]), eval_args.pass_at_ks)
        for model, model_files in files.items()
        for b in benchmarks
    ]


def read_first_prompts(eval_args: EvalArguments) -> dict[str, tuple[Benchmark, str]]:
    """Model -> a benchmark, and its first prompt as the model sees it, template and all."""
    prompts: dict[str, tuple[Benchmark, str]] = {}
    for model in eval_args.models:
        for benchmark in select_benchmarks(eval_args.suite, eval_args.benchmarks, eval_args.allow_code_execution):
            path = eval_args.prompt_file(model, benchmark)
            if model not in prompts and path.is_file():
                prompts[model] = benchmark, path.read_text(encoding="utf-8", errors="replace")
    return prompts


def _validate_benchmarks(eval_args: EvalArguments) -> list[Benchmark]:
    """The benchmarks; raises `TSDKDError` for what can't be done, before the first model is loaded."""
    benchmarks = select_benchmarks(eval_args.suite, eval_args.benchmarks, eval_args.allow_code_execution)
    if any(b.requires_code_execution for b in benchmarks) and not (trial := run_program("print('here')")).passed:
        raise SandboxError(f"the sandbox doesn't run programs here: {trial.reason}")
    return benchmarks


def _resolve_model(eval_args: EvalArguments, model: str) -> tuple[str, PromptFormat]:
    """A model's revision, and how its prompts are rendered."""
    model_path, model_args = eval_args.model_path(model), eval_args.model_args
    revision, tokenizer = harness.load_revision_and_tokenizer(model_path, model_args)
    defaults = SUITES[eval_args.suite].chat_template_kwargs
    is_explicit = eval_args.apply_chat_template is not None
    prompt_format = resolve_prompt_format(
        model_path, tokenizer, eval_args.applies_chat_template, is_explicit, defaults, model_args
    )
    if prompt_format is None:
        raise ConfigError(
            [
                f"--apply_chat_template: {model} has no chat template, suite {eval_args.suite} uses one by default; "
                "false does without, for all models"
            ]
        )
    if prompt_format.chat_template_kwargs.get(ENABLE_THINKING) and "think_end_token" not in model_args:
        raise ConfigError(
            [
                f"--model_args: {model} thinks ({ENABLE_THINKING}), and the harness must know where that ends: "
                f"think_end_token=</think>, or {ENABLE_THINKING}=false"
            ]
        )
    return revision, prompt_format


def _list_items(tasks: Sequence[Task], limit: int | None) -> list[tuple[str, int]]:
    items = [(t.task_name, i) for t in tasks for i in range(min(limit or len(t.eval_docs), len(t.eval_docs)))]
    if not items:
        raise DataError("no items")
    return items


def _evaluate_missing(
    eval_args: EvalArguments,
    model: str,
    prompt_format: PromptFormat,
    benchmarks: Sequence[Benchmark],
    tasks: dict[str, list[Task]],
    items: dict[str, list[tuple[str, int]]],
    files: dict[str, ItemResults],
) -> None:
    missing = {b.name: set(items[b.name]) - files[b.name].results.keys() for b in benchmarks}
    if not any(missing.values()):
        return
    model_path = eval_args.model_path(model)
    lm = harness.load_lm(model_path, eval_args.backend, eval_args.batch_size, eval_args.model_args, prompt_format)
    _validate_context_length(model, lm, benchmarks, tasks)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=PlainConsole(file=sys.stderr)) as progress:
        for benchmark in benchmarks:
            name, total = benchmark.name, len(items[benchmark.name])
            bar = progress.add_task(
                escape_line(f"{model}: {benchmark.title}"), total=total, completed=total - len(missing[name])
            )
            size = max(1, _COMPLETIONS_PER_CHUNK // eval_args.num_samples_of(benchmark))
            for task, docs in _missing_chunks(tasks[name], items[name], missing[name], size):
                seed = _derive_seed(eval_args.seed, task.task_name, docs[0])
                before = len(files[name].results)
                chat = prompt_format.applies_chat_template
                results, prompt = harness.evaluate_docs(lm, task, docs, benchmark, chat, seed)
                if (task.task_name, docs[0]) == items[name][0]:
                    write_atomically(eval_args.prompt_file(model, benchmark), prompt)
                files[name].add(results)
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
    """A seed for each chunk: its samples don't depend on the chunks before it, and no two chunks share a stream."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4])


def _missing_chunks(
    tasks: Sequence[Task], items: Sequence[tuple[str, int]], missing: set[tuple[str, int]], size: int
) -> Iterator[tuple[Task, list[int]]]:
    """Chunks with a missing item. Samples depend on the batch, so a chunk is evaluated whole."""
    for task in tasks:
        docs = [doc_id for name, doc_id in items if name == task.task_name]
        for start in range(0, len(docs), size):
            chunk = docs[start : start + size]
            if any((task.task_name, doc_id) in missing for doc_id in chunk):
                yield task, chunk
