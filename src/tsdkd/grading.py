"""Grades completions against expected answers: numbers, mathematics, or letters."""

import re
from collections.abc import Callable
from typing import Any

from .errors import ConfigError, first_line

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")  # braces in it, two deep
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_PROSE = re.compile(r"[^\W\d_]{2}|[=⇒→∴\n]|\\(?:implies|therefore|iff|to|[lL]ong|[rR]ightarrow)")
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_LETTER = re.compile(r"(?:\\text\{)?\s*\(?([A-Z])\b")


class Grader:
    """Wraps a grading function. Its failures are reported in one line with its name.

    Args:
        function: `(completion, answer)` -> whether the completion is right: True or False, or the numbers 1 or 0.
        name: what messages call it.
    """

    def __init__(self, function: Callable[[str, str], Any] | None = None, name: str = "the grader") -> None:
        self.function = is_exact_match if function is None else function
        self.name = name

    def __call__(self, completion: str, answer: str, row: int | None = None) -> bool:
        """Grade a completion of a row of the data set.

        Raises:
            ConfigError: the function raises an exception, or returns something else.
        """
        where = f"for the completion{'' if row is None else f' of row {row}'}: {completion[:200]!r}"
        try:
            verdict = self.function(completion, answer)
            is_verdict, shown = bool(verdict in (0, 1)), repr(verdict)[:60]
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {first_line(error)[:300]}"
            raise ConfigError([f"grader: {self.name} raised {reason}, {where}"]) from error
        if not is_verdict:
            raise ConfigError([f"grader: {self.name} returned {shown}, expected True or False, {where}"])
        return bool(verdict)


def is_exact_match(completion: str, answer: str) -> bool:
    r"""Compare the last `\boxed{...}`, or else the last number, with `answer`: as numbers, or else as text.

    Enough for a curve during training; a benchmark's score needs the benchmark's own grader.
    """
    boxed, numbers = extract_boxed(completion), _NUMBER.findall(completion)
    given = boxed if boxed is not None else numbers[-1] if numbers else completion
    return _normalize(given) == _normalize(answer)


def extract_boxed(text: str) -> str | None:
    r"""Extract the content of the last `\boxed{...}`, or None."""
    found = _BOXED.findall(text)
    return found[-1] if found else None


def extract_final_answer(completion: str, expected: str | None) -> str:
    r"""Extract the answer that a completion ends with, as text: the first of these that it has.

    1. the content of the last `<answer>...</answer>`
    2. the content of the last `\boxed{...}`
    3. what follows the last `####`, up to the end of the line
    4. if the right answer is a number: the last number
    5. the last line

    If the right answer has several lines, 3 and 5 are as many. A number loses its commas and dollar signs.

    Args:
        completion: the text.
        expected: the right answer, or None if a problem has no single one.
    """
    expects_number = expected is not None and _NUMBER.fullmatch(expected) is not None
    num_lines = len((expected or "").strip().splitlines()) or 1
    if tagged := _TAGGED.findall(completion):
        found = tagged[-1]
    elif (boxed := extract_boxed(completion)) is not None:
        found = boxed
    elif "####" in completion:
        found = "\n".join(completion.rpartition("####")[2].strip().splitlines()[:num_lines])
    elif expects_number and (numbers := _NUMBER.findall(completion)):
        found = numbers[-1]
    else:
        found = "\n".join(completion.strip().splitlines()[-num_lines:])
    found = found.strip()
    number = found.strip("$").replace(",", "")
    return number if expects_number and _NUMBER.fullmatch(number) else found


def _normalize(text: str) -> str:
    text = text.strip().strip("$").replace(",", "")
    try:
        return repr(float(text))
    except ValueError:
        return text


def is_math_equivalent(response: str, answer: str) -> bool:
    """math-verify's verdict: fractions, sets, units and the like are compared by what they mean.

    Of several boxed answers the last one counts, or all of them together.
    """
    from math_verify import parse, verify  # an extra

    gold, boxed = parse(f"${answer}$"), extract_boxed(response)
    readings = [response] if boxed is None else [f"\\boxed{{{boxed}}}", response]
    return any(verify(gold, parse(text)) for text in readings)


def extract_answer(solution: str) -> str | None:
    r"""Extract the content of the last `\boxed{}`, or the whole text if it is nothing but an answer
    (DAPO-Math-17k-Processed).

    That is one line without a word, an equals sign or an arrow, of which math-verify can make something: no worked
    solution, whose last number may be anything, is taken for its answer.
    """
    from math_verify import parse  # an extra

    boxed, text = extract_boxed(solution), solution.strip()
    if boxed is not None:
        return boxed
    is_bare = not _PROSE.search(_COMMAND.sub(_replace_command, text))
    return text if is_bare and parse(f"${text}$") else None


def _replace_command(command: re.Match[str]) -> str:
    """Replace LaTeX commands: they aren't words, and only some connect steps."""
    return command[0] if _PROSE.match(command[0]) else " "


def is_boxed_letter(response: str, letter: str) -> bool:
    """Whether the last boxed letter is the given one."""
    found = _LETTER.match((extract_boxed(response) or "").strip())
    return found is not None and found[1] == letter
