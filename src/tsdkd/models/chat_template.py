"""Renders chat templates, which are programs that come with a model, with limits on time and memory."""

import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import DataError, first_line

MAX_SECONDS = 5.0  # of CPU time: a template can't sleep, and a busy machine may
MAX_MEMORY = 2**30  # bytes beyond what the process has
MAX_GROWTH = 10, 2**20  # characters of a rendered prompt: for each of what goes in, and besides


class _TimeIsUp(BaseException):
    """Derives from `BaseException`, because jinja catches `Exception` while it folds constants."""


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
    """Render messages as text, up to the start of the assistant's turn. `kwargs` are passed to the template.

    Raises:
        DataError: the template fails, or takes more than its share.
    """
    try:
        with limit_template():
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **kwargs)
    except DataError:
        raise
    except Exception as error:  # a template raises what it likes
        raise DataError(f"the chat template refuses the prompt: {first_line(error)[:300]}") from error
    factor, constant = MAX_GROWTH
    if len(text) > factor * len(str([*messages, kwargs])) + constant:
        raise DataError(f"the chat template makes {len(text):,} characters of the prompt")
    return str(text)


@contextmanager
def limit_template() -> Iterator[None]:
    """Limit memory (on Linux) and time (in the main thread, which alone gets signals) within the block.

    Raises:
        DataError: it took more.
    """
    try:
        with _limit_memory(), _limit_time():
            yield
    except _TimeIsUp:
        raise DataError(f"the chat template takes more than {MAX_SECONDS:g} seconds for one prompt") from None
    except MemoryError:
        raise DataError(f"the chat template takes more than {MAX_MEMORY / 2**30:g} GiB for one prompt") from None


@contextmanager
def _limit_time() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGPROF, _raise_time_is_up)
    timer = signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS, 1.0)  # again each second: a destructor may swallow one
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, *timer)
        signal.signal(signal.SIGPROF, handler)


def _raise_time_is_up(*_: Any) -> None:
    raise _TimeIsUp


@contextmanager
def _limit_memory() -> Iterator[None]:
    if sys.platform != "linux":
        yield
        return
    with open("/proc/self/statm", "rb") as file:
        size = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    limits = [size + MAX_MEMORY, *(limit for limit in before if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
