"""`RolloutBuffer`: windows in order, one rollout for several, and a state that continues."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest

from tsdkd.trainer.rollout_buffer import RolloutBuffer


def rows(count: int) -> Iterator[dict[str, Any]]:
    return iter([{"index": [i]} for i in range(count)])


def roll_out(parts: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """All rows of a part in its last entry."""
    entries = []
    for part in parts:
        rows = {"index": [i for batch in part for i in batch["index"]], "sampling_per_token_logps": 0}
        entries += [*([] for _ in part[1:]), [rows]]
    return entries


def drain(buffer: RolloutBuffer, data: Iterator[dict[str, Any]], steps: int) -> list[list[int]]:
    windows = [buffer.next(data, 2, steps - step, roll_out) for step in range(steps)]
    return [[i for entry in window for batch in entry for i in batch["index"]] for window in windows]


@pytest.mark.parametrize(
    ("steps_per_rollout", "num_iterations", "expected"),
    [
        (1, 1, [[0, 1], [2, 3], [4, 5], [6]]),
        (2, 1, [[0, 1], [2, 3], [4, 5], [6]]),
        (4, 2, [[0, 1], [2, 3], [0, 1], [2]]),  # two windows, twice; the last step of the epoch is a short one
    ],
)
def test_windows(steps_per_rollout: int, num_iterations: int, expected: list[list[int]]) -> None:
    assert drain(RolloutBuffer(2, steps_per_rollout, num_iterations), rows(7), 4) == expected


def test_the_end_of_the_data_is_an_empty_window() -> None:
    buffer = RolloutBuffer(2, 1)
    assert drain(buffer, rows(2), 2) == [[0, 1], []]


def test_only_the_first_window_comes_from_the_policy_that_is_trained() -> None:
    buffer, data = RolloutBuffer(1, 3), rows(3)
    has_logps = ["sampling_per_token_logps" in buffer.next(data, 1, 3, roll_out)[0][0] for _ in range(3)]
    assert has_logps == [True, False, False]


def test_a_state_continues_where_the_data_loader_starts_again() -> None:
    """After a resume the loader is at the checkpoint's step, whose rollout has taken rows beyond it."""
    buffer, data = RolloutBuffer(2, 3), rows(8)
    assert drain(buffer, data, 1) == [[0, 1]]
    resumed = RolloutBuffer(2, 3)
    resumed.load_state_dict(buffer.state_dict())
    left = rows(8)
    for _ in range(2):
        next(left)  # the step that was taken
    assert drain(resumed, left, 3) == [[2, 3], [4, 5], [6, 7]] == drain(buffer, data, 3)


@pytest.mark.parametrize(
    ("steps_per_rollout", "rolled_out", "ahead"),
    [
        (1, [[0, 1], [2, 3], [4]], {0: [2, 3], 1: [4]}),  # the last step has no successor in this epoch
        (2, [[0, 1, 2, 3], [4]], {1: [4]}),
    ],
)
def test_the_next_rollout_begins_before_the_last_window(
    steps_per_rollout: int, rolled_out: list[list[int]], ahead: dict[int, list[int]]
) -> None:
    """A resumed run takes the rows again whose completions are in its checkpoint, without rolling ahead twice."""
    for start in range(3):
        buffer, data = RolloutBuffer(2, steps_per_rollout), rows(5)
        found: list[list[int]] = []
        begun: dict[int, list[int]] = {}

        def record(parts: list[list[dict[str, Any]]], into: list[list[int]] = found) -> list[list[dict[str, Any]]]:
            into.append([i for part in parts for batch in part for i in batch["index"]])
            return roll_out(parts)

        for step in range(3):
            if step == start:  # a checkpoint, and a data loader at this step
                state, buffer, data = buffer.state_dict(), RolloutBuffer(2, steps_per_rollout), rows(5)
                buffer.load_state_dict(state)
                next(islice(data, 2 * step, 2 * step), None)

            def begin(parts: list[list[dict[str, Any]]], into: dict[int, list[int]] = begun, at: int = step) -> None:
                into[at] = [i for part in parts for batch in part for i in batch["index"]]

            buffer.next(data, 2 if step < 2 else 1, 3 - step, record, begin)
        assert found == rolled_out and begun == ahead
