"""The table of completions that `log_completions` prints."""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text


@dataclass
class CompletionSample:
    """A completion to show: its texts, its length in tokens, and whether it ended in a stop token."""

    prompt: str
    completion: str
    length: int
    stopped: bool


def print_completions(samples: list[CompletionSample], step: int) -> None:
    """Print the samples as a table."""
    table = Table(title=f"Completions at step {step}", show_lines=True)
    for column in ("prompt", "completion"):
        table.add_column(column, overflow="fold")
    table.add_column("tokens", justify="right")
    table.add_column("ended")
    for s in samples:
        table.add_row(Text(s.prompt), Text(s.completion), str(s.length), "stop token" if s.stopped else "limit")
    Console().print(table)
