"""Prints the options for `tsdkd train --help_keys`."""

import shutil
import textwrap
from collections.abc import Sequence

from ..config.base import DataArguments, TokenSelectiveConfig
from ..config.launch import LaunchArguments
from ..config.options import get_default, get_help
from ..config.validation import declared_fields
from ..errors import escape_controls
from ..methods import all_methods, find_method


def print_keys(method: str | None = None) -> None:
    """Print the options that tsdkd adds, or whose default it changes.

    Args:
        method: a method that may not be registered yet, as `package.module:Trainer`.

    Raises:
        ConfigError: there is no such method.
    """
    if method is not None:
        find_method(method)
    print("Options of tsdkd. All options of TRL's ModelConfig and of transformers' TrainingArguments work too.")
    methods = {name: trainer.config_class for name, trainer in all_methods().items()}
    _print_options("all methods", (TokenSelectiveConfig, DataArguments, LaunchArguments))
    for name, cls in methods.items():
        _print_options(name, (cls,))


def _print_options(title: str, classes: Sequence[type]) -> None:
    print(f"\n{title}:")
    width = shutil.get_terminal_size((120, 0)).columns
    for cls in classes:
        names = cls.method_options() if issubclass(cls, TokenSelectiveConfig) else declared_fields(cls)
        for name in names:
            text = f"{name} ({get_default(cls, name)}): {get_help(cls, name)}"
            print(escape_controls(textwrap.fill(text, width, initial_indent="  ", subsequent_indent="      ")))
