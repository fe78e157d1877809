"""`tsdkd methods`."""

from collections.abc import Sequence
from dataclasses import fields

from .arguments import ArgumentParser


def main(argv: Sequence[str]) -> int:
    """List the methods."""
    about = "List the methods with their papers and options."
    ArgumentParser(prog="tsdkd methods", description=about).parse_args(argv)
    _print_methods()
    return 0


def _print_methods() -> None:
    """Print each method with its paper and the options that only some methods have."""
    from rich.padding import Padding
    from rich.text import Text

    from ..config.base import TokenSelectiveConfig
    from ..config.console import PlainConsole
    from ..config.options import get_default
    from ..methods import all_methods  # torch from here on

    console = PlainConsole()
    common = {f.name for f in fields(TokenSelectiveConfig)} - {"beta"}
    for name, trainer in all_methods().items():
        cls = trainer.config_class
        about = f"  {(cls.__doc__ or '').splitlines()[0]}  "
        console.print(Text.assemble((name, "bold"), about, (cls.paper, "dim")))
        options = {name: get_default(cls, name) for name in cls.method_options() if name not in common}
        if options:
            console.print(Padding(", ".join(f"{k} {str(v).lower()}" for k, v in options.items()), (0, 0, 0, 4)))
        console.print(Padding(f"completions: {cls.completions_source}", (0, 0, 0, 4)))
