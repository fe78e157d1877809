"""Benchmarks as tasks of lm-evaluation-harness: its own, with the papers' shots, and custom ones."""

import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from datasets import load_dataset
from datasets.exceptions import DatasetGenerationError
from jinja2 import UndefinedError
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from ..config.user_code import load_grader
from ..errors import DataError, first_line, list_names
from ..files import load_in_child_first, require_readable_data
from ..grading import is_boxed_letter, is_math_equivalent
from .problem_task import ProblemTask
from .sandbox import run_program
from .suites import Benchmark

Grader = Callable[[str, dict[str, Any]], bool]

_BOXED_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."  # EOPD, appendix C
_SAMPLING_KWARGS = {"do_sample": True, "temperature": 1.0, "top_p": 0.8}
_NEUTRAL_KWARGS = {"top_k": 0, "repetition_penalty": 1.0}  # override the checkpoint's generation settings
_LETTERS = "ABCD"
_DEMO_GRADER = "tsdkd.demo.task:is_correct"  # by name, as in demo.yaml: the demo is above this package


def _math_task(path: str, split: str, question: str, answer: str) -> dict[str, Any]:
    def grade(response: str, doc: dict[str, Any]) -> bool:
        gold = doc[answer]
        return is_math_equivalent(response, str(gold[0] if isinstance(gold, list) else gold))

    return {
        "dataset_path": path,
        "test_split": split,
        "doc_to_text": lambda doc: f"{doc[question]}\n{_BOXED_INSTRUCTION}",
        "grade": grade,
        "generation_kwargs": _SAMPLING_KWARGS,
    }


def _gpqa_task() -> dict[str, Any]:
    def choices(doc: dict[str, Any]) -> list[str]:
        """The columns with the right and the wrong answers, in an order that depends only on the question."""
        names = ["Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))]
        key = {name: hashlib.sha256(f"{doc['Question']}\0{name}".encode()).digest() for name in names}
        return sorted(names, key=key.__getitem__)

    def text(doc: dict[str, Any]) -> str:
        lines = [f"({letter}) {doc[name].strip()}" for letter, name in zip(_LETTERS, choices(doc), strict=True)]
        return "\n".join([doc["Question"].strip(), *lines, _BOXED_INSTRUCTION])

    return {
        "dataset_path": "Idavidrein/gpqa",
        "dataset_name": "gpqa_diamond",
        "test_split": "train",
        "doc_to_text": text,
        "grade": lambda response, doc: is_boxed_letter(response, _LETTERS[choices(doc).index("Correct Answer")]),
        "generation_kwargs": _SAMPLING_KWARGS,
    }


def _demo_task(**generation: Any) -> dict[str, Any]:
    return {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(resources.files("tsdkd").joinpath("demo/test.jsonl"))}},
        "test_split": "test",
        "doc_to_text": lambda doc: doc["prompt"],
        "grade": lambda response, doc: load_grader(_DEMO_GRADER)(response, str(doc["answer"])),
        "generation_kwargs": {"max_gen_toks": 8, **generation},
    }


CUSTOM_TASKS: dict[str, dict[str, Any]] = {
    "math500": _math_task("HuggingFaceH4/MATH-500", "test", "problem", "answer"),
    "amc23": _math_task("math-ai/amc23", "test", "question", "answer"),
    "minerva": _math_task("math-ai/minervamath", "test", "question", "answer"),
    "olympiadbench": _math_task("math-ai/olympiadbench", "test", "question", "final_answer"),
    "aime24": _math_task("HuggingFaceH4/aime_2024", "train", "problem", "answer"),
    "aime25": _math_task("math-ai/aime25", "test", "problem", "answer"),
    "gpqa_diamond": _gpqa_task(),
    "demo": _demo_task(do_sample=True, temperature=1.0),
    "demo_greedy": _demo_task(do_sample=False),
}
"""Task -> its configuration for the harness, and `grade`, which takes a response and its item."""


