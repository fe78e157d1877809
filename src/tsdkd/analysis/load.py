"""Records of a run, read back, and which tokens a method selects in them."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config.coercion import finite_number
from ..errors import DataError
from ..run.output_dir import RUN_CONFIG_NAME, read_run_config
from ..selection import entropy_gap_gate, opener_mask, top_entropy_mask
from ..trainer.token_records import RECORDS_DIR
from .record_file import read_record_file

_MAX_GIB = 2  # of memory, for all records of a run
_OPTION_RANGES = {
    "opener_ratio": (0.0, 1.0),
    "entropy_ratio": (0.0, 1.0),
    "gate_temperature": (1e-6, 1e6),
    "entropy_threshold": (-1e6, 1e6),
}


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
        DataError: there are none, the run's configuration can't be read, or a record can't.
    """
    paths = sorted((run / RECORDS_DIR).glob("step-*.parquet"))
    if not paths:
        raise DataError(
            f"{run} has no records; training writes them with --record_steps N, and tsdkd analyze --config makes some"
        )
    options = _read_options(run)
    records: list[StepRecord] = []
    num_bytes = 0
    for i, path in enumerate(paths):
        try:
            file = read_record_file(path)
        except DataError as error:
            if skipped is None:
                raise
            skipped.append(str(error))
            continue
        num_bytes += file.num_bytes
        if num_bytes > _MAX_GIB * 2**30:
            reason = f"{path} and {len(paths) - i - 1} records after it: all take more than {_MAX_GIB} GiB of memory"
            if skipped is None:
                raise DataError(reason)
            skipped.append(reason)
            break
        records.append(StepRecord(file.step, file.columns, file.samples, file.texts, options))
    return records


def _read_options(run: Path) -> SelectionOptions:
    path = run / RUN_CONFIG_NAME
    config = read_run_config(run) if path.exists() else {}
    given = {name: config[name] for name in _OPTION_RANGES if config.get(name) is not None}
    values = {}
    for name, value in given.items():
        try:
            values[name] = finite_number(value, *_OPTION_RANGES[name])
        except ValueError as error:
            raise DataError(f"{path}: {name}: {error}") from error
    return SelectionOptions(**values)
