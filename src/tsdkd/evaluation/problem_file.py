"""A user's own problems, or those of a task of reasoning-gym, as a benchmark for `tsdkd eval`."""

import math
import os
import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value

from ..config.coercion import shorten
from ..data import Columns, is_reasoning_gym, load_split, missing_column, split_prompt_completion
from ..errors import DataError
from ..files import resolve_path

_MESSAGES = List({"role": Value("string"), "content": Value("string")})
_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class ProblemFile:
    """A file of problems, one per row.

    Attributes:
        path: a JSON, JSONL, CSV or Parquet file, or `reasoning_gym:TASK`.
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
    return "/" in name or name.endswith(_SUFFIXES) or is_reasoning_gym(name)


def load_problems(file: ProblemFile) -> Dataset:
    """Read the problems of a file.

    Returns:
        Columns `messages` (a prompt that is a string becomes one user message) and `answer` (a string).

    Raises:
        DataError: the file can't be read, or a row has no usable prompt or answer.
    """
    path = str(resolve_path(file.path))
    if not os.path.exists(path) and not is_reasoning_gym(path):  # `load_split` would look for a data set on the hub
        raise DataError(f"--benchmarks: there is no file {file.path!r}")
    rows = load_split(path, None, "test" if is_reasoning_gym(path) else "train", "--benchmarks")
    present = rows.column_names
    prompt = file.prompt_column or ("messages" if "prompt" not in present and "messages" in present else "prompt")
    answer = file.answer_column or "answer"
    for field, name, is_given in (
        ("prompt_column", prompt, file.prompt_column),
        ("answer_column", answer, file.answer_column),
    ):
        if name not in present:
            usual = ("prompt", "messages") if field == "prompt_column" else ("answer",)
            raise missing_column(f"--{field}", file.path, (name,) if is_given else usual, present)
    try:
        problems = [_read_row(row, index, prompt, answer) for index, row in enumerate(rows)]
    except DataError as error:
        raise DataError(f"--benchmarks: {file.path}: {error}") from error
    return Dataset.from_list(problems, Features({"messages": _MESSAGES, "answer": Value("string")}))


def _read_row(row: Any, index: int, prompt_column: str, answer_column: str) -> dict[str, Any]:
    prompt, _ = split_prompt_completion(row, index, Columns(prompt_column, None, None))
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answer = row[answer_column]
    is_number = isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer)
    if not is_number and not (isinstance(answer, str) and answer.strip()):
        raise DataError(f"row {index}: {answer_column} must be text or a number, found {shorten(answer)}")
    return {
        "messages": [{"role": m["role"], "content": m["content"]} for m in messages],
        # without an exponent: math-verify misreads 5e-05
        "answer": format(Decimal(repr(answer)), "f") if isinstance(answer, float) else str(answer),
    }


def problem_file_title(file: ProblemFile) -> str:
    """The name of the file without its folder and its ending; of a task, its name and options."""
    if is_reasoning_gym(file.path):
        return re.sub(r"[^\w.+]+", "-", file.path.partition(":")[2])[:100]
    return Path(file.path).stem
