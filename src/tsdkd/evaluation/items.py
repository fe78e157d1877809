"""What came out, item by item: a JSONL file for each model and benchmark, to which a later call adds the rest."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import OutputDirError
from ..files import open_for_append, wrap_os_errors


@dataclass
class ItemResult:
    """One item of a benchmark.

    Attributes:
        task: of the harness; a benchmark may have several.
        doc: its place in the task's data set.
        scores: of each sample, in [0, 1].
        responses: the samples; empty where options were compared by their probabilities.
    """

    task: str
    doc: int
    scores: list[float]
    responses: list[str]


class ItemResults:
    """The file of one model's items of one benchmark.

    Args:
        path: of the file; needn't be there.
        source: what all rows share: the model, how it was asked. Rows of another source are refused.

    Raises:
        OutputDirError: the file has other rows, or can't be read.
    """

    def __init__(self, path: Path, metadata: dict[str, Any]) -> None:
        self.path, self.metadata = path, metadata
        self.results: dict[tuple[str, int], ItemResult] = {}
        with wrap_os_errors(path):
            if path.exists():
                self._load()

    def add(self, items: Iterable[ItemResult]) -> None:
        """Append those that aren't there. Raises `OutputDirError`."""
        new = [item for item in items if (item.task, item.doc) not in self.results]
        lines = [json.dumps(asdict(item) | self.metadata, ensure_ascii=False) + "\n" for item in new]
        with open_for_append(self.path) as file:
            file.write("".join(lines))
        self.results |= {(item.task, item.doc): item for item in new}

    def stack_scores(self, wanted: Iterable[tuple[str, int]]) -> np.ndarray:
        """`[items, samples]`, in the order of `wanted`."""
        return np.array([self.results[key].scores for key in wanted])

    def _load(self) -> None:
        valid_bytes = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):  # cut off in the middle
                    break
                try:
                    row = json.loads(line)
                    item = ItemResult(**{name: row[name] for name in ("task", "doc", "scores", "responses")})
                    results = {name: row[name] for name in self.metadata}
                    is_damaged = len(item.scores) != row["samples"] or not all(
                        0 <= score <= 1 for score in item.scores
                    )
                except (ValueError, KeyError, TypeError):
                    is_damaged = True
                if is_damaged:
                    raise OutputDirError(
                        f"output_dir: line {number} of {self.path} isn't from this version of tsdkd eval; delete it, "
                        "and it is asked again"
                    )
                other = [
                    f"{k} was {results[k]!r}, now {now!r}" for k, now in self.metadata.items() if results[k] != now
                ]
                if other:
                    raise OutputDirError(
                        f"output_dir: {self.path} has other items: {', '.join(other)}; choose another directory"
                    )
                self.results[item.task, item.doc] = item
                valid_bytes += len(line)
        if valid_bytes < self.path.stat().st_size:
            os.truncate(self.path, valid_bytes)
