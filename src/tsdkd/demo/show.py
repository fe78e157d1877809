"""The demo: accuracy of teacher and student, distillation, accuracy of the student on problems it never saw."""

import time

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from .. import run
from ..data import load_rows
from ..parsing import RunArguments
from ..run_dir import claim
from .accuracy import Accuracy, measure

PROBLEMS = 256


def show(arguments: RunArguments) -> None:
    """Run the demo and print its table. Raises `TSDKDError`."""
    claim(arguments)
    torch.set_num_threads(2)  # more cost more than they give on matrices of 64 x 64, and change the bits of the run
    rows = list(load_rows(str(arguments.data.eval_dataset_name), None, "train"))[:PROBLEMS]
    teacher = measure_saved(str(arguments.training.teacher_model_name_or_path), rows)
    print(f"teacher         {_line(teacher)}", flush=True)
    before = measure_saved(str(arguments.model.model_name_or_path), rows)
    print(f"student, before {_line(before)}", flush=True)
    start = time.perf_counter()
    run.train(arguments)
    seconds = time.perf_counter() - start
    after = measure_saved(str(arguments.training.output_dir), rows)

    title = f"{arguments.method} on {len(rows)} held-out problems, {seconds:.0f} s of training"
    table = Table(title=title, caption="percent solved; avg@8 and pass@8 at temperature 1")
    for column in ("", "greedy", "avg@8", "pass@8"):
        table.add_column(column, justify="right" if column else "left")
    for name, accuracy in (("teacher", teacher), ("student, before", before), ("student, after", after)):
        table.add_row(name, f"{accuracy.greedy:.1f}", f"{accuracy.avg:.1f}", f"{accuracy.best:.1f}")
    gains = (after.greedy - before.greedy, after.avg - before.avg, after.best - before.best)
    table.add_row("gained", *(f"{gain:+.1f}" for gain in gains))
    Console().print(table)


def measure_saved(folder: str, rows: list[dict[str, str]]) -> Accuracy:
    """Accuracy of a saved model, loaded as a user would load it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return measure(model, AutoTokenizer.from_pretrained(folder), rows)


def _line(accuracy: Accuracy) -> str:
    return f"greedy {accuracy.greedy:5.1f}   avg@8 {accuracy.avg:5.1f}   pass@8 {accuracy.best:5.1f}"
