"""The demo: accuracy of teacher and student, distillation, accuracy of the student on problems it never saw."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..config.console import PlainConsole
from ..data import load_split
from ..errors import DataError, install_hint
from ..evaluation import EvalResult, ProblemSet, evaluate
from ..grading import Grader
from ..models.tokenizers import stop_token_ids
from ..run.arguments import RunArguments
from ..run.output_dir import resolve_resume
from ..run.train import train
from . import task

logger = logging.getLogger(__name__)

NUM_PROBLEMS = 256
_TABLE_METRICS = ("greedy", "avg@8", "pass@8")


def run_demo(arguments: RunArguments) -> None:
    """Run the demo and print its table. Raises `TSDKDError`."""
    resolve_resume(arguments)
    torch.set_num_threads(
        min(2, torch.get_num_threads())
    )  # more cost more than they give on matrices of 64 x 64, and change the bits of the run
    rows = _load_problems(str(arguments.data_args.eval_dataset_name))
    logger.info("evaluating teacher and student on %d held-out problems, percent solved:", len(rows))
    teacher = evaluate_saved(str(arguments.training_args.teacher_model_name_or_path), rows)
    logger.info("teacher %s", _format_metrics(teacher))
    before = evaluate_saved(str(arguments.model_args.model_name_or_path), rows)
    logger.info("student %s", _format_metrics(before))
    train(arguments)
    after = evaluate_saved(str(arguments.training_args.output_dir), rows)

    logger.info("")
    logger.info("%s on %d held-out problems, percent solved:", arguments.method, len(rows))
    table = Table()
    for column in ("", *_TABLE_METRICS):
        table.add_column(column, justify="right" if column else "left")
    for name, result in (("teacher", teacher), ("student, before", before), ("student, after", after)):
        table.add_row(name, *(f"{result.metrics[metric]:.1f}" for metric in _TABLE_METRICS))
    table.add_row("change", *(f"{after.metrics[metric] - before.metrics[metric]:+.1f}" for metric in _TABLE_METRICS))
    PlainConsole().print(table)
    logger.info("avg@8 and pass@8: the mean, and the best, of 8 samples at temperature 1")
    if "max_steps" in arguments.flag_names:
        logger.info("the README's numbers are for the default number of steps; few steps can lower the accuracy")
    _write_report(arguments, {"before": before, "after": after, "teacher": teacher})


def _load_problems(name: str) -> list[dict[str, str]]:
    """The problems to evaluate on. Raises `DataError`."""
    rows = list(load_split(name, None, "train"))[:NUM_PROBLEMS]
    if not all(isinstance(row.get(column), str) for row in rows for column in ("prompt", "answer")):
        raise DataError(f"eval_dataset_name {name}: the demo needs rows with the texts prompt and answer")
    return rows


def _write_report(arguments: RunArguments, eval_results: dict[str, EvalResult]) -> None:
    """The evaluation's files and the run's report, both in its folder."""
    try:
        from ..evaluation.results import BenchmarkResult, write_results
        from ..evaluation.suites import SUITES
        from ..report.page import write_report
    except ImportError as error:
        logger.warning("no report: it needs %s; %s", error.name, install_hint("report"))
        return
    folder = Path(str(arguments.training_args.output_dir))
    models = {
        "before": str(arguments.model_args.model_name_or_path),
        "after": str(folder),
        "teacher": str(arguments.training_args.teacher_model_name_or_path),
    }
    greedy, sampled = SUITES["demo"].benchmarks
    measured = []
    for name, result in eval_results.items():
        # which of the samples are right doesn't matter
        samples = np.arange(result.num_samples) < np.array(result.num_correct)[:, None]
        measured.append(BenchmarkResult(name, greedy, np.array(result.is_greedy_correct, dtype=float)[:, None]))
        measured.append(BenchmarkResult(name, sampled, samples.astype(float)))
    write_results(measured, models, "before", folder / "eval", "demo")
    logger.info("report: %s", write_report([folder], folder / "report.html"))


def evaluate_saved(folder: str, rows: list[dict[str, str]]) -> EvalResult:
    """Evaluate a saved model, loaded as a user would load it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return evaluate_demo(model, AutoTokenizer.from_pretrained(folder), rows)


def evaluate_demo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, str]],
    temperatures: Sequence[float] = (1.0,),
) -> EvalResult:
    """Evaluate a model on rows with `prompt` and `answer`, greedily and in eight samples at each temperature."""
    chats = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    problems = ProblemSet(
        prompts=[tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats],
        answers=[row["answer"] for row in rows],
        limits=[task.COMPLETION_TOKENS + 3] * len(rows),
        stop_token_ids=stop_token_ids(model.config.vocab_size, (model.generation_config, tokenizer)),
        vocab_size=model.config.vocab_size,
        decode=lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
        grader=Grader(task.is_correct, "tsdkd.demo.task:is_correct"),
    )
    return evaluate(model, problems, temperatures=temperatures)


def _format_metrics(result: EvalResult) -> str:
    return "   ".join(f"{metric} {result.metrics[metric]:5.1f}" for metric in _TABLE_METRICS)
