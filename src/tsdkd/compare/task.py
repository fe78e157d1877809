"""One task of a comparison: train, evaluate and write the result. Finished steps are skipped."""

import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from transformers import AutoModelForCausalLM

from ..config.aliases import rename_deprecated
from ..config.coercion import shorten
from ..config.user_code import load_grader
from ..data import load_split, missing_column, prepare_dataset, resolve_columns
from ..errors import DataError, EngineError, OutputDirError, PreemptedError
from ..evaluation import ProblemSet, evaluate
from ..files import ensure_dir, write_atomically
from ..grading import Grader
from ..launch.accelerate import launch_processes
from ..launch.children import started_by_this
from ..launch.processes import LaunchSpec
from ..models.finite_weights import require_finite
from ..models.hub import load_pretrained
from ..models.loading import ModelPair, Role, resolve_pair
from ..run.arguments import RunArguments
from ..run.build import teacher_name_or_path
from ..run.config_file import read_yaml
from ..run.output_dir import has_final_model
from ..run.train import train
from .config import Comparison, ComparisonTask
from .result_file import read_result_file, validate_result
from .signals import SignalForwarder

logger = logging.getLogger(__name__)

RESULT_NAME = "result.json"
_TIMING_SUFFIX = "seconds"  # file with the training time of each attempt, one per line


def read_result(comparison: Comparison, task: ComparisonTask) -> dict[str, Any] | None:
    """Read the result of a task, or None if the task isn't finished.

    Raises:
        OutputDirError: the result has other settings.
        DataError: the result is damaged.
    """
    path = task.folder / RESULT_NAME
    if not path.exists():
        return None
    result = read_result_file(path)
    before = rename_deprecated(result["settings"])
    now = _result_settings(comparison, task)
    differing = [name for name in now.keys() | before.keys() if now.get(name) != before.get(name)]
    if differing:
        name = min(differing)
        raise OutputDirError(
            f"output_dir: {path} has other settings ({name} was {shorten(before.get(name))}, now "
            f"{shorten(now.get(name))}); choose another directory"
        )
    validate_result(path, result, task.run, task.seed, comparison.eval_samples)
    return result


def run_task(comparison: Comparison, task: ComparisonTask) -> dict[str, Any]:
    """Return the result of a task, and run the task first if it isn't finished.

    Raises:
        TSDKDError: as `run.train` raises; a later call continues.
    """
    if (result := read_result(comparison, task)) is not None:
        return result
    ensure_dir(task.folder.parent)
    with _file_lock(task.folder.parent / f"{task.folder.name}.lock"):
        return read_result(comparison, task) or _run_task(comparison, task)


def _run_task(comparison: Comparison, task: ComparisonTask) -> dict[str, Any]:
    launch_spec = comparison.launch_spec(task) if task.seed is not None else None  # before this process uses a GPU
    arguments, rows = comparison.parse_arguments(task), load_problems(comparison)
    seconds = 0.0
    if task.seed is not None:
        if comparison.teacher_completions:
            write_teacher_completions(comparison)
        seconds = _train(comparison, task, arguments, launch_spec)
        clear_device_cache(garbage_collection=True)  # reference cycles keep the trainer's models alive
    start = time.perf_counter()
    references = {"student": str(arguments.model_args.model_name_or_path), "teacher": teacher_name_or_path(arguments)}
    model = references[task.run] if task.seed is None else str(task.folder)
    writer: Role = "teacher" if task.seed is None and task.run == "teacher" else "student"
    metrics = _evaluate(comparison, arguments, rows, model, writer)
    clear_device_cache(garbage_collection=True)
    settings = _result_settings(comparison, task)
    timing = {"train_seconds": seconds, "eval_seconds": time.perf_counter() - start}
    result = {
        "run": task.run,
        "seed": task.seed,
        "method": arguments.method,
        **metrics,
        **timing,
        "settings": settings,
    }
    write_atomically(task.folder / RESULT_NAME, json.dumps(result))
    return result


def write_teacher_completions(comparison: Comparison) -> None:
    """Write one completion per prompt, for all runs. The first process that needs the file writes it."""
    file = comparison.teacher_completions_path
    if file.exists():
        return
    partial = file.with_suffix(".partial.jsonl")
    with _file_lock(file.with_suffix(".lock")) as lock:
        if file.exists():
            return
        _generate_in_subprocess(comparison, partial, lock)
        os.replace(partial, file)


def _generate_in_subprocess(comparison: Comparison, output: Path, lock: TextIO) -> None:
    """Run `tsdkd generate` in a process of its own, whose end frees all of the GPU's memory. It inherits the lock, and
    keeps it if this process dies."""
    on_gpu = comparison.parse_shared_arguments().training_args.device.type == "cuda"
    command = [sys.executable, "-m", "tsdkd", "generate", f"--config={comparison.config}"]
    command += [*comparison.generate_flags(on_gpu), f"--output_file={output}"]
    environment = {**os.environ, **started_by_this()}
    with (
        subprocess.Popen(command, pass_fds=[lock.fileno()], env=environment) as process,
        SignalForwarder([process]) as signals,
    ):
        code = process.wait()
    if code and signals.has_received_signal:
        raise PreemptedError("stopped by a signal; run the same command again to continue")
    if code < 0:
        raise EngineError(f"tsdkd generate was killed by signal {-code} ({signal.Signals(-code).name})")
    if code:
        raise SystemExit(code)  # tsdkd generate has printed the reason


