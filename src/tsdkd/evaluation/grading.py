"""Whether a response gives the answer: as mathematics, or as a letter."""

import re

from math_verify import parse, verify

from ..answers import last_boxed

_LETTER = re.compile(r"(?:\\text\{)?\s*\(?([A-Z])\b")


def same_mathematics(response: str, answer: str) -> bool:
    """math-verify's verdict: fractions, sets, units and the like are compared by what they mean.

    Of several boxed answers the last one counts, or all of them together.
    """
    gold, boxed = parse(f"${answer}$"), last_boxed(response)
    readings = [response] if boxed is None else [f"\\boxed{{{boxed}}}", response]
    return any(verify(gold, parse(text)) for text in readings)


def boxed_letter_is(response: str, letter: str) -> bool:
    """Whether the last boxed letter is the given one."""
    found = _LETTER.match((last_boxed(response) or "").strip())
    return found is not None and found[1] == letter
