"""Finds the columns of prompt, completion and answer, and reads them from a row."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from datasets import Dataset

from ..config.base import TokenSelectiveConfig
from ..config.coercion import did_you_mean
from ..errors import DataError, list_names

_USUAL_NAMES = {
    "prompt_column": ("question", "query", "problem", "instruction", "input", "prompt", "messages"),
    "completion_column": ("response", "output", "solution", "completion"),
    "answer_column": ("final_answer", "expected_answer", "gold", "target", "label", "solution", "answer"),
}


class Columns(NamedTuple):
    """The names of a data set's columns; None for completion or answer if there is no such column."""

    prompt: str
    completion: str | None
    answer: str | None


def resolve_columns(
    rows: Dataset, args: TokenSelectiveConfig, source: str = "the data set", needs_answer: bool = False
) -> Columns:
    """Find the columns by their options, or by their usual names.

    Args:
        rows: the data set.
        args: `prompt_column`, `completion_column` and `answer_column`.
        source: what messages call the data set.
        needs_answer: whether `answer_column`, where it is set, must be there.

    Raises:
        DataError: a column isn't there; the message lists those that are.
    """
    present = rows.column_names
    fields = ("prompt_column", "completion_column", *(("answer_column",) if needs_answer else ()))
    for field in fields:
        if (name := getattr(args, field)) is not None and name not in present:
            raise missing_column(field, source, (name,), present)
    given_answer = args.answer_column or "answer"
    answer = given_answer if given_answer in present else None
    completion = args.completion_column or ("completion" if "completion" in present else None)
    prompt = args.prompt_column or ("prompt" if "prompt" in present else None)
    if prompt is not None:
        return Columns(prompt, completion, answer)
    if "messages" not in present:
        raise missing_column("prompt_column", source, ("prompt", "messages"), present)
    if args.completion_column:
        raise DataError("completion_column: no use beside messages, whose last assistant turn is the completion")
    return Columns("messages", None, answer)


def missing_column(field: str, source: str, expected: Sequence[str], present: Sequence[str]) -> DataError:
    """The error for missing columns: names the data set, its columns, and a similar name.

    Args:
        field: the option that names the column, or the flag, with its dashes.
        source: what the message calls the data set.
        expected: the names that were looked for.
        present: the names that the data set has.
    """
    meant = did_you_mean(expected[0], present).removeprefix(", ")
    usual = next((name for name in _USUAL_NAMES[field.lstrip("-")] if name in present), None)
    hint = meant or (f"did you mean {usual!r}?" if usual else "")
    remedy = "" if len(expected) == 1 else f"; set {field}"
    return DataError(
        f"{field}: {source} has no column {' or '.join(map(repr, expected))}; "
        f"it has {list_names(map(repr, present))}{remedy}{'; ' if hint else ''}{hint}"
    )


def split_prompt_completion(row: dict[str, Any], index: int, columns: Columns) -> tuple[Any, str | None]:
    """Prompt (string or messages) and completion. The last assistant turn of a conversation is its completion."""
    prompt_column, completion_column, _ = columns
    prompt = row[prompt_column]
    completion = row[completion_column] if completion_column else None
    if isinstance(completion, list):
        _check_messages(completion, index, completion_column)
        if len(completion) != 1 or completion[0]["role"] != "assistant":
            raise DataError(f"row {index}: {completion_column} must be a string or one assistant message")
        completion = completion[0]["content"]
    if completion is not None and not isinstance(completion, str):
        raise DataError(f"row {index}: {completion_column} must be a string, found {type(completion).__name__}")
    if not isinstance(prompt, str) or prompt_column == "messages" or not prompt.strip():
        if not prompt or not isinstance(prompt, list):
            found = "nothing" if not prompt or not str(prompt).strip() else repr(prompt)[:60]
            raise DataError(f"row {index}: no prompt: {prompt_column} must be a string or messages, found {found}")
        _check_messages(prompt, index, prompt_column)
        if completion is None and prompt[-1]["role"] == "assistant":
            prompt, completion = prompt[:-1], prompt[-1]["content"]
            if not prompt:
                raise DataError(f"row {index}: no prompt: {prompt_column} has only an assistant turn")
    return prompt, completion


def append_prompt_suffix(prompt: Any, index: int, suffix: str | None) -> Any:
    """Append a line to a prompt; in a conversation, to its last user message.

    Raises:
        DataError: there is no user message.
    """
    if not suffix:
        return prompt
    if isinstance(prompt, str):
        return f"{prompt}\n{suffix}"
    last = max((i for i, message in enumerate(prompt) if message["role"] == "user"), default=None)
    if last is None:
        raise DataError(f"row {index}: no user message after which prompt_suffix could go")
    message = {**prompt[last], "content": f"{prompt[last]['content']}\n{suffix}"}
    return [*prompt[:last], message, *prompt[last + 1 :]]


def _check_messages(messages: list[Any], index: int, column: str | None) -> None:
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            found = f"{message.get('role')}: no content" if isinstance(message, dict) else repr(message)
            what = "completion" if isinstance(message, dict) and message.get("role") == "assistant" else "prompt"
            raise DataError(
                f"row {index}: no {what}: {column} must hold messages, each with role and content, found {found[:60]}"
            )
