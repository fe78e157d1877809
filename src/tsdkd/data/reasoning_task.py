"""The tasks of reasoning-gym: their names and options, and the problems that they generate."""

import hashlib
import io
import random
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import lru_cache
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints
from urllib.parse import unquote

import numpy as np

from ..config.coercion import coerce, did_you_mean, shorten
from ..errors import DataError, first_line, install_hint

NUM_PROBLEMS = 200_000  # that a task is asked for at most
_PREFIX = "reasoning_gym:"
_TRAINING_FIELDS = ("dataset_name", "dataset_train_split")
_MAX_SIZE = 100_000  # rows of a split
_DEFAULTS = {"seed": 42, "size": 1000, "test_size": 200}

_VARIES = "its problems differ from one process to another"
_RUNS_CODE = "its verifier runs what a model writes as Python"
UNSUPPORTED = {
    "acre": "its problems depend on their number",
    "codeio": _VARIES,
    "composite": "it mixes other tasks; name one of these",
    "game_of_life_halting": "its verifier accepts every answer",
    "intermediate_integration": _RUNS_CODE,
    "isomorphic_strings": _VARIES,
    "knight_swap": _VARIES,
    "polynomial_multiplication": _RUNS_CODE,
    "puzzle24": "its verifier accepts any numbers that make 24",
    "ransom_note": _VARIES,
    "simple_integration": _RUNS_CODE,
    "word_ladder": _VARIES,
}
"""Tasks that are refused, and why."""


class Source(NamedTuple):
    """The problems of a task.

    Attributes:
        task: its name in reasoning-gym.
        options: its options, as they were written.
        seed: which of its problems.
    """

    task: str
    options: tuple[tuple[str, str], ...]
    seed: int

    def __str__(self) -> str:
        options = (*self.options, ("seed", self.seed))
        return f"{_PREFIX}{self.task}?{'&'.join(f'{name}={value}' for name, value in options)}"


def is_reasoning_gym(name: str | None) -> bool:
    """Whether a data set's name is that of a task of reasoning-gym."""
    return name is not None and name.startswith(_PREFIX)


@lru_cache(maxsize=4096)
def generate_entry(source: Source, index: int) -> Mapping[str, Any]:
    """Generate a problem: `question`, `answer` (None if there is no single one) and `metadata`. Don't change it."""
    with isolated(index):
        return dict(build_task(source)[index])


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Seed the global random states, which a few tasks use, restore them, and suppress what tasks print or warn of."""
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@lru_cache(maxsize=8)
def build_task(source: Source) -> Any:
    """Build the `ProceduralDataset` of a task. Raises `ValueError` for an invalid option."""
    from reasoning_gym import create_dataset  # an extra

    hints = _option_types(source.task)
    options = {}
    for name, text in source.options:
        try:
            options[name] = _coerce_option(text, hints[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    # Problem n of seed s is problem 0 of seed s + n in reasoning-gym: other seeds would have nearly the same problems
    seed = int.from_bytes(hashlib.sha256(str(source.seed).encode()).digest()[:4]) >> 1
    try:
        return create_dataset(source.task, seed=seed, size=NUM_PROBLEMS, **options)
    except Exception as error:  # the tasks check their options with assert, if at all
        given = ", ".join(f"{name}={value}" for name, value in source.options)
        raise ValueError(f"{given}: {first_line(error)[:300]}") from error


@lru_cache
def _option_types(task: str) -> dict[str, Any]:
    from reasoning_gym.factory import DATASETS

    return {name: hint for name, hint in get_type_hints(DATASETS[task][1]).items() if name not in ("seed", "size")}


def _coerce_option(text: str, hint: Any) -> Any:
    """An option's value; of a list, the elements are separated by commas."""
    origin, element = get_origin(hint) or hint, (*get_args(hint), str)[0]
    if origin in (list, tuple, Sequence):
        values = [coerce(unquote(part), element) for part in re.split(",|%2[Cc]", text)]
        return values if origin is list else tuple(values)
    return coerce(unquote(text), hint)


def parse_name(name: str, field: str) -> tuple[Source, dict[str, int]]:
    """Parse the name of a data set, and build its task.

    Args:
        name: `reasoning_gym:TASK?option=value&...`.
        field: what messages call it.

    Returns:
        The problems, and `size` and `test_size`.

    Raises:
        DataError: no such task or option, or reasoning-gym isn't installed.
    """
    try:
        from reasoning_gym.factory import DATASETS  # an extra
    except ImportError as error:
        raise DataError(f"{field}: {name} needs reasoning-gym; {install_hint('reasoning-gym')}") from error
    task, _, query = name.removeprefix(_PREFIX).partition("?")
    if task not in DATASETS:
        raise DataError(f"{field}: reasoning-gym has no task {shorten(task)}{did_you_mean(task, DATASETS)}")
    if task in UNSUPPORTED:
        raise DataError(f"{field}: {name} can't be used: {UNSUPPORTED[task]}")
    try:
        options = _parse_options(query, task)
        if "size" in options and field not in _TRAINING_FIELDS:
            raise ValueError("size: it is the number of training problems; use test_size here")
        given = {key: _parse_number(key, options.pop(key)) for key in _DEFAULTS if key in options}
        numbers = {**_DEFAULTS, **given}
        source = Source(task, tuple(options.items()), numbers.pop("seed"))
        build_task(source)
    except ValueError as error:
        raise DataError(f"{field}: {name}: {error}") from error
    return source, numbers


def _parse_options(query: str, task: str) -> dict[str, str]:
    known = [*_option_types(task), *_DEFAULTS]
    options: dict[str, str] = {}
    for part in query.split("&") if query else ():
        key, given, value = part.partition("=")
        if key not in known:
            raise ValueError(f"unknown option {shorten(key)}{did_you_mean(key, known)}; known are {', '.join(known)}")
        if not given or key in options:
            raise ValueError(f"{key}: {'is set twice' if given else f'needs a value, such as {key}=1'}")
        options[key] = value
    return options


def _parse_number(key: str, text: str) -> int:
    low, high = (0, 2**63 - 1) if key == "seed" else (1, _MAX_SIZE)
    if not (text.isascii() and text.isdigit() and len(text) < 20 and low <= int(text) <= high):
        raise ValueError(f"{key}: must be a whole number from {low:,} to {high:,}, found {shorten(text)}")
    return int(text)
