"""One task of a comparison: train, evaluate and write the result. Finished steps are skipped."""

import fcntl
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from transformers import AutoModelForCausalLM

from ..config.user_code import load_grader
from ..data import (
    default_grader,
    is_reasoning_gym,
    load_split,
    missing_column,
    prepare_for_pair,
    resolve_columns,
    split_prompt_completion,
)
from ..errors import ConfigError, DataError, EngineError, OutputDirError, PreemptedError
from ..evaluation import ProblemSet, evaluate
from ..evaluation.problem_set import at_temperature
from ..files import ensure_dir, resolve_path, write_atomically
from ..grading import Grader
from ..launch.accelerate import launch_processes
from ..launch.children import started_by_this
from ..launch.processes import LaunchSpec
from ..models.finite_weights import require_finite
from ..models.hub import load_pretrained
from ..models.loading import ModelPair, Role, resolve_pair
from ..run.arguments import RunArguments
from ..run.build import teacher_name_or_path
from ..run.output_dir import find_changes, has_final_model
from ..run.train import train
from .comparison import Comparison, ComparisonTask
from .grid import describe_choice, search_grid, with_chosen_values
from .result_file import RESULT_NAME, describe_remedy, read_result, result_settings
from .signals import SignalForwarder

logger = logging.getLogger(__name__)

_TIMING_SUFFIX = "seconds"  # file with the training time of each attempt, one per line


def run_task(comparison: Comparison, task: ComparisonTask) -> dict[str, Any]:
    """Return the result of a task, and run the task first if it isn't finished.

    If its run's grid isn't finished, the grid's tasks are run first, except those that another process runs.

    Raises:
        TSDKDError: as `run.train` raises; a later call continues.
    """
    chosen = with_chosen_values(comparison, task)
    if chosen is None:
        for grid_task in comparison.grid_tasks:
            if grid_task.run == task.run:
                run_task(comparison, grid_task)
        search = search_grid(comparison, task.run)
        logger.info("tsdkd compare: %s", describe_choice(comparison, search))
        return run_task(comparison, task)
    if (result := read_result(comparison, chosen)) is not None:
        return result
    ensure_dir(task.folder.parent)
    with _file_lock(task.folder.parent / f"{task.folder.name}.lock"):
        return read_result(comparison, chosen) or _run_task(comparison, chosen)


def _run_task(comparison: Comparison, task: ComparisonTask) -> dict[str, Any]:
    launch_spec = comparison.launch_spec(task) if task.seed is not None else None  # before this process uses a GPU
    arguments, problems = comparison.parse_arguments(task), load_problems(comparison)
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
    kind = "validation" if task.is_validation else "eval"
    metrics = _evaluate(comparison, arguments, kind, problems[kind], model, writer)
    clear_device_cache(garbage_collection=True)
    timing = {"train_seconds": seconds, "eval_seconds": time.perf_counter() - start}
    result = {
        "run": task.run,
        "seed": task.seed,
        "method": arguments.method,
        **({"grid_values": task.grid_values} if task.grid_values else {}),
        **metrics,
        **timing,
        "settings": result_settings(comparison, task),
    }
    write_atomically(task.folder / RESULT_NAME, json.dumps(result))
    if task.is_validation:
        _delete_student(task.folder)
    return result


def _delete_student(folder: Path) -> None:
    """Delete what a run of the grid has left, except its result: its student is not needed any more."""
    for path in folder.iterdir():
        if path.name != RESULT_NAME:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


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
    """Train to the end. Returns the training time of all attempts, seconds. Raises as `run.train` does."""
    _require_same_run(task, arguments)
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


def _require_same_run(task: ComparisonTask, arguments: RunArguments) -> None:
    """Raise `OutputDirError` if the student in the task's folder was trained with other settings.

    `run.train` checks an unfinished run itself, but doesn't know when the grid's choice is what has changed.
    """
    changes = find_changes(arguments)
    remedy = describe_remedy(task, changes)
    if changes and (remedy or has_final_model(task.folder)):
        raise OutputDirError(
            f"output_dir: {task.folder} contains a different run: {'; '.join(changes.values())}; "
            f"{remedy or 'choose another directory'}"
        )


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


def load_problems(comparison: Comparison) -> dict[str, Dataset]:
    """Load the problems that all models are evaluated on: "eval", and "validation" if there is a grid.

    Raises:
        DataError: they are invalid, or one of the validation problems is also a test problem.
    """
    shared = comparison.parse_shared_arguments()
    name = _problems_name(comparison, shared, "eval")
    if name is None:
        raise DataError("eval_dataset_name: missing; it names the problems to evaluate on")
    problems = {"eval": _load_problems(shared, "eval_dataset_name", name, comparison.eval_limit)}
    name = _problems_name(comparison, shared, "validation")
    if name is not None:
        field, limit = "validation_dataset_name", comparison.validation_limit
        problems["validation"] = _load_problems(shared, field, name, limit)
        _require_disjoint(shared, problems["validation"], problems["eval"])
    return problems


