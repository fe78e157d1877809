"""The table of `tsdkd train --help_keys`."""

import dataclasses

from rich.console import Console
from rich.table import Table

from ..config.base import DataArguments, TokenSelectiveConfig
from ..config.launch import LaunchArguments
from ..methods import METHODS


def print_keys() -> None:
    """The keys that tsdkd adds or gives another default, as a table."""
    table = Table(title="tsdkd's keys (all of TRL's ModelConfig and transformers' TrainingArguments work too)")
    for column in ("method", "key", "default", "meaning"):
        table.add_column(column, overflow="fold", no_wrap=column == "key")
    classes: dict[str, type[TokenSelectiveConfig]] = {
        "all": TokenSelectiveConfig,
        **{name: trainer.config_class for name, trainer in METHODS.items()},
    }
    for method, cls in classes.items():
        by_name = {f.name: f for f in dataclasses.fields(cls)}
        for name in cls.method_options():
            table.add_row(method, name, str(by_name[name].default), by_name[name].metadata.get("help", ""))
    for f in (*dataclasses.fields(DataArguments), *dataclasses.fields(LaunchArguments)):
        table.add_row("all", f.name, str(f.default), f.metadata["help"])
    Console().print(table)
