"""Problems that reasoning-gym generates, as a data set: `reasoning_gym:chain_sum?min_terms=3&seed=1`.

The verifiers need more than the text of the right answer. So the `answer` of a row also says which problem it is, and
the problem is generated again to grade a completion.
"""

import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from datasets import Dataset

from ..config.logs import get_logger
from ..errors import DataError, first_line
from ..grading import extract_final_answer, is_exact_match
from .reasoning_task import NUM_PROBLEMS, Source, build_task, generate_entry, is_reasoning_gym, isolated, parse_name

logger = get_logger(__name__)

GRADER = "tsdkd.data.reasoning_gym:is_correct"
"""The grader of these data sets, as the option `grader` names it."""
_SPLITS = ("test", "validation", *["train"] * 6)  # of eight different prompts, on average
_LOG_INTERVAL = 10.0  # seconds
_PATIENCE = 1000  # problems without a new one among them, after which there are no more

# The verifiers of these tasks evaluate an answer as Python, so that only harmless ones are passed on: arithmetic
# without powers; words, digits or boards. No other answer can get the whole score. That of propositional_logic tries
# all values of all names; those of a right answer are capital letters.
_ARITHMETIC, _WORDS = re.compile(r"(?:[\d\s.+\-/()]|\*(?!\s*\*))*"), re.compile(r"[\w\s]*")
_HARMLESS = {
    "countdown": _ARITHMETIC,
    **dict.fromkeys(("binary_matrix", "n_queens", "spiral_matrix", "string_insertion"), _WORDS),
    "propositional_logic": re.compile(r"[A-Z\s()\u00ac\u2227\u2228\u2192\u2194]*"),
}
_ODD = re.compile(r"\d[eE]\+?\d{4}|\bnan\b")  # a number that takes forever, or is taken for any other
_MAX_LENGTH = 2000  # characters of an answer, or twice the right one's: some verifiers take quadratic time
_REFUSALS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What verifiers raise for an answer that hasn't the form they expect; most return 0 then."""


def default_grader(*names: str | None) -> str | None:
    """The grader of data sets where the user has set none. None: what the caller grades with by default."""
    return GRADER if any(map(is_reasoning_gym, names)) else None


def test_name(name: str) -> str:
    """The name of the same problems where they are only evaluated on: without `size`."""
    return re.sub(r"(?<=[?&])size=[^&]*&?", "", name).rstrip("?&")


def generate_split(name: str, split: str, field: str = "dataset_name") -> Dataset:
    """Generate a split: "train", "validation" or "test". No prompt is in two of them, whatever the seeds.

    Args:
        name: `reasoning_gym:TASK?option=value&...`: the options of the task, `seed`, and the number of rows, `size` of
            "train" and `test_size` of the others.
        split: its name.
        field: what messages call `name`.

    Returns:
        Different problems, in the order in which they are generated. Columns `prompt`, `answer` (JSON: the right
        answer, if the task has one, and which problem it is) and, if the task has worked solutions, `completion`.

    Raises:
        DataError: no such task, option or split, or reasoning-gym isn't installed.
    """
    source, sizes = parse_name(name, field)
    if split not in _SPLITS:
        raise DataError(f"{field}: {name} has the splits train, validation and test, but not {split!r}")
    size = sizes["size" if split == "train" else "test_size"]
    try:
        rows = _generate_rows(source, split, size)
    except Exception as error:  # with some options, a task can't make a problem, and raises anything
        raise DataError(f"{field}: {name} can't be generated: {first_line(error)[:300]}") from error
    if not rows:
        raise DataError(f"{field}: {name} has no problem for the split {split}; its options allow only a few problems")
    if len(rows) < size:
        logger.warning(f"{field}: {name} has only {len(rows)} different problems for the split {split}, not {size}")
    return Dataset.from_list(list(rows))


@lru_cache(maxsize=8)
def _generate_rows(source: Source, split: str, size: int) -> Sequence[dict[str, Any]]:
    """The first `size` problems of a split, without those that their own verifier gets wrong."""
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    last_new, last_logged = 0, time.monotonic()
    for index in range(NUM_PROBLEMS):
        if time.monotonic() - last_logged >= _LOG_INTERVAL:
            last_logged = time.monotonic()
            logger.info(f"{source}: generated {len(rows)} of {size} problems for the split {split}")
        entry = generate_entry(source, index)
        digest = _digest(entry)
        if digest not in seen:
            seen.add(digest)
            last_new = index
            if _SPLITS[int(digest[0], 16) % 8] == split and _is_gradable(source, entry):
                rows.append(_make_row(source, index, entry))
        if len(rows) == size or index - last_new > _PATIENCE:
            break
    return rows


def _make_row(source: Source, index: int, entry: Mapping[str, Any]) -> dict[str, Any]:
    answer = {"answer": entry["answer"], "source": str(source), "index": index, "sha256": _digest(entry)[:12]}
    solution = _worked_solution(entry)
    return {
        "prompt": entry["question"],
        "answer": json.dumps(answer, ensure_ascii=False),
        **({} if solution is None else {"completion": solution}),
    }


def _digest(entry: Mapping[str, Any]) -> str:
    return hashlib.sha256(entry["question"].encode()).hexdigest()


def _worked_solution(entry: Mapping[str, Any]) -> str | None:
    return entry["metadata"].get("answer_cot")


def _is_gradable(source: Source, entry: Mapping[str, Any]) -> bool:
    """Whether the verifier accepts the entry's own answer and solution."""
    own = entry["answer"]
    texts = (None if own is None else f"<answer>{own}</answer>", _worked_solution(entry))
    return all(_is_right(source, entry, text) for text in texts if text is not None)


def is_correct(completion: str, answer: str) -> bool:
    """Grade with reasoning-gym's verifier of the task: right is a score of 1.

    Args:
        completion: the text, of which `extract_final_answer` is graded.
        answer: of a row of `generate_split`. Any other is graded by `is_exact_match`.

    Raises:
        ValueError: the installed version of reasoning-gym generates another problem.
        DataError: the problem can't be generated.
    """
    found = _read_answer(answer)
    if found is None:
        return is_exact_match(completion, answer)
    source, entry = _find_problem(found["source"], found["index"], found["sha256"])
    return _is_right(source, entry, completion)


def _read_answer(answer: str) -> dict[str, Any] | None:
    """The parts of an answer that `_make_row` made; None for any other."""
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    types = {"source": str, "index": int, "sha256": str}
    is_ours = isinstance(found, dict) and all(type(found.get(key)) is kind for key, kind in types.items())
    return found if is_ours and is_reasoning_gym(found["source"]) and 0 <= found["index"] < NUM_PROBLEMS else None


def _find_problem(name: str, index: int, sha256: str) -> tuple[Source, Mapping[str, Any]]:
    source, _ = parse_name(name, "answer")
    entry = generate_entry(source, index)
    if not _digest(entry).startswith(sha256):
        raise ValueError(f"the installed reasoning-gym has another problem {index} of {name}")
    return source, entry


def _is_right(source: Source, entry: Mapping[str, Any], completion: str) -> bool:
    text = extract_final_answer(completion, entry["answer"])
    is_harmless = source.task not in _HARMLESS or _HARMLESS[source.task].fullmatch(text)
    if not is_harmless or _ODD.search(text) or len(text) > max(_MAX_LENGTH, 2 * len(entry["answer"] or "")):
        return False
    task = build_task(source)
    with isolated(0):
        try:
            return bool(task.score_answer(text, entry) >= 1)
        except _REFUSALS:
            return False