def build_tasks(benchmark: Benchmark, num_samples: int, max_new_tokens: int, data_dir: Path | None) -> list[Task]:
    """Build the tasks of a benchmark and load their data.

    Args:
        benchmark: the benchmark.
        num_samples: completions per item.
        max_new_tokens: maximum length of a completion, tokens, if it is sampled.
        data_dir: folder with `<task>/<split>.jsonl`, to read instead of the data sets on the hub.

    Raises:
        ConfigError: the user's grader can't be imported.
        DataError: a data set is missing, or a local row isn't one of the benchmark.
    """
    if benchmark.problem_file is not None:
        file, is_sampled = benchmark.problem_file, benchmark.is_sampled
        return [ProblemTask(benchmark.task, file, num_samples, is_sampled, max_new_tokens, **_NEUTRAL_KWARGS)]
    manager = _harness_task_manager() if benchmark.task not in CUSTOM_TASKS else TaskManager(include_defaults=False)
    if benchmark.task in CUSTOM_TASKS:
        task_configs = [_custom_task_config(benchmark.task, num_samples, max_new_tokens)]
    elif benchmark.requires_code_execution:
        task_configs = [_sandboxed_task_config(manager.task_index[benchmark.task].cfg)]
    else:
        task_configs = [
            _harness_task_config(name, benchmark, max_new_tokens) for name in leaf_tasks(manager, benchmark.task)
        ]
    if data_dir is not None:
        task_configs = [
            task_config | _local_dataset_config(task_config["task"], data_dir) for task_config in task_configs
        ]
    if (
        task_configs[0]["task"] in manager.task_index
    ):  # only as members of a group can tasks of the index be overridden
        task_configs = [{"group": benchmark.name, "task": task_configs}]
    try:
        tasks = list(manager.load(task_configs)["tasks"].values())
    except (KeyError, UndefinedError) as error:
        if data_dir is None:
            raise
        raise DataError(
            f"--data_dir: {benchmark.title} needs a split or column that {data_dir} doesn't have: {error}"
        ) from error
    except Exception as error:  # anything from the hub, datasets, pyarrow or the task's functions
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        line = next((line for line in str(cause).splitlines() if line.strip()), f"empty ({type(cause).__name__})")
        place = f" from {data_dir}" if data_dir else ""
        raise DataError(f"{benchmark.title}: the data can't be loaded{place}: {line}") from error
    if data_dir is not None:
        for task in tasks:
            _validate_rows(task, benchmark, data_dir)
    return tasks


def _validate_rows(task: Task, benchmark: Benchmark, data_dir: Path) -> None:
    """Check local rows now: the harness would raise errors only after the models are loaded."""
    examples = list(task.fewshot_docs() or []) if benchmark.num_fewshot else []
    if len(examples) < benchmark.num_fewshot:
        raise DataError(
            f"--data_dir: {data_dir / task.task_name} has {len(examples)} few-shot examples, but {benchmark.title} "
            f"needs {benchmark.num_fewshot}"
        )
    for kind, rows in (("item", task.eval_docs), ("few-shot example", examples)):
        for number, row in enumerate(rows):
            try:
                if empty := [name for name in row if row[name] is None and _is_used(name, task, benchmark, row)]:
                    raise ValueError(f"no {list_names(empty)}")
                if benchmark.requires_code_execution and not _is_list_of_text(row["test_list"]):
                    raise ValueError("test_list isn't a list of strings")
                _, target = task.doc_to_text(row), task.doc_to_target(row)
                if task.OUTPUT_TYPE == "multiple_choice":
                    choices = task.doc_to_choice(row)
                    if target not in (
                        *choices,
                        *range(len(choices)),
                    ):  # the harness would count every response as wrong
                        raise ValueError(f"no choice is {target!r}")
                if benchmark.task in CUSTOM_TASKS:
                    CUSTOM_TASKS[benchmark.task]["grade"]("", row)
            except Exception as error:  # anything from the templates and functions of the harness's tasks
                text = " ".join(str(error).split())[:300]
                raise DataError(
                    f"--data_dir: {kind} {number} of {data_dir / task.task_name} isn't a valid row of "
                    f"{benchmark.title}: {type(error).__name__}: {text}; it has {list_names(row)}"
                ) from error


def _is_list_of_text(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(element, str) for element in value)


@cache
def _harness_task_manager() -> TaskManager:
    """The index of all tasks of the harness. It reads thousands of small files."""
    return TaskManager()


def leaf_tasks(manager: TaskManager, name: str) -> list[str]:
    """The tasks of a name, which may be a task, a group or a tag."""
    entry = manager.task_index[name]
    members = entry.cfg.get("task") if entry.cfg else sorted(entry.tags)
    if isinstance(members, str):
        return [name]
    return [leaf for member in members for leaf in leaf_tasks(manager, member)]


