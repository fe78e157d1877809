"""The table of `tsdkd train --help_keys`."""

from rich.table import Table

from ..config.base import DataArguments, TokenSelectiveConfig
from ..config.console import PlainConsole
from ..config.launch import LaunchArguments
from ..config.options import get_default, get_help
from ..config.validation import declared_fields
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
    table = Table(
        title="Options of tsdkd (all options of TRL's ModelConfig and transformers' TrainingArguments work too)"
    )
    for column in ("method", "key", "default", "meaning"):
        table.add_column(column, overflow="fold", no_wrap=column == "key")
    methods = {name: trainer.config_class for name, trainer in all_methods().items()}
    rows: list[tuple[str, type, list[str]]] = [
        *((name, cls, cls.method_options()) for name, cls in {"all": TokenSelectiveConfig, **methods}.items()),
        *(("all", cls, declared_fields(cls)) for cls in (DataArguments, LaunchArguments)),
    ]
    for method, cls, names in rows:
        for name in names:
            table.add_row(method, name, str(get_default(cls, name)), get_help(cls, name))
    PlainConsole().print(table)
