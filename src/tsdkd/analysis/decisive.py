"""Which tokens decide whether a completion is right: replaces single tokens, and lets each model continue."""

import logging
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..grading import Grader
from ..models.loading import Role
from ..rollout.captured import CapturedStep
from ..rollout.categorical import sample_tokens
from ..rollout.hf import make_step, sample_with_step
from ..rollout.seeding import RandomStream, prompt_generator
from ..rollout.step import DecodingStep
from .record_pair import PairRecord

logger = logging.getLogger(__name__)

_MAX_TOKENS_PER_ROLE = 200
_BATCH_SIZE = 32


class Decisiveness(NamedTuple):
    """How often another token changes whether the completion is right.

    Attributes:
        num_tried: number of tokens that were replaced, at least 1.
        student, teacher: percent of them, if this model continues.
    """

    num_tried: int
    student: float
    teacher: float


class _Prefix(NamedTuple):
    """The first tokens of a row's completion. `row` is a position in the record."""

    row: int
    ids: list[int]


def measure_decisiveness(
    record: PairRecord, token_roles: Sequence[Sequence[str]], grader: Grader
) -> dict[str, Decisiveness]:
    """Replace random tokens of each role, and compare with the completions that keep them.

    A token is tried if the completion is on track up to it: the teacher, continuing greedily from the tokens before
    it, gives a right answer. The other token is drawn from the student's distribution without the token itself. Both
    versions are continued greedily by the same model, and graded.

    Args:
        record: the models and the completions; its rows have an `answer`.
        token_roles: the role of each token of each completion.
        grader: says whether a completion is right.

    Returns:
        Role -> its decisiveness, for the roles with a token on track.

    Raises:
        ConfigError: the grader fails.
    """
    chosen = _choose_tokens(record, token_roles)
    logger.info("replacing up to %d tokens, to see which decide whether a completion is right", len(chosen))
    student, teacher = (_Continuation(record, name, grader) for name in ("student", "teacher"))
    on_track = teacher.grade([_Prefix(row, ids[:-1]) for row, ids in chosen])
    kept = [prefix for prefix, is_right in zip(chosen, on_track, strict=True) if is_right]
    replaced = _replace_last_tokens(record, kept)
    has_changed = [
        [before != after for before, after in zip(model.grade(kept), model.grade(replaced), strict=True)]
        for model in (student, teacher)
    ]
    by_role: dict[str, list[tuple[bool, ...]]] = defaultdict(list)
    for (row, ids), *changes in zip(kept, *has_changed, strict=True):
        by_role[token_roles[row][len(ids) - 1]].append(tuple(changes))
    return {
        role: Decisiveness(len(changes), *(100 * sum(column) / len(changes) for column in zip(*changes, strict=True)))
        for role, changes in by_role.items()
    }


def _choose_tokens(record: PairRecord, token_roles: Sequence[Sequence[str]]) -> list[_Prefix]:
    """Choose random tokens of each role. Returns the prefixes that end with them."""
    places: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for row, roles in enumerate(token_roles):
        for position, role in enumerate(roles):
            places[role].append((row, position))
    rng = random.Random(record.training.seed)
    chosen = [place for some in places.values() for place in rng.sample(some, min(len(some), _MAX_TOKENS_PER_ROLE))]
    return [_Prefix(row, record.completions[row].completion[: position + 1]) for row, position in chosen]


class _Continuation:
    """Completes prefixes greedily with one model, and grades the completions."""

    def __init__(self, record: PairRecord, name: Role, grader: Grader) -> None:
        self.record, self.grader = record, grader
        self.answers, self.limits = list(record.rows["answer"]), list(record.rows["limit"])
        # the student may have ended the completion in its own way
        self.stop_token_ids = record.pair.stop_token_ids() | record.pair.stop_token_ids(name)
        self.name = name
        model = record.student if name == "student" else record.teacher
        self.step = make_step(model, vocab_size=record.pair.shared_vocab_size, is_greedy=True)

    def grade(self, prefixes: Sequence[_Prefix]) -> list[bool]:
        """Whether the completion of each prefix is right."""
        texts = (self.record.pair.tokenizer.decode(ids, skip_special_tokens=True) for ids in self._complete(prefixes))
        return [
            self.grader(text, str(self.answers[row]), self.record.completions[row].index)
            for (row, _), text in zip(prefixes, texts, strict=True)
        ]

    def _complete(self, prefixes: Sequence[_Prefix]) -> list[list[int]]:
        completions = [ids for _, ids in prefixes]
        room = [self.limits[row] - len(ids) for row, ids in prefixes]
        has_ended = [bool(ids) and ids[-1] in self.stop_token_ids for ids in completions]
        for some in _batches(self.record, prefixes, [i for i, n in enumerate(room) if n > 0 and not has_ended[i]]):
            rest = sample_with_step(
                self.step,
                [_sequence(self.record, prefixes[i], self.name) for i in some],
                [room[i] for i in some],
                None,
                stop_token_ids=self.stop_token_ids,
            )
            for i, continuation in zip(some, rest, strict=True):
                completions[i] = [*completions[i], *continuation.ids]
        return completions


def _replace_last_tokens(record: PairRecord, prefixes: Sequence[_Prefix]) -> list[_Prefix]:
    """Replace the last token of each prefix by one from the student's distribution without that token."""
    replaced = list(prefixes)
    for some in _batches(record, prefixes, range(len(prefixes))):
        before = [_sequence(record, prefixes[i])[:-1] for i in some]
        keys = [(len(prefixes[i].ids), record.completions[prefixes[i].row].index) for i in some]
        streams = [(prompt_generator(record.training.seed, *key, RandomStream.ALTERNATIVE),) for key in keys]
        step = _step_without(record, [prefixes[i].ids[-1] for i in some])
        drawn = sample_with_step(step, before, [1] * len(some), streams, stop_token_ids=())
        for i, completion in zip(some, drawn, strict=True):
            replaced[i] = _Prefix(prefixes[i].row, prefixes[i].ids[:-1] + completion.ids)
    return replaced


def _step_without(record: PairRecord, excluded: Sequence[int]) -> CapturedStep:
    """Make a step that samples one token for each row, but not the row's excluded token."""
    column = torch.tensor(excluded, device=record.student.device).unsqueeze(-1)

    def choose(logits: list[Tensor], uniform: Tensor) -> Tensor:
        others = logits[0].scatter(-1, column, float("-inf")) / record.training.temperature
        return sample_tokens(others, uniform[:, 0])[0]

    return CapturedStep(DecodingStep([record.student], choose, record.pair.shared_vocab_size))


def _batches(record: PairRecord, prefixes: Sequence[_Prefix], indices: Sequence[int]) -> Iterator[list[int]]:
    """Divide indices of prefixes into batches of similar lengths, with little padding."""
    ordered = sorted(indices, key=lambda i: len(_sequence(record, prefixes[i])))
    for start in range(0, len(ordered), _BATCH_SIZE):
        yield ordered[start : start + _BATCH_SIZE]


def _sequence(record: PairRecord, prefix: _Prefix, name: Role = "student") -> list[int]:
    """The prompt, as this model reads it, and the prefix."""
    completion = record.completions[prefix.row]
    own = completion.teacher_prompt if name == "teacher" else None
    return [*(completion.prompt if own is None else own), *prefix.ids]