def _custom_task_config(name: str, num_samples: int, max_new_tokens: int) -> dict[str, Any]:
    config = dict(CUSTOM_TASKS[name])
    grade: Grader = config.pop("grade")
    return config | {
        "task": name,
        "output_type": "generate_until",
        "doc_to_target": "",
        "num_fewshot": 0,
        "repeats": num_samples,
        "generation_kwargs": {
            "until": [],
            "max_gen_toks": max_new_tokens,
            **_NEUTRAL_KWARGS,
            **config["generation_kwargs"],
        },
        "filter_list": [{"name": "all", "filter": [{"function": "take_first_k", "k": num_samples}]}],
        "process_results": lambda doc, results: {"score": [float(grade(text, doc)) for text in results[0]]},
        "metric_list": [{"metric": "score", "aggregation": len, "higher_is_better": True}],
    }


def _harness_task_config(name: str, benchmark: Benchmark, max_new_tokens: int) -> dict[str, Any]:
    task_config: dict[str, Any] = {"task": name, "num_fewshot": benchmark.num_fewshot}
    if benchmark.is_sampled:
        task_config["generation_kwargs"] = {
            "until": ["Question:"],
            "max_gen_toks": max_new_tokens,
            **_NEUTRAL_KWARGS,
            **_SAMPLING_KWARGS,
        }
    return task_config


def _sandboxed_task_config(config: dict[str, Any]) -> dict[str, Any]:
    """The harness's task of writing programs, graded in our sandbox: the harness runs programs without one."""
    kept = ("dataset_path", "dataset_name", "test_split", "doc_to_text", "target_delimiter", "generation_kwargs")
    return {
        **{key: config[key] for key in kept},
        "task": "mbpp_sandboxed",
        "output_type": "generate_until",
        "doc_to_target": "",
        "num_fewshot": 0,
        "process_results": lambda doc, results: {"pass_at_1": float(_passes_tests(results[0], doc))},
        "metric_list": [{"metric": "pass_at_1", "aggregation": "mean", "higher_is_better": True}],
    }


def _passes_tests(response: str, doc: dict[str, Any]) -> bool:
    program = response.removeprefix("```python").rpartition("```")[0] or response
    setup = str(doc.get("test_setup_code") or "")
    return run_program("\n".join([setup, program, *doc["test_list"]])).passed


def _is_used(column: str, task: Task, benchmark: Benchmark, row: dict[str, Any]) -> bool:
    """Whether the prompt or the grade depends on a column. None may be a missing value, or a valid one."""

    def rendered(row: dict[str, Any]) -> tuple[Any, ...]:
        grade = CUSTOM_TASKS[benchmark.task]["grade"](r"\boxed{7}", row) if benchmark.task in CUSTOM_TASKS else None
        return task.doc_to_text(row), task.doc_to_target(row), grade

    try:
        return rendered(row) != rendered({**row, column: "7"})
    except Exception:  # it needs the column, or another value
        return True


def hash_local_data(tasks: Sequence[Task], data_dir: Path | None) -> str | None:
    """A digest of the local data that the tasks read: a user's problems, or files in `data_dir`. None without any."""
    if isinstance(tasks[0], ProblemTask):
        return tasks[0].data_hash
    if data_dir is None:
        return None
    digest = hashlib.sha256()
    for path in sorted(path for task in tasks for path in _split_files(task.task_name, data_dir)):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _split_files(task: str, data_dir: Path) -> list[Path]:
    return sorted((data_dir / task).glob("*.jsonl"))


def _local_dataset_config(task: str, data_dir: Path) -> dict[str, Any]:
    files = {path.stem: str(path) for path in _split_files(task, data_dir)}
    if not files:
        raise DataError(f"--data_dir: there is no {data_dir / task}/<split>.jsonl")
    try:
        require_readable_data(data_dir / task)
        load_in_child_first(lambda: load_dataset("json", data_files=files))
    except Exception as error:  # anything from the reader
        raise DataError(
            f"--data_dir: {data_dir / task} can't be read: {first_line(error.__cause__ or error)[:300]}"
        ) from error
    return {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
