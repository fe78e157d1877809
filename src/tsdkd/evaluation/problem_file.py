"""A user's own problems: a file of prompts and answers, as a benchmark for `tsdkd eval`."""

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value

from ..config.coercion import shorten
from ..data import load_split, split_prompt_completion
from ..errors import ConfigError, DataError, first_line, list_names
from ..grading import is_math_equivalent
from ..run.config_file import resolve_path

Grade = Callable[[str, str], bool]

_MESSAGES = List({"role": Value("string"), "content": Value("string")})
_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class ProblemFile:
    """A file of problems, one per row.

    Attributes:
        path: a JSON, JSONL, CSV or Parquet file.
        prompt_column: column with a string or a list of messages; None: `prompt`, or else `messages`.
        answer_column: column with the right answer, text or a number; None: `answer`.
        grader: the `package.module:function` that grades a completion; None: math-verify.
    """

    path: str
    prompt_column: str | None = None
    answer_column: str | None = None
    grader: str | None = None


def is_problem_file(name: str) -> bool:
    """Whether a name on the command line is that of a file rather than of a benchmark."""
    return "/" in name or name.endswith(_SUFFIXES)


def load_problems(file: ProblemFile) -> Dataset:
    """Read the problems of a file.

    Returns:
        Columns `messages` (a prompt that is a string becomes one user message) and `answer` (a string).

    Raises:
        DataError: the file can't be read, or a row has no usable prompt or answer.
    """
    path = str(resolve_path(file.path))
    if not os.path.exists(path):  # `load_split` would look for a data set on the hub
        raise DataError(f"--benchmarks: there is no file {file.path!r}")
    rows = load_split(path, None, "train", "--benchmarks")
    present = rows.column_names
    prompt = file.prompt_column or ("messages" if "prompt" not in present and "messages" in present else "prompt")
    answer = file.answer_column or "answer"
    for flag, name in (("prompt_column", prompt), ("answer_column", answer)):
        if name not in present:
            has = f"it has {list_names(present)}"
            raise DataError(f"--benchmarks: {file.path} has no column {name!r}, {has}; set --{flag}")
    try:
        problems = [_read_row(row, index, prompt, answer) for index, row in enumerate(rows)]
    except DataError as error:
        raise DataError(f"--benchmarks: {file.path}: {error}") from error
    return Dataset.from_list(problems, Features({"messages": _MESSAGES, "answer": Value("string")}))


def _read_row(row: Any, index: int, prompt_column: str, answer_column: str) -> dict[str, Any]:
    prompt, _ = split_prompt_completion(row, index, (prompt_column, None))
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answer = row[answer_column]
    if not isinstance(answer, str | int | float) or not str(answer).strip():
        raise DataError(f"row {index}: {answer_column} must be text or a number, found {shorten(answer)}")
    return {
        "messages": [{"role": m["role"], "content": m["content"]} for m in messages],
        "answer": str(answer),
    }


def load_grader(name: str | None) -> Grade:
    """Import the function that grades; None: math-verify. Modules in the current directory can be imported.

    Raises:
        ConfigError: there is no such module or function. The returned function also raises it, when the user's own
            function raises an exception or returns something else than a truth value.
    """
    if name is None:
        return is_math_equivalent
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ConfigError([f"--grader: expected package.module:function, found {shorten(name)}"])
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # whatever the module raises
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError([f"--grader: {name} can't be imported: {reason}"]) from error
    if not callable(function):
        raise ConfigError([f"--grader: {name} must be a function, found {shorten(function)}"])

    def grade(completion: str, answer: str) -> bool:
        try:
            verdict = function(completion, answer)
            is_right = bool(verdict)
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise ConfigError([f"--grader: {name} raised {reason}, for answer {shorten(answer)}"]) from error
        if verdict not in (0, 1):
            raise ConfigError([f"--grader: {name} must return True or False, found {shorten(verdict)}"])
        return is_right

    return grade


def problem_file_title(file: ProblemFile) -> str:
    """The name of the file without its folder and its ending."""
    return Path(file.path).stem
