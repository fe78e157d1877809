"""Packing: several sequences share a row, so that a forward pass computes little or no padding.

Everything here runs on the host, from lengths alone. A layout is a list of rows; each row lists the indices of its
sequences.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate, chain

import torch
from torch import Tensor

Rows = list[list[int]]
"""The layout of a micro-batch: the indices of the sequences in each row."""

_MAX_STRETCH = 1.5  # width of a row, relative to the longest sequence: attention's cost and mask grow with its square
_NUM_WIDTHS = 17
_GOOD_ENOUGH = 1.01  # stop the search if 1 % of the positions are padding


def one_per_row(indices: Iterable[int]) -> Rows:
    """Return the layout without packing: one sequence in each row, padded on the right."""
    return [[i] for i in indices]


def is_packed(rows: Rows) -> bool:
    """Whether any row has several sequences."""
    return any(len(row) > 1 for row in rows)


def num_positions(rows: Rows, lengths: Sequence[int]) -> int:
    """Return the number of positions of a layout, padding included: rows x width."""
    return len(rows) * max(sum(lengths[i] for i in row) for row in rows)


def pack_rows(lengths: Sequence[int], max_width: int | None = None) -> Rows:
    """Pack sequences into rows of bounded width with little padding.

    First-fit decreasing at several widths, from the longest sequence to 1.5 times its length; the layout with the
    fewest positions wins, and of equal ones the narrowest.

    Args:
        lengths: tokens of each sequence.
        max_width: limit of the width, tokens. Rows are never narrower than the longest sequence.
    """
    longest, total = max(lengths), sum(lengths)
    widest = max(longest, min(int(longest * _MAX_STRETCH), max_width or total, total))
    widths = dict.fromkeys(longest + (widest - longest) * i // (_NUM_WIDTHS - 1) for i in range(_NUM_WIDTHS))
    best, fewest = one_per_row(range(len(lengths))), len(lengths) * longest
    for width in widths:
        if fewest <= total * _GOOD_ENOUGH:
            break
        rows = first_fit_decreasing(lengths, width)
        positions = num_positions(rows, lengths)
        if positions < fewest:
            best, fewest = rows, positions
    return best


def first_fit_decreasing(lengths: Sequence[int], width: int) -> Rows:
    """Put each sequence, longest first, into the first row that has room. A longer sequence gets a row of its own."""
    rows: Rows = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, free in enumerate(room) if free >= lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(width)
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


def pack_sequences(sequences: Sequence[Sequence[int]], rows: Rows) -> dict[str, Tensor | int]:
    """Build the model's inputs for a packed forward pass.

    Positions restart at 0 with each sequence, from which transformers derives an attention mask that separates them.
    Padding at the end of a row is a sequence of its own.

    Returns:
        `input_ids`, `position_ids` `[R, W]` and `starts` `[B]`, the index of each sequence's first token in the
        flattened `[R, W]`, all int64; for flash attention, `cu_seq_lens` `[segments + 1]`, int32, and `max_length`.
    """
    width = max(sum(len(sequences[i]) for i in row) for row in rows)
    ids, segments, starts = [], [], [0] * len(sequences)
    for number, row in enumerate(rows):
        lengths = [len(sequences[i]) for i in row]
        for i, offset in zip(row, accumulate(lengths, initial=0), strict=False):
            starts[i] = number * width + offset
        padding = width - sum(lengths)
        ids.append([*chain.from_iterable(sequences[i] for i in row), *[0] * padding])
        segments += [*lengths, *([padding] if padding else [])]
    positions = [position for length in segments for position in range(length)]
    return {
        "input_ids": torch.tensor(ids),
        "position_ids": torch.tensor(positions).view(len(rows), width),
        "starts": torch.tensor(starts),
        "cu_seq_lens": torch.tensor([0, *accumulate(segments)], dtype=torch.int32),
        "max_length": max(segments),
    }
