"""The rows of the output file: the names of their columns, and which rows the file already has."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config.base import TokenSelectiveConfig
from ..config.coercion import shorten
from ..data import Columns
from ..errors import ConfigError, OutputDirError
from ..files import iter_whole_lines

SHARED_OPTIONS = ("seed", "temperature", "top_p", "max_new_tokens", "prompt_suffix")
"""Options of the run that every row records."""
_OTHER_COLUMNS = {
    *("index", "sample", "num_tokens", "finish_reason", "model", "revision", "engine", "chat_template_kwargs")
}


def output_columns(args: TokenSelectiveConfig) -> Columns:
    """The prompt, completion and answer columns, named as the run expects them.

    Raises:
        ConfigError: a name is taken by another column of the output.
    """
    columns = {
        "prompt_column": args.prompt_column or "prompt",
        "completion_column": args.completion_column or "completion",
        "answer_column": args.answer_column or "answer",
    }
    problems = [
        f"{field}: the output file uses the column {name!r} for something else; rename the column in the data set"
        for field, name in columns.items()
        if name in {*_OTHER_COLUMNS, *SHARED_OPTIONS} or (list(columns.values()).count(name) > 1)
    ]
    if problems:
        raise ConfigError(problems)
    return Columns(*columns.values())


def read_finished(
    output: Path, prompt_column: str, metadata: dict[str, Any], num_prompts: int, get_prompt: Callable[[int], Any]
) -> set[tuple[int, int]]:
    """The (index, sample) pairs of the rows that the file has. An incomplete last line is removed.

    Args:
        output: the file.
        prompt_column: the name of its prompt column.
        metadata: the values that are the same in all rows.
        num_prompts: number of rows of the data set.
        get_prompt: returns the prompt of a row of the data set.

    Raises:
        OutputDirError: a row isn't from this command, or from another model, setting or prompt. The file is unchanged.
    """
    done, prefix = set(), f"{{{json.dumps(prompt_column, ensure_ascii=False)}: ".encode()
    for number, line in iter_whole_lines(output, prefix, "output_file"):
        try:
            row = json.loads(line)
            key = _row_key(row, num_prompts)
            found = {name: row[name] for name in metadata} | {"prompt": row[prompt_column]}
            expected = metadata | {"prompt": get_prompt(key[0])}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise OutputDirError(f"output_file: line {number} of {output} wasn't written by tsdkd generate") from error
        for name, value in expected.items():
            if found[name] != value:
                raise OutputDirError(
                    f"output_file: {output} has rows of other settings: {name} was {shorten(found[name])}, now "
                    f"{shorten(value)}; choose another file"
                )
        done.add(key)
    return done


def _row_key(row: Any, num_prompts: int) -> tuple[int, int]:
    """The index and sample of a row. Raises `ValueError`, `KeyError` or `TypeError` for an invalid row."""
    index, sample = row["index"], row["sample"]
    if not (type(index) is type(sample) is int and 0 <= index < num_prompts and 0 <= sample < 2**31):
        raise ValueError(f"index {index!r}, sample {sample!r}")
    return index, sample


def to_json_value(value: Any) -> Any:
    """A value of a data set, as text if JSON can't hold it: Parquet has more types."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return str(value)
    return value
