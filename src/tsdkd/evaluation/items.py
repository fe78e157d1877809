"""Responses and scores, item by item: a JSONL file for each model and benchmark, to which a later call appends."""

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
    """One item of a benchmark.

    Attributes:
        task: of the harness; a benchmark may have several.
        doc_id: its place in the task's data set.
        scores: of each sample, in [0, 1].
        responses: the samples; empty where options were compared by their probabilities.
    """

    task: str
    doc_id: int
    scores: list[float]
    responses: list[str]


class ItemResults:
    """The file of one model's items of one benchmark.

    Args:
        path: of the file; needn't be there.
        metadata: what all rows share: the model and the settings. Rows with other metadata are refused.

    Raises:
        OutputDirError: the file has other rows, or can't be read.
    """

    def __init__(self, path: Path, metadata: dict[str, Any]) -> None:
        self.path, self.metadata = path, metadata
        self.results: dict[tuple[str, int], ItemResult] = {}
        with wrap_os_errors(path):
            if path.exists():
                with open_for_append(path):  # a file that can be added to
                    self._load()

    def add(self, items: Iterable[ItemResult]) -> None:
        """Append those that aren't there. Raises `OutputDirError`."""
        new = [item for item in items if (item.task, item.doc_id) not in self.results]
        lines = [json.dumps(asdict(item) | self.metadata, ensure_ascii=False) + "\n" for item in new]
        with open_for_append(self.path) as append:
            append("".join(lines))
        self.results |= {(item.task, item.doc_id): item for item in new}

    def stack_scores(self, items: Iterable[tuple[str, int]]) -> np.ndarray:
        """`[items, samples]`, in the order of `items`: task and doc_id."""
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
                    f"output_dir: line {number} of {self.path} isn't from this version of tsdkd eval; delete it, and "
                    "its items are evaluated again"
                )
            changes = [
                f"{k} was {shorten(metadata[k])}, now {shorten(now)}"
                for k, now in self.metadata.items()
                if metadata[k] != now
            ]
            if changes:
                raise OutputDirError(
                    f"output_dir: {self.path} has other items: {', '.join(changes)}; choose another directory"
                )
            self.results[item.task, item.doc_id] = item


def _is_item(item: ItemResult) -> bool:
    """Whether the values of a line are of their types and ranges."""
    return (
        isinstance(item.task, str)
        and type(item.doc_id) is int
        and 0 <= item.doc_id < 2**63
        and isinstance(item.scores, list)
        and all(type(score) in (int, float) and 0 <= score <= 1 for score in item.scores)
        and isinstance(item.responses, list)
        and all(isinstance(response, str) for response in item.responses)
    )
