"""The token-role table of `tsdkd analyze`: shares, decisive tokens, and the user's function."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import reference as ref
from conftest import build_model, build_tokenizer, flags, make_rows, write_jsonl
from tsdkd.analysis.load import StepRecord, read_records
from tsdkd.cli import main
from tsdkd.demo.task import iter_problems
from tsdkd.demo.token_roles import assign_roles

DEMO = Path(__file__).parent.parent / "src/tsdkd/demo"
EOS, NO_ANSWER = 1, "none"
KEY = 2  # the word that alone decides, in the tests of decisive tokens
USER_CODE = f"""
def by_kind(tokens, prompt):
    assert prompt and not prompt.startswith("<")
    return ["cell" if "," in t else "move" if t.strip()[0] in "xy" else "other" for t in tokens]

def by_key(tokens, prompt):
    return ["key" if i == {KEY} else "before" if i < {KEY} else "after" for i in range(len(tokens))]

def has_key(completion, answer):
    return completion.split()[{KEY}:{KEY + 1}] == [answer]

def has_parity_of_key(completion, answer):
    word = "".join(completion.split()[{KEY}:{KEY + 1}])
    return word[1:].isdigit() and int(word[1:]) % 2 == int(answer[1:]) % 2

def all_wrong(completion, answer):
    return False

def raises(tokens, prompt): return [tokens[1000]]
def numbers(tokens, prompt): return list(range(len(tokens)))
def text(tokens, prompt): return "a" * len(tokens)
def too_short(tokens, prompt): return ["a"] * (len(tokens) - 1)
def takes_one(tokens): return tokens
NUMBER = 3
"""


@pytest.fixture(autouse=True)
def user_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_token_roles.py").write_text(USER_CODE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)


def analyze(folder: str, token_roles: str, **values: object) -> dict[str, Any]:
    """The numbers of the table, for the demo's models unless others are given."""
    assert (
        main(["analyze", "--config", "demo", "--token_roles", token_roles, *flags(output_dir=folder, **values)]) == 0
    )
    return json.loads(Path(folder, "token_roles.json").read_text())


def completions(folder: str) -> list[list[int]]:
    (record,) = read_records(Path(folder))
    return np.split(record.columns["token"], np.cumsum(record.lengths)[:-1].tolist())


def sums_by_role(record: StepRecord, options: dict[str, float]) -> dict[str, dict[str, float]]:
    """An independent float64 loop: role -> the sum of each quantity over its tokens."""
    sums: dict[str, dict[str, float]] = {}
    columns = record.columns
    for i in range(len(record.samples)):
        rows = np.flatnonzero(columns["sample"] == i)
        ours, theirs = (columns[f"{who}_entropy"][rows].astype(float).tolist() for who in ("student", "teacher"))
        top = ref.top_entropy_positions(ours, options["entropy_ratio"])
        opener = ref.opener_length(ours, options["opener_ratio"])
        for t, row in enumerate(rows):
            word = record.texts[int(columns["token"][row])].strip()
            role = "cell" if "," in word else "move" if word[0] in "xy" else "other"
            gate = ref.entropy_gap_gate(ours[t], theirs[t], options["gate_temperature"])
            quantities = {
                "tokens": 1.0,
                "L_EM": ours[t] if t in top else 0.0,
                "opener": float(t < opener),
                "trigger": float(theirs[t] > 0.8),
                "direct": gate * float(columns["divergence"][row]),
                "student_entropy": ours[t],
                "teacher_entropy": theirs[t],
            }
            of_role = sums.setdefault(role, dict.fromkeys(quantities, 0.0))
            for name, value in quantities.items():
                of_role[name] += value
    return sums


