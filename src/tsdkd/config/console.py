"""A rich console for untrusted text, such as names, prompts and messages of libraries."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment
from rich.text import Text

from ..errors import escape_controls


class PlainConsole(Console):
    """A console that prints strings without interpreting markup or emoji codes, and escapes control characters."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **kwargs)

    def render_str(self, text: str, **kwargs: Any) -> Text:
        """See `Console`. Tables use this to measure their cells."""
        return super().render_str(escape_controls(text), **kwargs)

    def render(self, *args: Any, **kwargs: Any) -> Iterable[Segment]:
        """See `Console`. All output passes through here."""
        for segment in super().render(*args, **kwargs):
            yield segment if segment.control else segment._replace(text=escape_controls(segment.text))
