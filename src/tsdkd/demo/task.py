"""The demo task "walks": two moves on a torus of 32 x 32 cells.

    prompt      27,7 x+5 y~3 x#4 y-2 x+9 y#0 y+1 x~4 -> y+3
    completion  y-2 27,5 y+3 27,8

From the first cell, make any one of the eight offered moves, then the last move, and write the cell after each. Words
are separated by single spaces, and each word is one token. A move changes one axis: shifts `x+d` and `x-d` (x becomes
x + d or x - d, modulo 32), mirrors `x~c` (c - x modulo 32), and tables `x#i`, each a fixed random permutation of
0..31 that a model must memorize. The first token is the only free choice. Any offered move leads to a right answer if
both cells are right, so `answer` in the files repeats the prompt, and `is_correct` checks the walk.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal
from zlib import crc32

import numpy as np

Cell = tuple[int, int]
Kind = Literal["shift", "mirror", "table"]
Split = Literal["train", "held_out"]

SIDE = 32
NUM_TABLES = 48  # for each axis
TABLE_SEED = 4
MENU_SIZE = 8
MENU_MIX: dict[Kind, float] = {"shift": 0.35, "mirror": 0.25, "table": 0.4}  # how often an offered move is of a kind
LAST_MIX: dict[Kind, float] = {"shift": 0.5, "mirror": 0.4, "table": 0.1}
RANK_OFFSET, RANK_EXPONENT = 2, 0.7  # table i is drawn with weight (i + 2) ** -0.7, so late ones are learned last

PAD, EOS, UNK, USER, ASSISTANT = SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>", "<user>", "<sol>")
ARROW = "->"


@dataclass(frozen=True)
class Move:
    """A move on one axis.

    Attributes:
        axis: 0 for x, 1 for y.
        kind: what kind of permutation it is.
        amount: d of a shift (negative for `x-d`), c of a mirror, number of a table.
        images: the new coordinate for each of the 32 old ones.
    """

    axis: int
    kind: Kind
    amount: int
    images: tuple[int, ...]


def _make_moves() -> dict[str, Move]:
    """All moves by name: those of x, then those of y; shifts, mirrors, tables."""
    rng, moves = np.random.default_rng(TABLE_SEED), {}
    for axis, letter in enumerate("xy"):
        for d in [d for d in range(1 - SIDE // 2, SIDE // 2) if d]:
            moves[f"{letter}{d:+d}"] = Move(axis, "shift", d, tuple((x + d) % SIDE for x in range(SIDE)))
        for c in range(SIDE):
            moves[f"{letter}~{c}"] = Move(axis, "mirror", c, tuple((c - x) % SIDE for x in range(SIDE)))
        for i in range(NUM_TABLES):
            moves[f"{letter}#{i}"] = Move(axis, "table", i, tuple(rng.permutation(SIDE).tolist()))
    return moves


MOVES = _make_moves()
CELLS: dict[str, Cell] = {f"{x},{y}": (x, y) for x in range(SIDE) for y in range(SIDE)}
VOCABULARY = (*SPECIAL_TOKENS, ARROW, *CELLS, *MOVES)

PROMPT_TOKENS = MENU_SIZE + 5  # including <user> and <sol>
COMPLETION_TOKENS = 5  # including <eos>


@dataclass(frozen=True)
class Problem:
    """A first cell, the offered moves and the last move, as they are written."""

    start: str
    menu: tuple[str, ...]
    last: str

    @property
    def prompt(self) -> str:
        """The text of the problem."""
        return " ".join((self.start, *self.menu, ARROW, self.last))


def parse_prompt(prompt: str) -> Problem:
    """Read a problem. Raises `ValueError` if the text is none."""
    words = prompt.split()
    if (
        len(words) != MENU_SIZE + 3
        or words[0] not in CELLS
        or words[-2] != ARROW
        or not all(word in MOVES for word in (*words[1:-2], words[-1]))
    ):
        raise ValueError(f"expected a problem of the demo as the answer, found {prompt[:80]!r}")
    return Problem(words[0], tuple(words[1:-2]), words[-1])


def apply_move(cell: str, move: str) -> str:
    """Return the cell after a move."""
    position, found = list(CELLS[cell]), MOVES[move]
    position[found.axis] = found.images[position[found.axis]]
    return f"{position[0]},{position[1]}"


def solve(problem: Problem, first: str) -> str:
    """Return the right completion that begins with an offered move."""
    middle = apply_move(problem.start, first)
    return " ".join((first, middle, problem.last, apply_move(middle, problem.last)))


def is_correct(completion: str, answer: str) -> bool:
    """Whether a completion is one of the right walks.

    Args:
        completion: text without special tokens.
        answer: the prompt, because each of the offered moves leads to a right walk.

    Raises:
        ValueError: the answer isn't a prompt of this task.
    """
    problem, words = parse_prompt(answer), completion.split()
    return bool(words) and words[0] in problem.menu and words == solve(problem, words[0]).split()


def _cumulative_weights(mix: dict[Kind, float]) -> list[float]:
    """For `random.choices`: within a kind, moves are as likely as each other, except tables."""
    raw = [(m.amount + RANK_OFFSET) ** -RANK_EXPONENT if m.kind == "table" else 1.0 for m in MOVES.values()]
    totals = dict.fromkeys(mix, 0.0)
    for move, weight in zip(MOVES.values(), raw, strict=True):
        totals[move.kind] += weight
    return list(accumulate(w * mix[m.kind] / totals[m.kind] for m, w in zip(MOVES.values(), raw, strict=True)))


_CELL_NAMES, _MOVE_NAMES = tuple(CELLS), tuple(MOVES)
_MENU_WEIGHTS, _LAST_WEIGHTS = _cumulative_weights(MENU_MIX), _cumulative_weights(LAST_MIX)


def make_problem(rng: random.Random) -> Problem:
    """Draw a first cell, distinct moves in random order, and a last move that isn't among them."""
    menu: dict[str, None] = {}
    while len(menu) < MENU_SIZE:
        menu |= dict.fromkeys(rng.choices(_MOVE_NAMES, cum_weights=_MENU_WEIGHTS, k=MENU_SIZE - len(menu)))
    offered = list(menu)
    rng.shuffle(offered)  # likely moves were drawn first
    last = offered[0]
    while last in menu:
        (last,) = rng.choices(_MOVE_NAMES, cum_weights=_LAST_WEIGHTS)
    return Problem(rng.choice(_CELL_NAMES), tuple(offered), last)


def sample_solution(problem: Problem, rng: random.Random, table_weight: float = 1.0) -> str:
    """Draw one right completion. A table begins it with this weight, any other offered move with weight 1."""
    weights = [table_weight if MOVES[name].kind == "table" else 1.0 for name in problem.menu]
    return solve(problem, rng.choices(problem.menu, weights)[0])


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
