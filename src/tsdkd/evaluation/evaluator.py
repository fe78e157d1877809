"""Evaluates models on benchmarks: items that have results are read from their files, the others are evaluated."""

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
from ..files import ensure_dir, resolve_path, write_atomically
from . import harness
from .grader_source import hash_grader_source
from .items import ItemResults
from .problem_task import ProblemTask
from .prompt_format import ENABLE_THINKING, PromptFormat, resolve_prompt_format
from .results import BenchmarkResult
from .sandbox import SandboxError, run_program
from .suites import Benchmark, Suite
from .tasks import build_tasks, hash_local_data

_COMPLETIONS_PER_CHUNK = 64  # completions are written to the file in chunks


@dataclass
class EvalArguments:
    """The arguments of `tsdkd eval`.

    Args:
        models: name of the model -> folder or hub id.
        suite: the benchmarks, and how their prompts are rendered.
        output_dir: folder for the items, the table and the numbers.
        backend: "hf" or "vllm".
        model_args: arguments of the harness's model class for this backend.
        batch_size: completions per batch, or "auto".
        num_samples: completions per item of the benchmarks that are sampled several times; None: 8.
        pass_at_ks: the k of pass@k in the table, each at most the number of samples.
        limit: use only the first items of each task; None: all.
        max_new_tokens: maximum length of a completion, tokens, where `Benchmark.uses_max_new_tokens`.
        data_dir: folder with local data, instead of the data sets on the hub.
        apply_chat_template: whether to render prompts with the chat template; None: as the suite does.
        seed: seed of the samples.
    """

    models: dict[str, str]
    suite: Suite
    output_dir: Path
    backend: str = "hf"
    model_args: dict[str, Any] = field(default_factory=dict)
    batch_size: str = "8"
    num_samples: int | None = None
    pass_at_ks: Sequence[int] = ()
    limit: int | None = None
    max_new_tokens: int = 8192
    data_dir: Path | None = None
    apply_chat_template: bool | None = None
    seed: int = 0

    @property
    def applies_chat_template(self) -> bool:
        """Whether prompts are rendered with the models' chat templates."""
        return self.suite.apply_chat_template if self.apply_chat_template is None else self.apply_chat_template

    def num_samples_of(self, benchmark: Benchmark) -> int:
        """Completions per item."""
        return self.num_samples if self.num_samples and benchmark.num_samples > 1 else benchmark.num_samples

    def model_path(self, model: str) -> str:
        """The folder or hub id of a model."""
        return str(resolve_path(self.models[model]))

    @property
    def settings(self) -> dict[str, Any]:
        """The settings to print below the table. Documented defaults are left out."""
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
        """The file with the first prompt, as the model sees it."""
        return self.output_dir / model / f"{benchmark.name}.prompt.txt"

    def item_metadata(
        self, model: str, revision: str, prompt_format: PromptFormat, benchmark: Benchmark, data: str | None
    ) -> dict[str, Any]:
        """All settings that the result of an item depends on."""
        model_path = Path(self.model_path(model))
        metadata = {
            "model": str(model_path.resolve()) if model_path.is_dir() else self.models[model],
            "revision": revision,
            "backend": self.backend,
            "shots": benchmark.num_fewshot,
            "samples": self.num_samples_of(benchmark),
            "chat_template": prompt_format.template_hash,
            "chat_template_kwargs": prompt_format.chat_template_kwargs,
            "data": data,
            "max_new_tokens": self.max_new_tokens if benchmark.uses_max_new_tokens else None,
            "model_args": self.model_args,
            "seed": self.seed,
        }
        if benchmark.problem_file:
            grader = benchmark.problem_file.grader
            metadata |= {"grader": grader, "grader_source": hash_grader_source(grader)}
        return metadata


