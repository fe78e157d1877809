"""The embedded demo: its task, its files, its models' vocabulary, and that the student learns."""

import json
import random
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import write_jsonl
from tsdkd.cli import main
from tsdkd.demo.run_demo import evaluate_demo
from tsdkd.demo.task import MOVES, VOCABULARY, is_correct, iter_problems, parse_prompt, sample_solution

DEMO = Path(__file__).parent.parent / "src/tsdkd/demo"
PROMPT = "27,7 x+5 y~3 x#4 y-2 x+9 y#0 y+1 x~4 -> y+3"


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DEMO / f"{name}.jsonl").read_text().splitlines()]


def walk(start: str, *moves: str) -> str:
    """An independent implementation: a move, the cell after it, and so on."""
    cell, words = [int(n) for n in start.split(",")], []
    for move in moves:
        axis = "xy".index(move[0])
        if move[1] == "#":
            cell[axis] = MOVES[move].images[cell[axis]]
        elif move[1] == "~":
            cell[axis] = (int(move[2:]) - cell[axis]) % 32
        else:
            cell[axis] = (cell[axis] + int(move[1:])) % 32
        words += [move, f"{cell[0]},{cell[1]}"]
    return " ".join(words)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_every_offered_move_leads_to_a_right_walk(split: Any) -> None:
    for problem, solution in islice(iter_problems(3, split), 200):
        assert len({*problem.menu, problem.last}) == 9
        assert all(is_correct(walk(problem.start, first, problem.last), problem.prompt) for first in problem.menu)
        assert is_correct(solution, problem.prompt)
        others = [move for move in MOVES if move not in problem.menu]
        assert not any(is_correct(walk(problem.start, move, problem.last), problem.prompt) for move in others)


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "y-2",
        "y-2 27,5 y+3",
        "y-2 27,6 y+3 27,9",  # the first cell is wrong
        "y-2 27,5 y+3 27,9",  # the second one is
        "y-2 27,5 y+4 27,9",  # another last move
        "y-2 27,5 y+1 27,6",  # an offered move at the end
        "y-3 27,4 y+3 27,7",  # a move that is not offered
        "y-2 27,5 y+3 27,8 y+3",
        "y-2 27,5 y+3 27,8 y+3 27,11",
        "27,7 y-2 27,5 y+3 27,8",
    ],
)
def test_wrong_walks(completion: str) -> None:
    assert is_correct("y-2 27,5 y+3 27,8", PROMPT) and is_correct(" x~4 9,7  y+3 9,10\n", PROMPT)
    assert not is_correct(completion, PROMPT)


@pytest.mark.parametrize(
    "answer", ["", "278", "27,8", PROMPT + " y+1", PROMPT.replace("27,7", "32,7"), PROMPT.replace("x#4", "x#48")]
)
def test_an_answer_that_is_no_problem(answer: str) -> None:
    with pytest.raises(ValueError, match="expected a problem of the demo as the answer"):
        is_correct("y-2 27,5 y+3 27,8", answer)


def test_tables_are_the_permutations_that_the_models_have_learned() -> None:
    """They come from NumPy's generator: another sequence would make every table of the shipped models wrong."""
    assert all(sorted(move.images) == list(range(32)) for move in MOVES.values())
    tables = [move.images for move in MOVES.values() if move.kind == "table"]
    assert len(set(tables)) == len(tables) == 96
    assert MOVES["x#0"].images[:8] == (1, 30, 29, 8, 25, 23, 7, 28)
    assert MOVES["y#47"].images[:8] == (9, 24, 5, 25, 15, 16, 19, 7)


def test_problems_are_distinct_and_repeatable_and_the_weights_count() -> None:
    first, again = (list(islice(iter_problems(5, "train"), 3000)) for _ in range(2))
    assert first == again and len({problem.prompt for problem, _ in first}) == 3000
    assert parse_prompt(first[0][0].prompt) == first[0][0]
    kinds = [MOVES[move].kind for problem, _ in first for move in problem.menu]
    for kind, share in (("shift", 0.35), ("mirror", 0.25), ("table", 0.4)):
        assert kinds.count(kind) / len(kinds) == pytest.approx(share, abs=0.02)
    ranks = [MOVES[move].amount for problem, _ in first for move in problem.menu if MOVES[move].kind == "table"]
    weights = [(rank + 2) ** -0.7 for rank in range(48)]
    assert ranks.count(0) / len(ranks) == pytest.approx(weights[0] / sum(weights), rel=0.15)
    lasts = [MOVES[problem.last].kind for problem, _ in first]
    for kind, share in (("shift", 0.5), ("mirror", 0.4), ("table", 0.1)):
        assert lasts.count(kind) / len(lasts) == pytest.approx(share, abs=0.03)
    begins = [MOVES[solution.split()[0]].kind for _, solution in first]
    assert begins.count("table") / len(begins) == pytest.approx(0.4, abs=0.03)


