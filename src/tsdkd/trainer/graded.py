"""Grades an evaluation's completions, alike on all processes."""

from collections.abc import Sequence
from typing import Any

from accelerate.utils import gather_object

from ..errors import ConfigError
from ..grading import Grader


def grade_completions(grader: Grader, texts: Sequence[str], answers: Sequence[tuple[int, Any]]) -> list[bool]:
    """Whether each completion is right. All processes must call it.

    Args:
        grader: the grader.
        texts: the completions.
        answers: row number and answer of each.

    Raises:
        ConfigError: the grader failed on some process. All raise it: one that ended alone would leave the others
            waiting for it.
    """
    verdicts, problems = [], []
    try:
        verdicts = [grader(text, str(answer), row) for text, (row, answer) in zip(texts, answers, strict=True)]
    except ConfigError as error:
        problems = error.problems
    if everywhere := gather_object(problems):
        raise ConfigError(everywhere[:1])
    return verdicts