def run_evaluation(eval_args: EvalArguments) -> list[BenchmarkResult]:
    """Evaluate all models on all benchmarks.

    Raises:
        TSDKDError: the input is invalid, or the evaluation failed. Finished items are kept.
    """
    benchmarks = eval_args.suite.benchmarks
    _validate_sandbox(benchmarks)
    formats = {model: _resolve_model(eval_args, model) for model in eval_args.models}
    tasks = {
        b.name: build_tasks(b, eval_args.num_samples_of(b), eval_args.max_new_tokens, eval_args.data_dir)
        for b in benchmarks
    }
    items = {name: _list_items(parts, eval_args.limit) for name, parts in tasks.items()}
    _validate_conversations(formats, tasks)
    ensure_dir(eval_args.output_dir)
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
    """Model -> its first benchmark, and the first prompt of it, as the model sees it."""
    prompts: dict[str, tuple[Benchmark, str]] = {}
    for model in eval_args.models:
        for benchmark in eval_args.suite.benchmarks:
            path = eval_args.prompt_file(model, benchmark)
            if model not in prompts and path.is_file():
                prompts[model] = benchmark, path.read_text(encoding="utf-8", errors="replace")
    return prompts


def _validate_sandbox(benchmarks: Sequence[Benchmark]) -> None:
    """Raise `SandboxError` if a benchmark needs the sandbox, and it doesn't work on this machine."""
    if any(b.requires_code_execution for b in benchmarks) and not (trial := run_program("print('here')")).passed:
        raise SandboxError(f"the sandbox can't run programs on this machine: {trial.reason}")


def _validate_conversations(formats: dict[str, tuple[str, PromptFormat]], tasks: dict[str, list[Task]]) -> None:
    """Raise `ConfigError` if a prompt is a conversation, and a model gets plain text."""
    plain = [model for model, (_, prompt_format) in formats.items() if not prompt_format.applies_chat_template]
    for name, (task, *_) in tasks.items():
        if plain and isinstance(task, ProblemTask) and task.conversation is not None:
            raise ConfigError(
                [
                    f"--benchmarks: {name}: row {task.conversation} isn't a single user message, so it needs a chat "
                    f"template, and {plain[0]} is evaluated without one"
                ]
            )


def _resolve_model(eval_args: EvalArguments, model: str) -> tuple[str, PromptFormat]:
    """The revision of a model, and how its prompts are rendered."""
    model_path, model_args = eval_args.model_path(model), eval_args.model_args
    revision, tokenizer = harness.load_revision_and_tokenizer(model_path, model_args)
    defaults = eval_args.suite.chat_template_kwargs
    is_explicit = eval_args.apply_chat_template is not None
    prompt_format = resolve_prompt_format(
        model_path, tokenizer, eval_args.applies_chat_template, is_explicit, defaults, model_args
    )
    if prompt_format is None:
        raise ConfigError(
            [
                f"--apply_chat_template: {model} has no chat template, but suite {eval_args.suite.name} uses one by "
                "default; set it to false to evaluate all models on plain text"
            ]
        )
    if prompt_format.chat_template_kwargs.get(ENABLE_THINKING) and "think_end_token" not in model_args:
        raise ConfigError(
            [
                f"--model_args: {model} runs with {ENABLE_THINKING}, so the harness needs the token that ends "
                f"thinking: set think_end_token=</think>, or {ENABLE_THINKING}=false"
            ]
        )
    return revision, prompt_format


def _list_items(tasks: Sequence[Task], limit: int | None) -> list[tuple[str, int]]:
    items = [(t.task_name, i) for t in tasks for i in range(min(limit or len(t.eval_docs), len(t.eval_docs)))]
    if not items:
        raise DataError("the benchmark has no items")
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
    console = PlainConsole(file=sys.stderr)
    bars = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
    with bars as progress:
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
            hint = (
                "set a lower --max_new_tokens" if benchmark.uses_max_new_tokens else "leave it out with --benchmarks"
            )
            raise ConfigError(
                [
                    f"{benchmark.title}: generates up to {count} tokens, but the context of {model} has only "
                    f"{lm.max_length}; {hint}"
                ]
            )


def _derive_seed(*parts: object) -> int:
    """The seed of a chunk: its samples don't depend on earlier chunks, and no two chunks share a random stream."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4])


def _missing_chunks(
    tasks: Sequence[Task], items: Sequence[tuple[str, int]], missing: set[tuple[str, int]], size: int
) -> Iterator[tuple[Task, list[int]]]:
    """Yield the chunks that have a missing item. Samples depend on the batch, so a whole chunk is evaluated."""
    for task in tasks:
        docs = [doc_id for name, doc_id in items if name == task.task_name]
        for start in range(0, len(docs), size):
            chunk = docs[start : start + size]
            if any((task.task_name, doc_id) in missing for doc_id in chunk):
                yield task, chunk
