"""Whether a completion gives the expected answer."""

import re

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")  # braces in it, two deep


def is_correct(completion: str, answer: str) -> bool:
    r"""Compare the last `\boxed{...}`, or else the last number, with `answer`: as numbers, or else as text.

    Enough for a curve during training; a benchmark's score needs the benchmark's own grader.
    """
    boxed, numbers = last_boxed(completion), _NUMBER.findall(completion)
    given = boxed if boxed is not None else numbers[-1] if numbers else completion
    return _normal(given) == _normal(answer)


def last_boxed(text: str) -> str | None:
    r"""What is in the last `\boxed{...}`."""
    found = _BOXED.findall(text)
    return found[-1] if found else None


def _normal(text: str) -> str:
    text = text.strip().strip("$").replace(",", "")
    try:
        return repr(float(text))
    except ValueError:
        return text
