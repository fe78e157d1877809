"""The newest completions that a run logged (`log_completions`), as `tsdkd.trainer.completion_log` writes them."""

import re
from dataclasses import dataclass
from pathlib import Path

from ..analysis.left_out import leave_out_damaged
from ..config.coercion import shorten
from ..errors import DataError
from ..files import parse_json, read_bounded
from ..trainer.completion_log import COMPLETIONS_DIR

_NAME = re.compile(r"(train|eval[\w.-]*)-\d{8,12}\.jsonl")
_MAX_TABLES = 8
_MAX_MIB, _MAX_ROWS, _MAX_CHARACTERS = 64, 16, 4000
_COLUMNS = ("prompt", "completion", "tokens", "ended", "answer", "correct")


@dataclass
class LoggedCompletions:
    """Some completions of one step: a title, the names of the columns, and the rows as text."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def read_completions(folder: Path, skipped: list[str]) -> list[LoggedCompletions]:
    """Completions of the last rollout and the last evaluations; `skipped` takes the reasons why some are missing."""
    newest: dict[str, Path] = {}
    for path in sorted((folder / COMPLETIONS_DIR).glob("*.jsonl")):
        if match := _NAME.fullmatch(path.name):
            newest[match[1]] = path
    found = []
    for name in sorted(newest, reverse=True)[:_MAX_TABLES]:
        with leave_out_damaged(skipped):
            found.append(_read_file(newest[name], name))
    return found


def _read_file(path: Path, name: str) -> LoggedCompletions:
    lines = read_bounded(path, _MAX_MIB).splitlines()[:_MAX_ROWS]
    rows = [parse_json(line, path) for line in lines]
    if not rows or not all(isinstance(row, dict) and "step" in row for row in rows):
        raise DataError(f"{path} isn't a file of logged completions, or is damaged")
    columns = [name for name in _COLUMNS if name in rows[0]]
    cells = [[_to_text(row.get(name)) for name in columns] for row in rows]
    return LoggedCompletions(f"{name}, step {shorten(rows[0]['step'])}", columns, cells)


def _to_text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = value if isinstance(value, str) else shorten(value)
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}…"
