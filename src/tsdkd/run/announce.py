"""Log lines at the start and the end of a run."""

import os
import shlex
from typing import Any

from torch import nn
from tqdm import tqdm

from ..config.logs import get_logger
from ..config.options import enum_value
from ..data import is_reasoning_gym
from ..data.reasoning_gym import test_name
from ..files import shorten_path
from ..trainer.progress import describe_step_time
from ..trainer.trainer import TokenSelectiveTrainer
from .arguments import RunArguments
from .dry_run import num_training_steps, summarize_batch, summarize_rollouts

logger = get_logger(__name__)


def announce_start(arguments: RunArguments, trainer: TokenSelectiveTrainer) -> None:
    """Log the models, data, steps and output directory of the run."""
    training = arguments.training_args
    steps = num_training_steps(len(trainer.get_train_dataloader()), training)
    where = f"{_count(training.world_size, 'process', 'processes')} ({training.device.type})"
    prompts = _count(len(trainer.train_dataset), "prompt")
    lines = {
        "method": f"{arguments.method}, on {_describe_completions(training)}",
        "student": _describe_model(str(arguments.model_args.model_name_or_path), trainer.model),
        "teacher": _describe_model(str(training.teacher_model_name_or_path), getattr(trainer, "teacher_model", None))
        + _describe_servers(training.teacher_server_base_url),
        "data": f"{prompts} from {shorten_path(str(arguments.data_args.dataset_name))}",
        "evaluate": _describe_evaluation(training, trainer.eval_dataset)
        or ("not during training: eval_strategy is no" if arguments.data_args.eval_dataset_name else ""),
        "training": f"{_count(steps, 'step')} of {summarize_batch(training)} on {where}",
        "output": f"{training.output_dir}{_describe_saving(training)}",
    }
    for name, text in lines.items():
        if text:
            logger.info(f"{name + ':':<9} {text}")


def announce_end(trainer: TokenSelectiveTrainer) -> None:
    """Log the duration of the run and where the student was saved."""
    history = trainer.state.log_history
    seconds = next((entry["train_runtime"] for entry in reversed(history) if "train_runtime" in entry), 0.0)
    timed = [entry for entry in history if "time/step_seconds" in entry]
    names = {name for entry in timed for name in entry if name.startswith("time/")}
    means = {name: sum(entry.get(name, 0.0) for entry in timed) / len(timed) for name in names}
    duration = f"trained {_count(trainer.state.global_step, 'step')} in {tqdm.format_interval(seconds)}"
    loss = next((f"mean loss {entry['train_loss']:.3g}" for entry in reversed(history) if "train_loss" in entry), None)
    logger.info(", ".join([duration, *filter(None, [loss]), *describe_step_time(means)]))
    logger.info(f"saved the student to {trainer.args.output_dir}")


def _describe_completions(training: Any) -> str:
    rollouts = summarize_rollouts(training)
    return f"rollouts {rollouts}" if rollouts else "completions from the data set"


def _describe_model(name: str, model: nn.Module | None) -> str:
    if model is None:
        return ""
    parameters = list(model.parameters())
    count = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)  # ds_numel: size of a whole sharded parameter
    number = f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
    return f"{shorten_path(name)}, {number} parameters, {str(parameters[0].dtype).removeprefix('torch.')}"


def _describe_servers(urls: list[str] | None) -> str:
    return f" (its output layer; the other layers are on {', '.join(urls)})" if urls else ""


def _describe_evaluation(training: Any, rows: Any) -> str:
    if rows is None:
        return ""
    count = sum(map(len, rows.values())) if isinstance(rows, dict) else len(rows)
    when = [_describe_interval(training.eval_strategy, training.eval_steps)]
    when += ["before training"] if training.eval_on_start else []
    return f"on {_count(count, 'prompt')}, {' and '.join(filter(None, when))}"


def _describe_interval(strategy: Any, steps: float | None) -> str:
    return {"steps": f"every {steps} steps", "epoch": "every epoch"}.get(str(enum_value(strategy)), "")


def _count(number: int, noun: str, plural: str = "") -> str:
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def _describe_saving(training: Any) -> str:
    interval = _describe_interval(training.save_strategy, training.save_steps)
    return f"; a checkpoint {interval}" if interval else ""


def suggest_next(arguments: RunArguments) -> list[str]:
    """Return the commands that continue from a finished run."""
    folder = str(arguments.training_args.output_dir)
    student = shorten_path(str(arguments.model_args.model_name_or_path))
    evaluate = ["tsdkd", "eval", f"before={student}", f"after={folder}", *_evaluation_flags(arguments, student)]
    return [shlex.join(["tsdkd", "report", folder]), shlex.join(evaluate)]


def _evaluation_flags(arguments: RunArguments, student: str) -> list[str]:
    """The user's own problems, if there is a file of them or they are generated, or else a suite."""
    if student.startswith("tsdkd://demo/"):
        return ["--suite", "demo"]
    data, training = arguments.data_args, arguments.training_args
    file = data.eval_dataset_name
    if file is None and is_reasoning_gym(data.dataset_name):
        file = test_name(str(data.dataset_name))
    if file and (os.path.isfile(file) or is_reasoning_gym(file)):
        columns = {"prompt_column": training.prompt_column, "answer_column": training.answer_column}
        return [
            "--benchmarks",
            file.replace(",", "%2C"),
            *(word for k, v in columns.items() if v for word in (f"--{k}", v)),
        ]
    return ["--suite", "eopd" if "opd" in arguments.method else "tsd-kd"]
