"""`tsdkd methods`."""

import argparse
from collections.abc import Sequence
from dataclasses import fields


def main(argv: Sequence[str]) -> int:
    """List the methods."""
    argparse.ArgumentParser(prog="tsdkd methods", description="List the methods, with options and papers.").parse_args(
        argv
    )

    _print_methods()  # torch from here on
    return 0


def _print_methods() -> None:
    """The methods: what each is, its paper, and the options that only some methods have."""
    from rich.console import Console
    from rich.markup import escape
    from rich.padding import Padding

    from ..config.base import TokenSelectiveConfig
    from ..config.options import get_default
    from ..methods import METHODS

    console = Console(highlight=False)
    common = {f.name for f in fields(TokenSelectiveConfig)} - {"beta"}
    for name, trainer in METHODS.items():
        cls = trainer.config_class
        console.print(f"[bold]{name}[/bold]  {(cls.__doc__ or '').splitlines()[0]}  [dim]{escape(cls.paper)}[/dim]")
        own = {option: get_default(cls, option) for option in cls.method_options() if option not in common}
        if own:
            console.print(Padding(", ".join(f"{k} {str(v).lower()}" for k, v in own.items()), (0, 0, 0, 4)))
        console.print(Padding(f"completions: {cls.completions_source}", (0, 0, 0, 4)))