def test_curated_solutions_prefer_moves_that_are_no_table() -> None:
    rng, problem = random.Random(0), parse_prompt(PROMPT)  # six of the eight are no tables
    begins = [sample_solution(problem, rng, 0.1).split()[0] for _ in range(4000)]
    tables = sum(MOVES[move].kind == "table" for move in begins)
    assert tables / len(begins) == pytest.approx(0.2 / 6.2, abs=0.01)


def test_files() -> None:
    """No test problem is a training or validation problem, and every row is as documented."""
    train, valid, test = rows("train"), rows("valid"), rows("test")
    prompts = [{row["prompt"] for row in some} for some in (train, valid, test)]
    assert [len(some) for some in prompts] == [len(train), len(valid), len(test)]
    assert not prompts[2] & (prompts[0] | prompts[1]) and not prompts[0] & prompts[1]
    assert all(row["answer"] == row["prompt"] for row in (*train, *valid, *test))
    assert all(is_correct(row["completion"], row["answer"]) for row in (*train, *valid))


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_each_word_is_one_token(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / name)
    assert sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get) == list(VOCABULARY)
    text = f"{PROMPT} y-2 27,5 y+3 27,8"
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.split()) and tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text


def test_a_lower_temperature_is_measured_beside_temperature_1() -> None:
    model = AutoModelForCausalLM.from_pretrained(DEMO / "student", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "student")
    found = evaluate_demo(model, tokenizer, rows("test")[:64], (1.0, 0.3)).metrics
    assert found["avg@8"] == evaluate_demo(model, tokenizer, rows("test")[:64]).metrics["avg@8"]
    assert found["avg@8"] < found["avg@8 T=0.3"]


def test_what_the_methods_act_on_can_change_the_answer(tmp_path: Path) -> None:
    """The properties that docs/demo.md and docs/evidence.md state of the task and its models."""
    command = ["analyze", "--config", "demo.yaml", "--token_roles", "demo", "--limit", "200"]
    assert main([*command, "--output_dir", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out/token_roles.json").read_text())
    first, totals = found["roles"]["first move"], found["totals"]
    assert min(first[term] for term in ("L_EM", "opener", "trigger")) > 60
    assert first["decisive_teacher"] > 30  # several of the moves are right, yet another one often costs the answer
    assert all(totals[term]["on_consequential"] > 95 for term in ("L_EM", "opener", "trigger", "direct"))
    records = load_dataset("parquet", data_files=str(tmp_path / "out/records/*.parquet"), split="train")
    teacher_entropy = torch.tensor(records["teacher_entropy"][:])
    assert 0.15 < (teacher_entropy > 0.8).float().mean() < 0.27  # EOPD's trigger


def test_the_student_is_far_from_its_best_when_it_samples() -> None:
    """Sampled well below greedy, and greedy well below pass@8; the first token has more than ten candidates."""
    model = AutoModelForCausalLM.from_pretrained(DEMO / "student", dtype=torch.float32)
    tokenizer, some = AutoTokenizer.from_pretrained(DEMO / "student"), rows("test")[:256]
    found = evaluate_demo(model, tokenizer, some).metrics
    assert found["avg@8"] + 15 < found["greedy"] < found["pass@8"] - 10
    prompts = torch.tensor(tokenizer([f"<user> {row['prompt']} <sol>" for row in some]).input_ids)
    with torch.no_grad():
        candidates = model(prompts).logits[:, -1].softmax(-1).topk(10).values
    assert candidates[:, -1].mean() > 0.01


@pytest.mark.parametrize(
    "row", [{"prompt": PROMPT}, {"problem": PROMPT, "answer": PROMPT}, {"prompt": [{"role": "user", "content": "x"}]}]
)
def test_other_problems_to_evaluate_on(row: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_jsonl(tmp_path / "own.jsonl", [row])
    assert main(["demo", "--eval_dataset_name", str(file), "--output_dir", str(tmp_path / "run")]) == 2
    assert f"eval_dataset_name {file}: the demo needs rows with the texts prompt and answer" in capsys.readouterr().err


def test_a_short_run_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of the demo's steps with a quarter of its batch, on 64 problems."""
    monkeypatch.setattr("tsdkd.demo.run_demo.NUM_PROBLEMS", 64)
    flags = [
        "--max_steps",
        "100",
        "--per_device_train_batch_size",
        "32",
        "--report_to",
        "none",
        "--disable_tqdm",
        "true",
    ]
    assert main(["demo", *flags, "--output_dir", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run/eval/results-demo.json").read_text())["results"]
    avg = {entry["model"]: entry["mean"] for entry in results if entry["metric"] == "avg@8"}
    assert avg["before"] + 10 < avg["after"] and avg["before"] + 20 < avg["teacher"]
