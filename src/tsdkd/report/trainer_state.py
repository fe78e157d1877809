"""The trainer's log of a run, as transformers writes it: steps, and a curve of every metric."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from ..checkpointing.checkpoint import list_checkpoints
from ..config.coercion import finite_number, shorten
from ..errors import DataError, explain_damage
from ..files import parse_json, read_bounded

Curve = list[tuple[int, float]]

_MAX_FILE_MIB = 64
_MAX_STEP = 2**53


@dataclass(frozen=True)
class TrainerState:
    """The trainer's log.

    Attributes:
        global_step: steps done.
        max_steps: steps planned.
        logging_steps: steps between two entries, for people.
        curves: metric -> (step, value); a value may be NaN or infinite.
    """

    global_step: int
    max_steps: int
    logging_steps: str
    curves: dict[str, Curve] = field(default_factory=dict)

    @property
    def is_finished(self) -> bool:
        """Whether the last step was taken."""
        return self.global_step >= self.max_steps > 0


def read_trainer_state(folder: Path, skipped: list[str]) -> TrainerState | None:
    """The state at the end of the run, otherwise of its last checkpoint; None before the first one.

    Args:
        folder: of the run.
        skipped: takes why some of the log is left out.

    Raises:
        DataError: it can't be read at all.
    """
    newest_first = [folder, *reversed(list_checkpoints(folder))]
    path = next((f / TRAINER_STATE_NAME for f in newest_first if (f / TRAINER_STATE_NAME).exists()), None)
    if path is None:
        return None
    state = parse_json(read_bounded(path, _MAX_FILE_MIB), path)
    try:
        done, planned = (_read_step(name, state[name]) for name in ("global_step", "max_steps"))
        log_history = state["log_history"]
        if not isinstance(log_history, list):
            raise ValueError(f"log_history: must be a list, found {shorten(log_history)}")
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} is damaged: {explain_damage(error)}") from error
    curves, problems = _read_curves(log_history)
    if problems:
        skipped.append(f"{path}: {len(problems)} values of its log, the first: {problems[0]}")
    return TrainerState(done, planned, shorten(state.get("logging_steps")), curves)


def _read_curves(log_history: list[Any]) -> tuple[dict[str, Curve], list[str]]:
    """Curves, and what is wrong with the entries and values that aren't in them. Metrics may be text, which isn't."""
    curves: dict[str, Curve] = {}
    problems = []
    for i, entry in enumerate(log_history):
        try:
            step = _read_step("step", entry["step"])
        except (ValueError, TypeError, KeyError) as error:
            problems.append(f"entry {i}: {explain_damage(error)}")
            continue
        for name, value in entry.items():
            if name in ("step", "epoch") or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            try:
                number = value if isinstance(value, float) and not math.isfinite(value) else finite_number(value)
                curves.setdefault(name, []).append((step, number))
            except ValueError as error:
                problems.append(f"entry {i}: {name}: {error}")
    return curves, problems


def _read_step(name: str, value: Any) -> int:
    number = finite_number(value, -1, _MAX_STEP)  # transformers' max_steps is -1 before it is known
    if number != int(number):
        raise ValueError(f"{name}: must be a whole number, found {shorten(value)}")
    return int(number)
