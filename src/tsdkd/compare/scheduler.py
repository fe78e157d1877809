"""Runs the tasks of a comparison on this machine, one process per task, or writes a SLURM array of them."""

import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from ..errors import PreemptedError, TSDKDError
from ..files import ensure_dir
from ..launch.children import started_by_this
from ..launch.slurm import path_operand, render_job_script
from .comparison import Comparison, ComparisonTask
from .grid import describe_choice, describe_edge, read_final_result, search_grid
from .signals import SignalForwarder
from .task import load_problems

logger = logging.getLogger(__name__)


class TasksFailedError(TSDKDError, RuntimeError):
    """Some tasks failed; the results of the others are kept."""

    exit_code = 1

    def __init__(self, lines: list[str]) -> None:
        super().__init__("\n".join(lines))
        self._lines = lines

    @property
    def lines(self) -> list[str]:
        """See the base."""
        return self._lines


def run_tasks(comparison: Comparison, name: str, jobs: int) -> None:
    """Run the unfinished tasks, `jobs` at the same time: with a grid, first all tasks that don't need its choice.

    Raises:
        TasksFailedError: some tasks failed; the message names them and their logs.
        PreemptedError: a signal stopped the comparison.
    """
    ensure_dir(comparison.folder)
    load_problems(comparison)  # invalid problems must be found before hours of training
    tasks = list(enumerate(comparison.tasks))
    todo = [(i, task) for i, task in tasks if read_final_result(comparison, task) is None]
    _log_progress(f"{len(tasks) - len(todo)} of {len(tasks)} tasks are finished, {len(todo)} remain")
    failed: list[ComparisonTask] = []
    if comparison.grid:
        first = len(tasks) - len(comparison.final_tasks)
        failed += _run_in_parallel(comparison, name, jobs, [(i, task) for i, task in todo if i < first])
        incomplete = {task.run for task in failed if task.is_validation}
        _log_choices(comparison, incomplete)
        todo = [
            (i, task)
            for i, task in tasks[first:]
            if task.run not in incomplete and read_final_result(comparison, task) is None
        ]
    failed += _run_in_parallel(comparison, name, jobs, todo)
    if failed:
        raise TasksFailedError([f"{task.title}: failed, see {_log_path(task)}" for task in failed])


def _run_in_parallel(
    comparison: Comparison, name: str, jobs: int, todo: Sequence[tuple[int, ComparisonTask]]
) -> list[ComparisonTask]:
    """Run numbered tasks, each in a process of its own. Returns those that failed. Raises `PreemptedError`."""
    running: list[subprocess.Popen[bytes]] = []
    signals, environment = SignalForwarder(running), _subprocess_env(jobs) | started_by_this()

    def run_in_subprocess(number: int, task: ComparisonTask) -> tuple[ComparisonTask, int, float] | None:
        if signals.has_received_signal:
            return None
        start, log = time.perf_counter(), _log_path(task)
        ensure_dir(log.parent)
        command = [sys.executable, "-m", "tsdkd", "compare", f"--config={name}", "--task", str(number)]
        with log.open("ab") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        running.append(process)
        if signals.has_received_signal:  # since the process was started
            process.send_signal(signal.SIGTERM)
        return task, process.wait(), time.perf_counter() - start

    failed: list[ComparisonTask] = []
    with ThreadPoolExecutor(jobs) as pool:
        pending: set[Future[tuple[ComparisonTask, int, float] | None]] = {
            pool.submit(run_in_subprocess, *item) for item in todo
        }
        with signals:
            while pending:
                finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                for task, code, seconds in filter(None, (future.result() for future in finished)):
                    failed += [task] if code else []
                    _log_task_result(comparison, task, code, seconds)
    if signals.has_received_signal:
        raise PreemptedError("stopped by a signal; run the same command again to continue")
    return failed


def _log_choices(comparison: Comparison, incomplete: Collection[str]) -> None:
    """Log which values the grid chooses for each run, and warn if they are at its edge."""
    for run in [run for run in comparison.runs if run not in incomplete]:
        search = search_grid(comparison, run)
        _log_progress(describe_choice(comparison, search))
        if edge := describe_edge(search):
            logger.warning("tsdkd compare: %s", edge)


def _subprocess_env(jobs: int) -> dict[str, str]:
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    return {"OMP_NUM_THREADS": threads, **os.environ}


def _log_path(task: ComparisonTask) -> Path:
    """A file next to the run's folder, because only the run may write inside it."""
    return task.folder.parent / f"{task.folder.name}.log"


def _log_task_result(comparison: Comparison, task: ComparisonTask, code: int, seconds: float) -> None:
    result = read_final_result(comparison, task) if code == 0 else None
    if result is None:
        _log_progress(f"{task.title}: exit code {code} after {seconds:.0f} s, see {_log_path(task)}")
        return
    k = comparison.eval_samples
    scores = ", ".join(f"{metric} {result[metric]:.1f}" for metric in ("greedy", f"avg@{k}", f"pass@{k}"))
    _log_progress(f"{task.title}: {scores} ({seconds:.0f} s)")


def _log_progress(text: str) -> None:
    logger.info("tsdkd compare: %s", text)


def build_array_script(comparison: Comparison, name: str, **settings: object) -> str:
    """Build an sbatch script for an array with one job per task. Raises `ConfigError`."""
    num_tasks = len(comparison.tasks)
    variables = {
        "last": num_tasks - 1,
        "first_final": num_tasks - len(comparison.final_tasks) if comparison.grid else None,
        "config": shlex.quote(path_operand(name)),
    }
    return render_job_script(
        "compare/slurm.sh.j2", comparison.folder, settings, [name, str(comparison.folder)], **variables
    )
