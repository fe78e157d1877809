"""Whether a completion gives the expected answer."""

import re

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


def is_correct(completion: str, answer: str) -> bool:
    r"""Compare the last `\boxed{...}`, or else the last number, with `answer`: as numbers, or else as text.

    Enough for a curve during training; a benchmark's score needs the benchmark's own grader.
    """
    boxed = _BOXED.findall(completion)
    numbers = _NUMBER.findall(completion)
    given = boxed[-1] if boxed else numbers[-1] if numbers else completion
    return _normal(given) == _normal(answer)


def _normal(text: str) -> str:
    text = text.strip().strip("$").replace(",", "")
    try:
        return repr(float(text))
    except ValueError:
        return text