def test_shares(capsys: pytest.CaptureFixture[str]) -> None:
    options = {"opener_ratio": 0.3, "entropy_ratio": 0.2, "gate_temperature": 0.5}
    table = analyze("look", "my_token_roles:by_kind", limit=6, **options)
    (record,) = read_records(Path("look"))
    assert table["num_tokens"] == len(record.columns["token"]) and table["num_completions"] == 6
    sums = sums_by_role(record, options)
    assert table["roles"].keys() == sums.keys() == {"cell", "move", "other"}
    for role, expected in sums.items():
        found = table["roles"][role]
        for share in ("tokens", "L_EM", "opener", "trigger", "direct"):
            total = sum(of_role[share] for of_role in sums.values())
            assert found[share] == pytest.approx(100 * expected[share] / total, rel=1e-5, abs=1e-9)
        for mean in ("student_entropy", "teacher_entropy"):
            assert found[mean] == pytest.approx(expected[mean] / expected["tokens"], rel=1e-5)
    output = capsys.readouterr().out
    assert all(re.search(rf"^{role} .*{found['direct']:.1f}", output, re.M) for role, found in table["roles"].items())


def test_totals_and_the_demo_s_roles() -> None:
    table = analyze("look", "demo", limit=8)
    assert {"first move", "cell 1", "last move", "cell 2", "end"} <= table["roles"].keys()
    tried = [row for row in table["roles"].values() if row["num_tried"]]
    for share, totals in table["totals"].items():
        whole = sum(row[share] for row in tried)
        mean = sum(row[share] * row["decisive_teacher"] for row in tried) / whole
        consequential = sum(row[share] for row in tried if row["decisive_teacher"] >= 10)
        assert totals["mean_decisive"] == pytest.approx(mean)
        assert totals["on_consequential"] == pytest.approx(100 * consequential / whole)
    again = analyze("again", "demo", limit=8)
    assert again == table


def test_the_demo_s_roles_cover_a_solution() -> None:
    for (problem, solution), _ in zip(iter_problems(0, "train"), range(50), strict=False):
        tokens = [f" {word}" for word in solution.split()] + ["<eos>"]
        assert assign_roles(tokens, problem.prompt) == ["first move", "cell 1", "last move", "cell 2", "end"]


def test_tokens_at_unexpected_places_have_the_role_other() -> None:
    assert assign_roles(["27,7", "27,7", "<eos>"], "") == ["other", "cell 1", "other"]
    assert assign_roles(["x+5", "x~3", "y#4", "0,0", "0,1", "<eos>"], "")[1:] == [
        "other",
        "last move",
        "cell 2",
        "other",
        "other",
    ]
    assert assign_roles(["x+16", "32,0", "->", "<unk>"], "") == ["other"] * 4


def run_on(student: str, teacher: str, **values: object) -> dict[str, object]:
    """Options of a run on random models, whose answers are the words that the student writes at `KEY`."""
    values |= {"model_name_or_path": student, "teacher_model_name_or_path": teacher, "max_new_tokens": 8}
    values = {"grader": "my_token_roles:has_key", **values}
    rows = [{"prompt": row["prompt"]} for row in make_rows(12)]
    analyze("first", "my_token_roles:by_key", dataset_name=write_jsonl(Path("prompts.jsonl"), rows), **values)
    for row, text in zip(rows, decode(completions("first"), student), strict=True):
        words = text.split()  # 8 words if none of the tokens is special: then the word at KEY is the token at KEY
        row["answer"] = words[KEY] if len(words) == 8 else NO_ANSWER
    return {**values, "dataset_name": write_jsonl(Path("answers.jsonl"), rows)}


def decode(some: list[list[int]], model: str) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in some]


def answers() -> list[str]:
    return [json.loads(line)["answer"] for line in Path("answers.jsonl").read_text().splitlines()]


def test_one_token_decides(saved_model: Any) -> None:
    """The teacher is the student, which samples nearly greedily, so that every completion with an answer is on
    track."""
    values = run_on(saved_model(), saved_model(), temperature=0.01)
    table = analyze("look", "my_token_roles:by_key", **values)
    found = table["roles"]
    count = sum(answer != NO_ANSWER for answer in answers())
    assert [found[role]["num_tried"] for role in ("before", "key", "after")] == [KEY * count, count, 5 * count]
    for who in ("student", "teacher"):
        assert found["key"][f"decisive_{who}"] == 100.0 and found["after"][f"decisive_{who}"] == 0.0
    before = found["before"]["decisive_teacher"]
    consequential = ["key", *(["before"] if before >= 10 else [])]
    for share in ("tokens", "L_EM"):
        on = sum(found[role][share] for role in consequential)
        assert table["totals"][share]["on_consequential"] == pytest.approx(on)
        mean = found["key"][share] + found["before"][share] * before / 100
        assert table["totals"][share]["mean_decisive"] == pytest.approx(mean)


