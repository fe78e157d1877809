"""Stores responses and scores, item by item, in one JSONL file per model and benchmark. Later calls append to it."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config.coercion import shorten
from ..errors import OutputDirError
from ..files import iter_whole_lines, open_for_append, wrap_os_errors


@dataclass
class ItemResult:
    """The result of one item of a benchmark.

    Attributes:
        task: the harness's task; a benchmark may have several.
        doc_id: row number in the task's data set.
        scores: one score per sample, in [0, 1].
        responses: the samples; empty if the model only scored the options of a multiple-choice question.
    """

    task: str
    doc_id: int
    scores: list[float]
    responses: list[str]


class ItemResults:
    """The results of one model on one benchmark, and their file.

    Args:
        path: the file, which may not exist yet.
        metadata: the model and the settings, which are the same in all rows.

    Raises:
        OutputDirError: the file has rows with other metadata, or can't be read.
    """

    def __init__(self, path: Path, metadata: dict[str, Any]) -> None:
        self.path, self.metadata = path, metadata
        self.results: dict[tuple[str, int], ItemResult] = {}
        with wrap_os_errors(path):
            if path.exists():
                with open_for_append(path):  # check now that the file can be appended to
                    self._load()

    def add(self, items: Iterable[ItemResult]) -> None:
        """Append the items that the file doesn't have yet. Raises `OutputDirError`."""
        new = [item for item in items if (item.task, item.doc_id) not in self.results]
        lines = [json.dumps(asdict(item) | self.metadata, ensure_ascii=False) + "\n" for item in new]
        with open_for_append(self.path) as append:
            append("".join(lines))
        self.results |= {(item.task, item.doc_id): item for item in new}

    def stack_scores(self, items: Iterable[tuple[str, int]]) -> np.ndarray:
        """The scores `[items, samples]` of some items, each given as (task, doc_id)."""
        return np.array([self.results[key].scores for key in items])

    def _load(self) -> None:
        for number, line in iter_whole_lines(self.path, prefix=b'{"task": '):
            try:
                row = json.loads(line)
                item = ItemResult(**{name: row[name] for name in ("task", "doc_id", "scores", "responses")})
                metadata = {name: row[name] for name in self.metadata}
                is_damaged = not _is_item(item) or len(item.scores) != row["samples"]
            except (ValueError, KeyError, TypeError, RecursionError):
                is_damaged = True
            if is_damaged:
                raise OutputDirError(
                    f"output_dir: line {number} of {self.path} wasn't written by this version of tsdkd eval; delete "
                    "the line to evaluate its items again"
                )
            changes = [
                f"{k} was {shorten(metadata[k])}, now {shorten(now)}"
                for k, now in self.metadata.items()
                if metadata[k] != now
            ]
            if changes:
                raise OutputDirError(
                    f"output_dir: {self.path} has items of other settings: {', '.join(changes)}; choose another folder"
                )
            self.results[item.task, item.doc_id] = item


def _is_item(item: ItemResult) -> bool:
    """Whether the values of a line have the right types and ranges."""
    return (
        isinstance(item.task, str)
        and type(item.doc_id) is int
        and 0 <= item.doc_id < 2**63
        and isinstance(item.scores, list)
        and all(type(score) in (int, float) and 0 <= score <= 1 for score in item.scores)
        and isinstance(item.responses, list)
        and all(isinstance(response, str) for response in item.responses)
    )
