"""The demo task "chains": arithmetic modulo 10 on two interleaved chains of one to three operations.

    prompt      a 3 +4 *2 ; d 5 -2 ; find a - d
    completion  so a 3 +4 = 7 . then d 5 -2 = 3 ; thus a 7 *2 = 4 ; so a 4 - d 3 = 1 . answer 1

Every step applies the next operation of one chain. "." ends a step, and ";" ends a step that finishes its chain. Words
are separated by single spaces, and each word is one token. Each step of a solution has two free choices: which
unfinished chain to advance, and which connective to begin with. All other tokens are determined by the text so far.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal
from zlib import crc32

PAD, EOS, UNK, USER, ASSISTANT = SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>", "<user>", "<sol>")
CONNECTIVES = {"so": 0.4, "then": 0.3, "thus": 0.2, "next": 0.1}
DIGITS = tuple("0123456789")
NAMES = tuple("abcdefghijkl")
OPERATIONS = tuple(f"{sign}{n}" for sign, first in (("+", 1), ("-", 1), ("*", 2)) for n in range(first, 10))
VOCABULARY = (*SPECIAL_TOKENS, *DIGITS, *OPERATIONS, *NAMES, *CONNECTIVES, "+", "-", "=", ".", ";", "find", "answer")

MAX_OPERATIONS = 3
MAX_PROMPT_TOKENS = 18  # including <user> and <sol>
MAX_COMPLETION_TOKENS = 54  # including <eos>

Split = Literal["train", "held_out"]


@dataclass(frozen=True)
class Chain:
    """A named start value and the operations applied to it, in order."""

    name: str
    start: int
    operations: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join((self.name, str(self.start), *self.operations))


@dataclass(frozen=True)
class Problem:
    """Two chains, in the order of the question `find first sign second`. The prompt may list them in reverse order."""

    prompt: str
    answer: str
    first: Chain
    second: Chain
    sign: str


def apply_operation(value: int, operation: str) -> int:
    """Return the result of one operation such as "+4" or "*2", modulo 10."""
    sign, number = operation[0], int(operation[1:])
    return {"+": value + number, "-": value - number, "*": value * number}[sign] % 10


def final_value(chain: Chain) -> int:
    """Return the value of a chain after all of its operations."""
    value = chain.start
    for operation in chain.operations:
        value = apply_operation(value, operation)
    return value


def make_problem(rng: random.Random) -> Problem:
    """Draw two chains with different names and a question."""
    chains = [
        Chain(name, rng.randrange(10), tuple(rng.choices(OPERATIONS, k=rng.randint(1, MAX_OPERATIONS))))
        for name in rng.sample(NAMES, 2)
    ]
    sign = rng.choice("+-")
    first, second = rng.sample(chains, 2)
    prompt = f"{chains[0]} ; {chains[1]} ; find {first.name} {sign} {second.name}"
    answer = apply_operation(final_value(first), f"{sign}{final_value(second)}")
    return Problem(prompt, str(answer), first, second, sign)


def sample_solution(problem: Problem, rng: random.Random) -> str:
    """Draw one correct solution. Chains are chosen uniformly, connectives by weight."""
    values = {chain: chain.start for chain in (problem.first, problem.second)}
    todo = {chain: list(chain.operations) for chain in values}
    steps = []
    while unfinished := [chain for chain in values if todo[chain]]:
        chain = rng.choice(unfinished)
        operation = todo[chain].pop(0)
        result = apply_operation(values[chain], operation)
        end = "." if todo[chain] else ";"
        steps.append(f"{_connective(rng)} {chain.name} {values[chain]} {operation} = {result} {end}")
        values[chain] = result
    left, right = (f"{chain.name} {value}" for chain, value in values.items())
    steps.append(f"{_connective(rng)} {left} {problem.sign} {right} = {problem.answer} .")
    return " ".join((*steps, "answer", problem.answer))


def _connective(rng: random.Random) -> str:
    return rng.choices(list(CONNECTIVES), list(CONNECTIVES.values()))[0]


def assign_split(prompt: str) -> Split:
    """Return the split of a prompt. It depends only on the text, so no seed puts a held-out prompt into training."""
    return "held_out" if crc32(prompt.encode()) % 8 == 0 else "train"


def iter_problems(seed: int, split: Split) -> Iterator[tuple[Problem, str]]:
    """Yield distinct problems of one split, each with one sampled solution; endless and reproducible."""
    rng = random.Random(seed)
    seen: set[str] = set()
    while True:
        problem = make_problem(rng)
        if assign_split(problem.prompt) == split and problem.prompt not in seen:
            seen.add(problem.prompt)
            yield problem, sample_solution(problem, rng)