def _train(
    comparison: Comparison, task: ComparisonTask, arguments: RunArguments, launch_spec: LaunchSpec | None
) -> float:
    """Train to the end. Returns the training time of all attempts, seconds."""
    timing_file = task.folder.parent / f"{task.folder.name}.{_TIMING_SUFFIX}"
    start = time.perf_counter()
    try:
        if not has_final_model(task.folder):
            if launch_spec:
                _launch_training(comparison, task, launch_spec)
            else:
                with _preserve_environ():
                    train(arguments)
    finally:
        with timing_file.open("a") as file:
            file.write(f"{time.perf_counter() - start:.1f}\n")
    return sum(map(float, timing_file.read_text().split()))


@contextmanager
def _preserve_environ() -> Iterator[None]:
    """Restore the environment: DeepSpeed and vLLM set variables such as RANK, which would mislead the next run."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _launch_training(comparison: Comparison, task: ComparisonTask, launch_spec: LaunchSpec) -> None:
    command = ["train", f"--config={comparison.config}", *comparison.train_flags(task)]
    exit_code = launch_processes(launch_spec.config, launch_spec.options, command)
    if exit_code:
        raise SystemExit(exit_code)  # the processes have printed the reason


def load_problems(comparison: Comparison) -> Dataset:
    """Load the problems that all models are evaluated on. Raises `DataError`."""
    shared = comparison.parse_shared_arguments()
    name = comparison.eval_dataset_name or shared.data_args.eval_dataset_name
    if name is None:
        raise DataError("eval_dataset_name: missing; it names the problems to evaluate on")
    split = "train" if Path(name).is_file() else shared.data_args.dataset_test_split
    rows = load_split(name, None, split, "eval_dataset_name")
    load_grader(shared.training_args.grader)
    columns = resolve_columns(rows, shared.training_args, f"eval_dataset_name {name}", needs_answer=True)
    if columns.answer is None:
        raise missing_column("answer_column", f"eval_dataset_name {name}", ("answer",), rows.column_names)
    return rows.select(range(min(comparison.eval_limit or len(rows), len(rows))))


def _evaluate(
    comparison: Comparison, arguments: RunArguments, rows: Dataset, model: str, writer: Role
) -> dict[str, Any]:
    """Evaluate a model with the comparison's length limits and the run's chat template."""
    training, shared = arguments.training_args, comparison.parse_shared_arguments().training_args
    training.max_completion_length, training.max_length = shared.max_completion_length, shared.max_length
    training.answer_column = shared.answer_column
    student, teacher = str(arguments.model_args.model_name_or_path), teacher_name_or_path(arguments)
    pair = resolve_pair(student, teacher, training)
    prepared = prepare_dataset(rows, pair.template_tokenizer, training, pair.context_length, needs_completion=False)
    dtype = torch.bfloat16 if training.device.type == "cuda" else torch.float32
    field = f"{'teacher_' if writer == 'teacher' else ''}model_name_or_path"
    loaded = load_pretrained(AutoModelForCausalLM.from_pretrained, model, field, "model", dtype=dtype)
    require_finite(loaded.to(training.device), field, model)
    result = evaluate(
        loaded,
        _build_problem_set(pair, prepared, loaded, writer, load_grader(shared.grader)),
        comparison.eval_samples,
        comparison.eval_batch_size,
    )
    return {
        **result.metrics,
        "greedy_right": [int(x) for x in result.is_greedy_correct],
        "samples_right": result.num_correct,
    }


def _build_problem_set(pair: ModelPair, prepared: Any, model: Any, writer: Role, grader: Grader) -> ProblemSet:
    def decode(ids: list[int]) -> str:
        return str(pair.tokenizer.decode(ids, skip_special_tokens=True))

    stop_token_ids, vocab_size = pair.stop_token_ids(writer, model.generation_config), pair.shared_vocab_size
    return ProblemSet(
        prepared["prompt_ids"], prepared["answer"], prepared["limit"], stop_token_ids, vocab_size, decode, grader
    )


def _result_settings(comparison: Comparison, task: ComparisonTask) -> dict[str, Any]:
    """All settings that the result depends on."""
    assert isinstance(comparison.runs, dict)
    run_values = {} if task.seed is None else {**comparison.runs[task.run], "seed": task.seed}
    names = ("config", "eval_dataset_name", "eval_limit", "eval_samples", "teacher_completions")
    eval_values = {name: getattr(comparison, name) for name in names}
    values = {**read_yaml(comparison.config), **comparison.settings, **run_values, **eval_values}
    return rename_deprecated(values)


@contextmanager
def _file_lock(path: Path) -> Iterator[TextIO]:
    """Hold a lock that one process at a time can have. It ends when no process has the file open any more."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("tsdkd compare: waiting for another process, which holds %s", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file