def _problems_name(comparison: Comparison, shared: RunArguments, kind: str) -> str | None:
    if kind == "validation":
        return comparison.validation_dataset_name
    return comparison.eval_dataset_name or shared.data_args.eval_dataset_name


def _load_grader(shared: RunArguments, name: str | None) -> Grader:
    """The user's grader, or else that of these problems, which may not be those of `config`."""
    return load_grader(shared.explicit_values.get("grader") or default_grader(name))


def _load_problems(shared: RunArguments, field: str, name: str, limit: int | None) -> Dataset:
    path = resolve_path(name)
    split = "train" if os.path.isfile(path) else shared.data_args.dataset_test_split
    if field == "validation_dataset_name" and is_reasoning_gym(name):
        split = "validation"  # it shares no prompt with the split that the models are tested on
    rows = load_split(path, None, split, field)
    columns = resolve_columns(rows, shared.training_args, f"{field} {name}", needs_answer=True)
    if columns.answer is None:
        raise missing_column("answer_column", f"{field} {name}", ("answer",), rows.column_names)
    rows = rows.select(range(min(limit or len(rows), len(rows))))
    _check_answers(_load_grader(shared, name), rows[columns.answer], f"{field} {name}")
    return rows


def _check_answers(grader: Grader, answers: Iterable[Any], source: str) -> None:
    """Raise `ConfigError` if the grader refuses an answer: it would be found only after the training otherwise."""
    for row, answer in enumerate(answers):
        try:
            grader("", str(answer), row)
        except ConfigError as error:
            raise ConfigError([f"{source}: {line}" for line in error.problems]) from error


def _require_disjoint(shared: RunArguments, validation: Dataset, test: Dataset) -> None:
    """Raise `DataError` if a prompt is in both: what the grid chooses would fit the test problems."""

    def prompts(field: str, rows: Dataset) -> list[str]:
        columns = resolve_columns(rows, shared.training_args)
        try:
            return [_prompt_key(split_prompt_completion(row, i, columns)[0]) for i, row in enumerate(rows)]
        except DataError as error:
            raise DataError(f"{field}: {error}") from error

    tested = set(prompts("eval_dataset_name", test))
    found = prompts("validation_dataset_name", validation)
    shared_rows = [i for i, prompt in enumerate(found) if prompt in tested]
    if shared_rows:
        raise DataError(
            f"validation_dataset_name: {len(shared_rows)} of its {len(validation)} prompts are also among the test "
            f"problems, such as that of row {shared_rows[0]}; choose other problems"
        )


def _prompt_key(prompt: Any) -> str:
    """A text that is the same for a string, with any space around it, and for one user message with this string."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return json.dumps([(message["role"], message["content"].strip()) for message in messages])


def _evaluate(
    comparison: Comparison, arguments: RunArguments, kind: str, rows: Dataset, model: str, writer: Role
) -> dict[str, Any]:
    """Evaluate a model with the comparison's length limits and the run's chat template, on rows of `load_problems`."""
    training, shared = arguments.training_args, comparison.parse_shared_arguments()
    for name in ("max_completion_length", "max_length", "answer_column"):
        setattr(training, name, getattr(shared.training_args, name))
    grader = _load_grader(shared, _problems_name(comparison, shared, kind))
    student, teacher = str(arguments.model_args.model_name_or_path), teacher_name_or_path(arguments)
    pair = resolve_pair(student, teacher, training)
    prepared = prepare_for_pair(rows, pair, training, for_teacher=writer == "teacher")
    dtype = torch.bfloat16 if training.device.type == "cuda" else torch.float32
    field = f"{'teacher_' if writer == 'teacher' else ''}model_name_or_path"
    loaded = load_pretrained(AutoModelForCausalLM.from_pretrained, model, field, "model", dtype=dtype)
    require_finite(loaded.to(training.device), field, model)
    result = evaluate(
        loaded,
        _build_problem_set(pair, prepared, loaded, writer, grader),
        comparison.eval_samples,
        comparison.eval_batch_size,
        comparison.eval_temperatures,
        comparison.eval_top_p,
    )
    counts = {1.0: result.num_correct, **{t: some.num_correct for t, some in result.by_temperature.items()}}
    return {
        **result.metrics,
        "greedy_right": [int(x) for x in result.is_greedy_correct],
        **{at_temperature("samples_right", t): num_correct for t, num_correct in counts.items()},
    }


def _build_problem_set(pair: ModelPair, prepared: Any, model: Any, writer: Role, grader: Grader) -> ProblemSet:
    def decode(ids: list[int]) -> str:
        return str(pair.tokenizer.decode(ids, skip_special_tokens=True))

    stop_token_ids, vocab_size = pair.stop_token_ids(writer, model.generation_config), pair.shared_vocab_size
    prompts = "teacher_prompt_ids" if "teacher_prompt_ids" in prepared.column_names else "prompt_ids"
    # as lists: a `Column` reads an element from disk whenever it is asked for
    prompt_ids, answers, limits = (prepared[name][:] for name in (prompts, "answer", "limit"))
    return ProblemSet(prompt_ids, answers, limits, stop_token_ids, vocab_size, decode, grader)


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
