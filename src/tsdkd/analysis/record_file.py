"""One file of records, as `tsdkd.trainer.token_records` writes it; anything else is refused before it is used."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..config.coercion import shorten
from ..errors import DataError, explain_damage
from ..files import parse_json
from ..trainer.token_records import MASS_TOP_K, NUM_CANDIDATES

_MAX_TOKENS = 2**20  # in one file
_MAX_PADDED_TOKENS = 2**24  # completions times the longest one's tokens
_MAX_METADATA_BYTES = 2**24
_MAX_ROW_GROUPS = 1000
_MAX_INT = 2**31 - 1

_INDEX, _NATS, _LOGP, _SHARE = (0, _MAX_INT), (-1.0, 1e6), (-1e6, 1.0), (-0.01, 1.01)
_RANGES: dict[str, tuple[float, float]] = {
    "sample": _INDEX,
    "position": _INDEX,
    "token": _INDEX,
    "student_entropy": _NATS,
    "teacher_entropy": _NATS,
    "student_logp": _LOGP,
    "teacher_logp": _LOGP,
    "divergence": _NATS,
    "forward_kl": _NATS,
    "candidates": _INDEX,
    "candidate_logps": _LOGP,
    "candidate_teacher_logps": _LOGP,
    "teacher_mass": _SHARE,
}
_WIDTHS = {  # fewest and most numbers a token
    "candidates": (2, NUM_CANDIDATES),
    "candidate_logps": (2, NUM_CANDIDATES),
    "candidate_teacher_logps": (2, NUM_CANDIDATES),
    "teacher_mass": (len(MASS_TOP_K), len(MASS_TOP_K)),
}


@dataclass(frozen=True)
class RecordFile:
    """What a file holds; see `tsdkd.analysis.load.StepRecord`."""

    step: int
    columns: dict[str, np.ndarray]
    samples: list[dict[str, Any]]
    texts: dict[int, str]

    @property
    def num_bytes(self) -> int:
        """About the memory that it takes."""
        numbers = sum(len(sample["prompt"]) for sample in self.samples)
        return sum(column.nbytes for column in self.columns.values()) + 40 * numbers + 100 * len(self.texts)


def read_record_file(path: Path) -> RecordFile:
    """Read a file, and check that it is whole, finite, of these columns and of a bearable size, and fits together.

    Raises:
        DataError: it isn't.
    """
    try:
        if not path.is_file():
            raise ValueError("it isn't a regular file")
        with path.open("rb") as stream, pq.ParquetFile(stream) as file:  # Arrow takes no path that isn't UTF-8
            _check_size(file.metadata)
            _check_schema(file.schema_arrow)
            table = file.read(columns=list(_RANGES))
        metadata = parse_json((table.schema.metadata or {}).get(b"tsdkd", b""), "its metadata")
        columns = {name: _to_numpy(name, table[name]) for name in _RANGES}
        samples, texts = _read_samples(metadata["samples"]), _read_texts(metadata["texts"])
        record = RecordFile(_read_index("step", metadata["step"]), columns, samples, texts)
        _check_order(record)
        _check_texts(record)
        return record
    except (OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError, pa.ArrowException) as error:
        reason = explain_damage(error)[:200].rstrip(".")
        raise DataError(f"{path} isn't a record of tsdkd, or is damaged: {reason}") from error


def _check_size(metadata: pq.FileMetaData) -> None:
    """Before memory is taken: a compressed page of some bytes can hold millions of rows."""
    if not 0 < metadata.num_rows <= _MAX_TOKENS:
        raise ValueError(f"must have 1 to {_MAX_TOKENS:,} tokens, found {metadata.num_rows:,}")
    if metadata.num_row_groups > _MAX_ROW_GROUPS:
        raise ValueError(f"must have at most {_MAX_ROW_GROUPS} row groups, found {metadata.num_row_groups:,}")
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    values = sum(group.column(i).num_values for group in groups for i in range(group.num_columns))
    most = metadata.num_rows * max(NUM_CANDIDATES, len(MASS_TOP_K)) * metadata.num_columns
    if values > most:
        raise ValueError(f"must have at most {most:,} numbers, found {values:,}")
    if sum(map(len, (metadata.metadata or {}).values())) > _MAX_METADATA_BYTES:
        raise ValueError(f"must have at most {_MAX_METADATA_BYTES:,} bytes of metadata")


def _check_schema(schema: pa.Schema) -> None:
    for name in _RANGES:
        if (count := schema.names.count(name)) != 1:
            raise ValueError(f"{name}: must be one column, found {count}")
        kind = schema.field(name).type
        if name in _WIDTHS:
            low, high = _WIDTHS[name]
            if not (pa.types.is_fixed_size_list(kind) and low <= kind.list_size <= high):
                raise ValueError(f"{name}: must be lists of {low} to {high} numbers, found {kind}")
            kind = kind.value_type
        is_right = pa.types.is_integer(kind) if _RANGES[name] == _INDEX else pa.types.is_floating(kind)
        if not is_right:
            raise ValueError(f"{name}: must be {'integers' if _RANGES[name] == _INDEX else 'floats'}, found {kind}")
    if len({schema.field(name).type.list_size for name in _WIDTHS if name.startswith("candidate")}) > 1:
        raise ValueError("candidates: must be as many as their log-probabilities")


def _to_numpy(name: str, column: pa.ChunkedArray) -> np.ndarray:
    whole = column.combine_chunks()
    size = getattr(whole.type, "list_size", None)
    flat = whole.flatten() if size else whole
    if whole.null_count or flat.null_count:
        raise ValueError(f"{name}: has nulls")
    numbers = flat.to_numpy(zero_copy_only=False)
    numbers = numbers.astype(np.float64) if numbers.dtype == np.float16 else numbers  # which can't hold the bounds
    low, high = _RANGES[name]
    inside = (numbers >= low) & (numbers <= high)  # which NaN isn't
    if not inside.all():
        raise ValueError(f"{name}: must be from {low:g} to {high:g}, found {numbers[~inside][0]}")
    numbers = numbers.astype(np.int32 if _RANGES[name] == _INDEX else np.float32)
    return numbers.reshape(-1, size) if size else numbers


def _read_index(name: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_INT:
        raise ValueError(f"{name}: must be a whole number from 0 to {_MAX_INT}, found {shorten(value)}")
    return value


def _read_samples(samples: Any) -> list[dict[str, Any]]:
    if not isinstance(samples, list) or not samples:
        raise ValueError(f"samples: must be a list, found {shorten(samples)}")
    return [
        {"index": _read_index("index", s["index"]), "prompt": [_read_index("prompt", i) for i in s["prompt"]]}
        for s in samples
    ]


def _read_texts(texts: Any) -> dict[int, str]:
    wrong = next((text for text in texts.values() if not isinstance(text, str)), None)
    if wrong is not None:
        raise ValueError(f"texts: must be strings, found {shorten(wrong)}")
    return {int(token): sys.intern(text) for token, text in texts.items()}  # all files have much the same


def _check_order(record: RecordFile) -> None:
    """Completions one after the other, each from its first token to its last, as all that reads them expects."""
    sample, position = record.columns["sample"], record.columns["position"]
    if sample.max() >= len(record.samples):
        raise ValueError(f"sample: must be below {len(record.samples)}, found {sample.max()}")
    lengths = np.bincount(sample, minlength=len(record.samples))
    if len(lengths) * int(lengths.max()) > _MAX_PADDED_TOKENS:
        raise ValueError(f"{len(lengths):,} completions, one of {lengths.max():,} tokens, are too many")
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    if not (np.diff(sample) >= 0).all() or not np.array_equal(position, np.arange(len(sample)) - starts):
        raise ValueError("position: must count each completion's tokens from 0, one completion after the other")


def _check_texts(record: RecordFile) -> None:
    ids = {i for sample in record.samples for i in sample["prompt"]}
    ids |= {i for name in ("token", "candidates") for i in np.unique(record.columns[name]).tolist()}
    if missing := ids - record.texts.keys():
        raise ValueError(f"texts: must have every token, found none of {min(missing)}")
