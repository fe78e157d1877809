"""Packing: several sequences share a row, so that a forward pass computes little or no padding.

Everything here runs on the host, from lengths alone. A layout is a list of rows; each row lists the indices of its
sequences.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, chain

import torch
from torch import Tensor

Rows = list[list[int]]
"""The layout of a micro-batch: the indices of the sequences in each row."""

MAX_STRETCH = 1.5  # width of a row, relative to the longest sequence: attention's cost and mask grow with its square
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


def pack_rows(lengths: Sequence[int], max_width: int | None = None, linear_cost: float | None = None) -> Rows:
    """Pack sequences into rows of bounded width with little padding.

    First-fit decreasing at several widths, from the longest sequence to 1.5 times its length; the layout with the
    fewest positions wins, and of equal ones the narrowest. It must also be cheaper than one sequence in each row.

    Args:
        lengths: tokens of each sequence.
        max_width: limit of the width, tokens. A longer sequence gets a row of its own.
        linear_cost: cost of a position's matrix products, in units of that of its attention to one other position:
            about 6 times the hidden size. In a packed row, each position is compared with all others, otherwise only
            with those before it. None: attention costs nothing.
    """
    longest, total = max(lengths), sum(lengths)
    max_width = max_width or total
    if max_width < longest:
        return first_fit_decreasing(lengths, max_width)
    widest = min(int(longest * MAX_STRETCH), max_width)
    widths = dict.fromkeys(longest + (widest - longest) * i // (_NUM_WIDTHS - 1) for i in range(_NUM_WIDTHS))
    best, fewest = one_per_row(range(len(lengths))), len(lengths) * longest
    for width in widths:
        if fewest <= total * _GOOD_ENOUGH:
            break
        rows = first_fit_decreasing(lengths, width)
        positions = num_positions(rows, lengths)
        if positions < fewest:
            best, fewest = rows, positions
    if linear_cost is not None:
        width = fewest // len(best)
        if fewest * (linear_cost + width) >= len(lengths) * longest * (linear_cost + longest / 2):
            return one_per_row(range(len(lengths)))
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


def divide(
    lengths: Sequence[int], budget: int, lay_out: Callable[[Sequence[int]], Rows], in_order: bool
) -> list[Rows]:
    """Divide sequences into micro-batches of at most `budget` positions, padding included.

    A sequence that is longer than the budget is a micro-batch of its own.

    Args:
        lengths: tokens of each sequence.
        budget: positions of a micro-batch, tokens.
        lay_out: returns a layout for sequences of the given lengths.
        in_order: whether each micro-batch must hold neighbors, in the order given. Otherwise sequences are combined so
            that little padding is left.
    """
    if in_order:
        return _divide_in_order(lengths, budget, lay_out)
    rows = sorted(lay_out(lengths), key=lambda row: -sum(lengths[i] for i in row))
    micro_batches: list[Rows] = []
    for row in rows:  # the first row of a micro-batch is its widest
        if micro_batches and num_positions([*micro_batches[-1], row], lengths) <= budget:
            micro_batches[-1].append(row)
        else:
            micro_batches.append([row])
    return micro_batches


def _divide_in_order(lengths: Sequence[int], budget: int, lay_out: Callable[[Sequence[int]], Rows]) -> list[Rows]:
    def lay_out_range(first: int, end: int) -> Rows:
        return [[first + i for i in row] for row in lay_out(lengths[first:end])]

    micro_batches: list[Rows] = []
    first = 0
    for i in range(len(lengths)):
        extended = lay_out_range(first, i + 1)
        if i > first and num_positions(extended, lengths) <= budget:
            micro_batches[-1] = extended
        else:
            first = i
            micro_batches.append(lay_out_range(i, i + 1))
    return micro_batches


def split_to_count(micro_batches: list[Rows], lengths: Sequence[int], count: int) -> list[Rows]:
    """Halve the largest micro-batches until there are `count` of them, so that all processes have the same number.

    Sequences that were in order stay in order. No micro-batch grows. `count` is at most the number of sequences, which
    is the same on all processes.
    """
    parts = list(micro_batches)
    while len(parts) < count:
        sizes = [num_positions(rows, lengths) if sum(map(len, rows)) > 1 else 0 for rows in parts]
        largest = sizes.index(max(sizes))
        indices = sorted(chain.from_iterable(parts[largest]))
        halves = indices[: len(indices) // 2], indices[len(indices) // 2 :]
        kept = ([[i for i in row if i in half] for row in parts[largest]] for half in halves)
        parts[largest : largest + 1] = [[row for row in rows if row] for rows in kept]
    return parts


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
