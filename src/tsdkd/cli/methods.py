"""`tsdkd methods`."""

import argparse
from collections.abc import Sequence
from dataclasses import fields


def main(argv: Sequence[str]) -> int:
    """List the methods."""
    about = "List the methods, with options and papers."
    argparse.ArgumentParser(prog="tsdkd methods", description=about).parse_args(argv)
    _print_methods()
    return 0


def _print_methods() -> None:
    """Print each method with its paper and the options that only some methods have."""
    from rich.console import Console
    from rich.markup import escape
    from rich.padding import Padding

    from ..config.base import TokenSelectiveConfig
    from ..config.options import get_default
    from ..methods import METHODS  # torch from here on

    console = Console(highlight=False)
    common = {f.name for f in fields(TokenSelectiveConfig)} - {"beta"}
    for name, trainer in METHODS.items():
        cls = trainer.config_class
        console.print(f"[bold]{name}[/bold]  {(cls.__doc__ or '').splitlines()[0]}  [dim]{escape(cls.paper)}[/dim]")
        options = {name: get_default(cls, name) for name in cls.method_options() if name not in common}
        if options:
            console.print(Padding(", ".join(f"{k} {str(v).lower()}" for k, v in options.items()), (0, 0, 0, 4)))
        console.print(Padding(f"completions: {cls.completions_source}", (0, 0, 0, 4)))
