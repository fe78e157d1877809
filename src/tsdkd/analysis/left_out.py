"""What is left out of a page or a figure, and why: a damaged part isn't a reason to lose the others."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..errors import DataError, first_line

logger = logging.getLogger(__name__)
_MAX_REASONS = 20


@contextmanager
def leave_out_damaged(skipped: list[str]) -> Iterator[None]:
    """A file that its reader refuses; `skipped` takes the reason."""
    try:
        yield
    except DataError as error:
        skipped.append(str(error))


@contextmanager
def leave_out_failure(title: str, skipped: list[str]) -> Iterator[None]:
    """The last line of defence for one part: what is read is validated, but drawing it is the work of libraries.

    Args:
        title: of the part.
        skipped: takes the reason why it is left out.
    """
    try:
        yield
    except OSError:  # nothing can be written
        raise
    except Exception as error:
        skipped.append(f"{title}: it can't be shown: {type(error).__name__}: {first_line(error)[:200]}")


def warn_of_skipped(skipped: Sequence[str]) -> None:
    """A line for each part that is left out."""
    for reason in shorten_reasons(skipped):
        logger.warning("left out: %s", reason)


def shorten_reasons(skipped: Sequence[str]) -> list[str]:
    """The first of many reasons, and how many more there are."""
    more = [f"{len(skipped) - _MAX_REASONS} more"] if len(skipped) > _MAX_REASONS else []
    return [*skipped[:_MAX_REASONS], *more]
