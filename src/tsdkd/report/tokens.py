"""Records for the token view, small enough to lie in a page: columns as numbers of one or two bytes, compressed."""

import base64
import gzip
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..analysis.load import StepRecord

_MAX_COMPLETIONS = 50

# name in the page, title
TOKEN_METRICS = (
    ("student_entropy", "Student's entropy, nats"),
    ("teacher_entropy", "Teacher's entropy, nats"),
    ("gate", "Gate (TSD-KD Eq. 11)"),
    ("divergence", "JSD, nats"),
    ("forward_kl", "Forward KL over the teacher's top 16, nats"),
    ("kendall_tau", "Agreement of the rankings (Kendall's tau)"),
    ("is_opener", "In the opener"),
    ("is_high_entropy", "Among the most uncertain tokens (entropy_ratio)"),
    ("is_triggered", "Forward KL is triggered (EOPD Eq. 9)"),
)


def pack_records(run: str, records: Sequence[StepRecord]) -> dict[str, Any]:
    """Pack the records of one run for the page's script: as many whole records as have at most 50 completions
    together."""
    chosen = subsample_records(records)
    texts = sorted({i for record in chosen for i in record.texts})
    place = {token: i for i, token in enumerate(texts)}
    text_of = {i: text for record in chosen for i, text in record.texts.items()}
    return {
        "name": run,
        "texts": [text_of[i] for i in texts],
        "metrics": [{"name": name, "title": title} for name, title in TOKEN_METRICS],
        "records": [_pack_record(record, place) for record in chosen],
    }


def subsample_records(records: Sequence[StepRecord]) -> list[StepRecord]:
    """First, last and evenly between."""
    if not records:
        return []
    most = max(1, _MAX_COMPLETIONS // max(len(r.samples) for r in records))
    if len(records) <= most:
        return list(records)
    return [records[round(i * (len(records) - 1) / max(most - 1, 1))] for i in range(most)]


def _pack_record(record: StepRecord, place: dict[int, int]) -> dict[str, Any]:
    columns = record.columns
    to_position = np.vectorize(place.__getitem__, otypes=[np.uint32])
    theirs = columns["candidate_teacher_logps"]
    parts: dict[str, np.ndarray] = {
        "token": to_position(columns["token"]),
        "candidates": to_position(columns["candidates"]),
        "student_share": np.round(1000 * np.exp(columns["candidate_logps"])).astype(np.uint16),
        "teacher_share": np.round(1000 * np.exp(theirs)).astype(np.uint16),
        "teacher_rank": np.argsort(np.argsort(-theirs, axis=1), axis=1).astype(np.uint8),
    }
    ranges = {}
    for name, _ in TOKEN_METRICS:
        values = np.asarray(getattr(record, name) if hasattr(record, name) else columns[name], dtype=np.float32)
        low, high = float(values.min()), float(values.max())
        ranges[name] = [low, high]
        parts[name] = np.round(65535 * (values - low) / max(high - low, 1e-12)).astype(np.uint16)
    return {
        "step": record.step,
        "lengths": record.lengths.tolist(),
        "prompts": [[place[i] for i in sample["prompt"]] for sample in record.samples],
        "candidates": columns["candidates"].shape[1],
        "ranges": ranges,
        "columns": {name: _pack_column(values) for name, values in parts.items()},
    }


def _pack_column(values: np.ndarray) -> dict[str, Any]:
    """All lowest bytes, then all second ones, …, which compresses better; the browser's own decompression reads it."""
    little = values.astype(values.dtype.newbyteorder("<")).ravel()
    raw = little.view(np.uint8).reshape(-1, values.dtype.itemsize).T.tobytes()
    return {"size": values.dtype.itemsize, "data": base64.b64encode(gzip.compress(raw, 9, mtime=0)).decode()}
