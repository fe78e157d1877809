"""Every method by its name: the trainer that runs it, which knows its configuration and its objective.

A method of another package is registered by `register_method`, by an entry point of the group `tsdkd.methods`, or by a
configuration that names its trainer as `package.module:Trainer`.
"""

import inspect
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from ..config.base import TokenSelectiveConfig
from ..config.coercion import did_you_mean, shorten
from ..config.logs import get_logger
from ..config.user_code import import_object
from ..errors import ConfigError, first_line
from ..objective import Objective
from ..trainer.trainer import TokenSelectiveTrainer

logger = get_logger(__name__)
Trainer = TypeVar("Trainer", bound=type)

METHODS: dict[str, Any] = {}
"""Name -> trainer class, of the methods that have been imported; `all_methods` has those of entry points too."""
ENTRY_POINT_GROUP = "tsdkd.methods"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,59}")


def register_method(trainer: Trainer) -> Trainer:
    """Make a method known by its name, `trainer.config_class.method`, to everything that takes a `method`.

    Args:
        trainer: a subclass of `TokenSelectiveTrainer` with a `config_class` and an `objective_class`.

    Returns:
        The class, so that this is a decorator too.

    Raises:
        ConfigError: the class can't be a method's, or another method has its name.
    """
    problem = _explain_no_method(trainer)
    if problem:
        raise ConfigError([f"method: {problem}"])
    name = trainer.config_class.method  # type: ignore[attr-defined]
    if name in METHODS and _path(METHODS[name]) != _path(trainer):
        raise ConfigError(
            [f"method: {_path(trainer)} and {_path(METHODS[name])} are both called {name!r}; rename the first"]
        )
    METHODS[name] = trainer
    return trainer


def find_method(method: Any) -> Any:
    """The trainer class of a method, imported if need be.

    Args:
        method: a name, or `package.module:Trainer`, which registers it.

    Raises:
        ConfigError: there is no such method, or it can't be imported.
    """
    if isinstance(method, str) and ":" in method:
        return register_method(import_object(method, "method"))
    if isinstance(method, str) and method in METHODS:
        return METHODS[method]
    available = _entry_points()
    if isinstance(method, str) and method in available:
        return _load_entry_point(available[method])
    names = [*METHODS, *available]
    raise ConfigError(
        [
            f"method: must be one of {', '.join(names)}, or package.module:Trainer, found {shorten(method)}"
            f"{did_you_mean(str(method), names)}"
        ]
    )


def all_methods() -> Mapping[str, Any]:
    """`METHODS`, with those of all entry points. One that can't be loaded is left out, with a warning."""
    for entry_point in _entry_points().values():
        try:
            _load_entry_point(entry_point)
        except ConfigError as error:
            _warn_once("; ".join(error.problems))
    return METHODS


@cache
def _warn_once(text: str) -> None:
    logger.warning(text)


def _entry_points() -> dict[str, EntryPoint]:
    """The methods of installed packages that aren't registered yet, by name."""
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP) if point.name not in METHODS}


def _load_entry_point(entry_point: EntryPoint) -> Any:
    package = entry_point.dist.name if entry_point.dist else "an installed package"
    origin = f"method: {entry_point.name} of {package} ({entry_point.value})"
    try:
        trainer = entry_point.load()
    except (Exception, SystemExit) as error:
        text = f"{type(error).__name__}: {first_line(error)[:300]}"
        raise ConfigError([f"{origin} can't be imported: {text}"]) from error
    try:
        register_method(trainer)
    except ConfigError as error:
        raise ConfigError([f"{origin}: {line.removeprefix('method: ')}" for line in error.problems]) from error
    if trainer.config_class.method != entry_point.name:
        raise ConfigError([f"{origin}: the entry point must be called {trainer.config_class.method!r}, as the method"])
    return trainer


def _explain_no_method(trainer: Any) -> str | None:
    """Why a class can't be registered, or None."""
    if not (isinstance(trainer, type) and issubclass(trainer, TokenSelectiveTrainer)):
        return f"{_path(trainer)} must be a subclass of tsdkd.TokenSelectiveTrainer"
    bases = {"config_class": TokenSelectiveConfig, "objective_class": Objective}
    for attribute, base in bases.items():
        found = getattr(trainer, attribute, None)
        if found is None:
            return f"{_path(trainer)} has no {attribute}; set it to a subclass of tsdkd.{base.__name__}"
        if not (isinstance(found, type) and issubclass(found, base)):
            return f"{_path(trainer)}.{attribute} must be a subclass of tsdkd.{base.__name__}, found {shorten(found)}"
        has_fields = bool(inspect.get_annotations(found)) or not is_dataclass(found)
        if has_fields and "__dataclass_fields__" not in vars(found):
            return f"{_path(found)} is no dataclass; put @dataclass before the class"
    config: Any = trainer.config_class
    objective: Any = trainer.objective_class
    name = vars(config).get("method")
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        expected = "a name of its own: at most 60 lower-case letters, digits, '-', '_' and '.'"
        return f"{_path(config)}.method must be {expected}, found {shorten(name)}"
    known = {f.name for f in fields(config)}
    missing = [f.name for f in fields(objective) if f.init and f.name not in known]
    if missing:
        return f"{_path(objective)} has fields that {config.__name__} lacks: {', '.join(missing)}"
    return None


def _path(found: Any) -> str:
    """Where a class comes from, as a configuration names it."""
    return f"{found.__module__}:{found.__qualname__}" if isinstance(found, type) else shorten(found)