def test_tokens_are_tried_while_the_teacher_can_still_solve_it(saved_model: Any) -> None:
    folder = saved_model()
    table = analyze("look", "my_token_roles:by_key", **run_on(folder, folder, temperature=0.3))
    (record,) = read_records(Path("look"))
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = dict.fromkeys(("before", "key", "after"), 0)
    for sample, completion, answer in zip(record.samples, completions("look"), answers(), strict=True):
        for t in range(len(completion)):
            ids = completion[:t].tolist()
            while len(ids) < 8 and ids[-1:] != [EOS]:
                logits = teacher(torch.tensor([[*sample["prompt"], *ids]])).logits
                ids.append(int(logits[0, -1].argmax()))
            is_on_track = decode([ids], folder)[0].split()[KEY : KEY + 1] == [answer]
            expected["key" if t == KEY else "before" if t < KEY else "after"] += is_on_track
    assert expected["before"] and 0 < expected["key"] < len(completions("look"))
    assert {role: row["num_tried"] for role, row in table["roles"].items()} == expected
    assert table["roles"]["after"]["decisive_teacher"] == 0.0


def test_each_model_continues_in_its_own_way(saved_model: Any) -> None:
    """A student that always writes the same word writes it at `KEY`, whatever comes before; the teacher doesn't."""
    student = build_model("qwen3", 3)
    embeddings = student.get_input_embeddings().weight
    embeddings.data[:] = embeddings.data[5]
    student.save_pretrained("constant")
    build_tokenizer().save_pretrained("constant")
    values = run_on("constant", saved_model(), temperature=0.01, grader="my_token_roles:has_parity_of_key")
    before = analyze("look", "my_token_roles:by_key", **values)["roles"]["before"]
    assert 0 < before["num_tried"] < KEY * 12  # where the teacher would be right; the student always is
    assert before["decisive_student"] == 0.0 < before["decisive_teacher"]


def test_nothing_is_on_track() -> None:
    table = analyze("look", "my_token_roles:by_kind", limit=2, grader="my_token_roles:all_wrong")
    assert all(row["num_tried"] == 0 and row["decisive_teacher"] is None for row in table["roles"].values())
    assert table["totals"]["L_EM"] == {"mean_decisive": None, "on_consequential": None}


def test_without_answers(capsys: pytest.CaptureFixture[str]) -> None:
    prompts = write_jsonl(Path("prompts.jsonl"), [{"prompt": "27,7 x+5 y~3 x#4 y-2 x+9 y#0 y+1 x~4 -> y+3"}] * 2)
    table = analyze("look", "demo", dataset_name=prompts)
    assert table["totals"] is None and not any("decisive_student" in row for row in table["roles"].values())
    output = capsys.readouterr().out
    assert "no decisive columns: the data set has no answers" in output and "tried" not in output


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("my_token_roles:raises", "raised IndexError: list index out of range, for the completion of row 0"),
        ("my_token_roles:numbers", "must return a list of strings, found [0, 1, 2,"),
        ("my_token_roles:text", "must return a list of strings, found 'aaaa"),
        ("my_token_roles:too_short", "tokens, for the completion of row 0"),
        ("my_token_roles:takes_one", "must take the tokens and the prompt, found (tokens)"),
        ("my_token_roles:NUMBER", "must be a function, found 3"),
        ("my_token_roles:by_kid", "has no 'by_kid', did you mean 'by_kind'?"),
        ("my_token_roles.py:by_kind", "must be package.module:name, without a folder and without .py"),
        ("dmeo", "must be package.module:name"),
    ],
)
def test_a_function_that_fails_is_told_in_one_line(path: str, found: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["analyze", "--config", "demo", "--limit", "1", "--output_dir", "look", "--token_roles", path]
    assert main(command) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tsdkd analyze:")]
    assert line.startswith("tsdkd analyze: --token_roles: ") and found in line
    assert path.partition(":")[2] in line and not Path("look").exists()


def test_only_with_a_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", "run", "--token_roles", "demo"]) == 2
    assert capsys.readouterr().err == "tsdkd analyze: --token_roles: only with --config\n"
