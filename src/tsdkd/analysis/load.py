"""Records of a run, read back, and which tokens a method selects in them."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from ..errors import DataError
from ..run.output_dir import RUN_CONFIG_NAME, read_run_config
from ..selection import entropy_gap_gate, opener_mask, top_entropy_mask
from ..trainer.token_records import RECORDS_DIR


@dataclass(frozen=True)
class SelectionOptions:
    """Options that decide which tokens a method selects; TSD-KD's and EOPD's defaults where a run has none."""

    opener_ratio: float = 0.1
    entropy_ratio: float = 0.1
    gate_temperature: float = 1.0
    entropy_threshold: float = 0.8


@dataclass
class StepRecord:
    """One recorded step.

    Attributes:
        step: optimizer steps done.
        columns: name -> `[N]` or `[N, K]`, of `tsdkd.trainer.token_records.compute_token_records`, and `sample` and
            `position`.
        samples: of each completion its row's `index` and its `prompt`'s ids.
        texts: id -> text.
        options: of the run.
    """

    step: int
    columns: dict[str, np.ndarray]
    samples: list[dict[str, Any]]
    texts: dict[int, str]
    options: SelectionOptions

    @cached_property
    def lengths(self) -> np.ndarray:
        """`[samples]`, tokens."""
        return np.bincount(self.columns["sample"], minlength=len(self.samples))

    @cached_property
    def gate(self) -> np.ndarray:
        """`[N]`, TSD-KD's Eq. 11."""
        ours, theirs = (torch.from_numpy(self.columns[name]) for name in ("student_entropy", "teacher_entropy"))
        return entropy_gap_gate(ours, theirs, self.options.gate_temperature).numpy()

    @cached_property
    def is_opener(self) -> np.ndarray:
        """`[N]` bool, TSD-KD's Sec. 3.1."""
        entropy, mask = self._pad_entropy()
        return opener_mask(entropy, mask, self.options.opener_ratio)[mask].numpy()

    @cached_property
    def is_high_entropy(self) -> np.ndarray:
        """`[N]` bool, whose entropy L_EM minimises (TSD-KD Eq. 12)."""
        entropy, mask = self._pad_entropy()
        return top_entropy_mask(entropy, mask, self.options.entropy_ratio)[mask].numpy()

    @cached_property
    def is_triggered(self) -> np.ndarray:
        """`[N]` bool, where EOPD adds forward KL (Eq. 9)."""
        return self.columns["teacher_entropy"] > self.options.entropy_threshold

    @cached_property
    def kendall_tau(self) -> np.ndarray:
        """`[N]` in [-1, 1], Kendall's tau between the student's order of its candidates and the teacher's."""
        theirs = self.columns["candidate_teacher_logps"]
        first, second = np.triu_indices(theirs.shape[1], 1)  # the student's order is theirs to begin with
        return np.sign(theirs[:, first] - theirs[:, second]).mean(axis=1)

    def _pad_entropy(self) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = torch.from_numpy(self.lengths)
        mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(-1)
        entropy = torch.zeros(mask.shape).masked_scatter(mask, torch.from_numpy(self.columns["student_entropy"]))
        return entropy, mask


def read_records(run: Path, skipped: list[str] | None = None) -> list[StepRecord]:
    """All records of a run, by step.

    Args:
        run: its directory.
        skipped: takes the reasons why some can't be read, instead of an error.

    Raises:
        DataError: there are none, or one can't be read.
    """
    paths = sorted((run / RECORDS_DIR).glob("step-*.parquet"))
    if not paths:
        raise DataError(
            f"{run} has no records; training writes them with --record_steps N, and tsdkd analyze --config makes some"
        )
    options = _read_options(run)
    records = []
    for path in paths:
        try:
            records.append(_read_record(path, options))
        except DataError as error:
            if skipped is None:
                raise
            skipped.append(str(error))
    return records


def _read_record(path: Path, options: SelectionOptions) -> StepRecord:
    try:
        table = pq.read_table(path)
        metadata = json.loads(table.schema.metadata[b"tsdkd"])
        columns = {name: _to_numpy(table[name]) for name in table.column_names}
        texts = {int(i): text for i, text in metadata["texts"].items()}
        return StepRecord(metadata["step"], columns, metadata["samples"], texts, options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise DataError(f"{path} isn't a record of tsdkd, or is damaged: {reason}") from error


def _to_numpy(column: Any) -> np.ndarray:
    whole = column.combine_chunks()
    size = getattr(whole.type, "list_size", None)
    flat = whole.flatten() if size else whole
    numbers = flat.to_numpy(zero_copy_only=False)
    numbers = numbers.astype(np.float32) if numbers.dtype == np.float16 else numbers
    return numbers.reshape(-1, size) if size else numbers.copy()


def _read_options(run: Path) -> SelectionOptions:
    path = run / RUN_CONFIG_NAME
    config = read_run_config(run) if path.is_file() else {}
    values = {name: config[name] for name in SelectionOptions.__dataclass_fields__ if config.get(name) is not None}
    try:
        return SelectionOptions(**{name: float(value) for name, value in values.items()})
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: one of {values} isn't a number") from error
