"""Code of the user's that a configuration names as `package.module:name`."""

import inspect
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any

from ..errors import ConfigError, first_line
from ..grading import Grader, is_exact_match
from .coercion import did_you_mean, shorten
from .options import IMPORT_PATH

_MISSING = object()


def import_object(path: str, field: str) -> Any:
    """Import what a path names. Modules in the current directory are found too, before installed ones.

    Args:
        path: `package.module:name`.
        field: the option that has the path.

    Raises:
        ConfigError: no such path, module or name, or an exception within the module.
    """
    is_valid, expected = IMPORT_PATH
    if not is_valid(path):
        raise ConfigError([f"{field}: {expected}, found {shorten(path)}"])
    module_name, name = path.split(":")
    _import_from_current_directory()
    try:
        module = import_module(module_name)
        found = getattr(module, name, _MISSING)
    except (Exception, SystemExit, GeneratorExit) as error:  # a script without a main guard ends the program
        missing = getattr(error, "name", None)
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{missing}."):
            raise ConfigError(
                [f"{field}: there is no module {shorten(missing)}, neither in the current directory nor installed"]
            ) from error
        raise ConfigError(
            [f"{field}: the module {module_name} can't be imported: {type(error).__name__}: {first_line(error)[:300]}"]
        ) from error
    if found is _MISSING:
        place = getattr(module, "__file__", None) or module_name
        raise ConfigError([f"{field}: {place} has no {shorten(name)}{did_you_mean(name, vars(module))}"])
    return found


def load_function(path: str, field: str, *arguments: str) -> Callable[..., Any]:
    """Import a function.

    Args:
        path: `package.module:name`.
        field: the option that has the path.
        arguments: what it must take, as an error calls it.

    Raises:
        ConfigError: see `import_object`; it isn't a function, or takes other arguments.
    """
    function = import_object(path, field)
    if not callable(function):
        raise ConfigError([f"{field}: {path} must be a function, found {shorten(function)}"])
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a function that is written in C has none
        return function
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise ConfigError([f"{field}: {path} must take {' and '.join(arguments)}, found {signature}"]) from error
    return function


def load_grader(path: str | None, default: Callable[[str, str], Any] = is_exact_match) -> Grader:
    """The grader that a configuration names, or the default. Raises `ConfigError`."""
    if path is None:
        return Grader(default)
    return Grader(load_function(path, "grader", "a completion", "an answer"), path)


def _import_from_current_directory() -> None:
    """As `python -m` does; the program `tsdkd` has its own folder there instead."""
    with suppress(OSError):  # it has been removed
        if (folder := os.getcwd()) not in sys.path:
            sys.path.insert(0, folder)
