"""`tsdkd eval`: benchmarks from local data, grades, tables, resumption. No network, no model of any size."""

import json
import math
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from conftest import TEMPLATE, build_tokenizer
from tsdkd.cli import main
from tsdkd.demo.task import parse_prompt, solve

pytest.importorskip("lm_eval")

from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from tsdkd.evaluation import harness
from tsdkd.evaluation.pass_at_k import pass_at_k
from tsdkd.evaluation.problem_file import ProblemFile, load_problems
from tsdkd.evaluation.scores import bootstrap_interval, paired_permutation_test
from tsdkd.evaluation.suites import SUITES, resolve_suite
from tsdkd.evaluation.tasks import CUSTOM_TASKS, build_tasks, leaf_tasks
from tsdkd.grading import is_math_equivalent

BENCHMARKS = {benchmark.name: benchmark for suite in SUITES.values() for benchmark in suite.benchmarks}


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    return TaskManager()


@pytest.mark.parametrize("name", [name for name, b in BENCHMARKS.items() if b.task not in CUSTOM_TASKS])
def test_every_task_is_in_the_installed_harness(name: str, manager: TaskManager) -> None:
    """With the paper's shots; groups down to their tasks."""
    counts = {"mmlu_stem": 19, "bbh": 27, "musr": 3, "math": 7, "mmlu_pro": 14}
    assert len(leaf_tasks(manager, BENCHMARKS[name].task)) == counts.get(name, 1)


# Local data, in each benchmark's format, and what a model that is right would say -------------------------------

Rows = dict[str, list[dict[str, Any]]]


def gsm(n: int) -> dict[str, Any]:
    return {"question": f"{n} and {n} are?", "answer": f"Add them. #### {2 * n}", "solution": f"Add. #### {2 * n}"}


def competition(n: int) -> dict[str, Any]:
    return {
        "problem": f"What is {n} + 1?",
        "solution": rf"It is $\boxed{{{n + 1}}}$.",
        "level": "1",
        "type": "Algebra",
    }


def choice(n: int) -> dict[str, Any]:
    return {"question": f"{n} + 1?", "choices": ["0", str(n + 1), "x", "y"], "answer": 1, "subject": "s"}


def many_choices(n: int, category: str) -> dict[str, Any]:
    row = {
        "question": f"{n} + 1?",
        "options": ["0", str(n + 1), "7", "8", "9", "10"],
        "answer": "B",
        "answer_index": 1,
    }
    return row | {
        "cot_content": "A: Let's think step by step. The answer is (B).",
        "category": category,
        "src": "ours",
    }


def science(n: int) -> dict[str, Any]:
    row = {"question": f"What is {n}?", "correct_answer": f"number {n}", "support": "Numbers are numbers."}
    return row | {f"distractor{i}": f"thing {i}" for i in (1, 2, 3)}


def mystery(n: int) -> dict[str, Any]:
    row = {"narrative": "There was one who did it.", "question": "Who?", "choices": str(["Ann", "Bob"])}
    return row | {"answer_index": n % 2, "answer_choice": ["Ann", "Bob"][n % 2]}


def instruction(n: int) -> dict[str, Any]:
    return {
        "key": n,
        "prompt": "Answer without a comma.",
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{}],
    }


def programming(n: int) -> dict[str, Any]:
    tests = [f"assert add({i}, {n}) == {i + n}" for i in range(3)]
    return {"task_id": n, "text": "Add two numbers.", "code": "", "test_list": tests, "test_setup_code": ""}


def graduate(n: int) -> dict[str, Any]:
    wrong = {f"Incorrect Answer {i}": f"{n + 1 + i}" for i in (1, 2, 3)}
    return {"Question": f"What is {n} + 1?", "Correct Answer": f"{n + 1}", **wrong}


def written(folder: Path, task: str, splits: Rows) -> None:
    for split, rows in splits.items():
        path = folder / task / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def some(make: Callable[[int], dict[str, Any]], count: int = 8, start: int = 0) -> list[dict[str, Any]]:
    return [make(start + n) for n in range(count)]


def fields(question: str, answer: str) -> Callable[[int], dict[str, Any]]:
    return lambda n: {question: f"What is {n} + 1?", answer: [str(n + 1)] if answer == "final_answer" else str(n + 1)}


@pytest.fixture(scope="module")
def data(manager: TaskManager, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for `--data_dir` with all benchmarks."""
    folder = tmp_path_factory.mktemp("benchmarks")
    written(folder, "gsm8k", {"train": some(gsm, start=10), "test": some(gsm)})
    written(folder, "gsm_plus", {"test": some(gsm)})
    for task in leaf_tasks(manager, "minerva_math"):
        written(folder, task, {"train": some(competition, 2, 20), "test": some(competition, 2)})
    for task in leaf_tasks(manager, "mmlu_stem"):
        written(folder, task, {"dev": some(choice, 5, 10), "test": some(choice, 1)})
    for task in leaf_tasks(manager, "mmlu_pro"):
        category = task.removeprefix("mmlu_pro_").replace("_", " ")
        rows = [many_choices(n, category) for n in range(6)]
        written(folder, task, {"validation": rows, "test": rows[:2]})
    for task in leaf_tasks(manager, "bbh_cot_fewshot"):
        written(folder, task, {"test": [{"input": "Is it so?", "target": "yes"}]})
    for task in leaf_tasks(manager, "leaderboard_musr"):
        written(folder, task, {task.removeprefix("leaderboard_musr_"): some(mystery, 2)})
    written(folder, "sciq", {"train": some(science, 2), "validation": some(science, 2), "test": some(science)})
    written(folder, "ifeval", {"train": some(instruction, 4)})
    written(folder, "mbpp_sandboxed", {"test": some(programming, 4)})
    written(folder, "gpqa_diamond", {"train": some(graduate)})
    for name, split, question, answer in [
        ("math500", "test", "problem", "answer"),
        ("amc23", "test", "question", "answer"),
        ("minerva", "test", "question", "answer"),
        ("olympiadbench", "test", "question", "final_answer"),
        ("aime24", "train", "problem", "answer"),
        ("aime25", "test", "problem", "answer"),
    ]:
        written(folder, name, {split: some(fields(question, answer))})
    return folder


class Oracle(LM):
    """Says what it is told to, about each item; finds the options likelier that it is told to."""

    tokenizer_name = "oracle"

    def __init__(self, says: Callable[[dict[str, Any]], str], prefers: Callable[[dict[str, Any], str], bool]) -> None:
        super().__init__()
        self.says, self.prefers = says, prefers
        self.prompts: list[str] = []

    def generate_until(self, requests: Any) -> list[str]:
        self.prompts += [request.args[0] for request in requests]
        return [self.says(request.doc) for request in requests]

    def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
        self.prompts += [request.args[0] for request in requests]
        return [(0.0 if self.prefers(r.doc, r.args[1].strip()) else -9.0, True) for r in requests]

    def loglikelihood_rolling(self, requests: Any) -> list[float]:
        raise NotImplementedError


def letter_of(doc: dict[str, Any], prompt: str) -> str:
    line = next(line for line in prompt.splitlines() if line.endswith(f") {doc['Correct Answer']}"))
    return line[1]


def walk_of(prompt: str) -> str:
    """The walk that begins with the move that the prompt offers last."""
    problem = parse_prompt(prompt)
    return solve(problem, problem.menu[-1])


ADD = "def add(a, b):\n    return a + b\n"
# benchmark -> what a model that is right says, or prefers
RIGHT: dict[str, Any] = {
    "gsm8k": lambda doc: f" So. {doc['answer'].partition('. ')[2]}",
    "gsm_plus": lambda doc: f" So. {doc['solution'].partition('. ')[2]}",
    "math": lambda doc: f" Final Answer: The final answer is ${doc['answer']}$. I hope it is correct.",
    "mbpp": lambda doc: ADD,
    "ifeval": lambda doc: "Yes.",
    "mmlu_stem": lambda doc, option: option == "B",
    "mmlu_pro_math": lambda doc: " The answer is (B).",
    "mmlu_pro": lambda doc: " The answer is (B).",
    "sciq": lambda doc, option: option == doc["correct_answer"],
    "bbh": lambda doc: " So the answer is yes.",
    "musr": lambda doc, option: option == doc["answer_choice"],
    **dict.fromkeys(["math500", "aime24"], lambda doc: rf"\boxed{{{doc['answer']}.0}}"),
    **dict.fromkeys(["aime25", "amc23", "minerva"], lambda doc: rf"is $\boxed{{{doc['answer']}}}$."),
    "olympiadbench": lambda doc: rf"\boxed{{{doc['final_answer'][0]}}}",
    **dict.fromkeys(["demo", "demo_greedy"], lambda doc: walk_of(doc["answer"])),
}


def asked(name: str, data: Path | None, lm: LM, samples: int = 2) -> list[Any]:
    benchmark = BENCHMARKS[name]
    count = samples if benchmark.num_samples > 1 else 1
    tasks = build_tasks(benchmark, count, 8192, data)
    docs = {t.task_name: list(range(min(4, len(t.eval_docs)))) for t in tasks}
    return [item for t in tasks for item in harness.evaluate_docs(lm, t, docs[t.task_name], benchmark, False, 0)[0]]


@pytest.mark.parametrize("name", RIGHT)
def test_right_and_wrong_answers(name: str, data: Path) -> None:
    """From local data in the benchmark's format; right is right, wrong is wrong, item by item."""
    place = None if name.startswith("demo") else data
    right = RIGHT[name]
    wrong = {"ifeval": "No, never, no.", "mbpp": "def add(a, b):\n    return None"}.get(
        name, "I can't say. answer none"
    )
    good = asked(name, place, Oracle(right, right))
    bad = asked(name, place, Oracle(lambda doc: wrong, lambda doc, option: not right(doc, option)))
    assert good and all(score == 1.0 for item in good for score in item.scores)
    assert bad and all(score == 0.0 for item in bad for score in item.scores)
    assert {len(item.scores) for item in good} == {2 if BENCHMARKS[name].num_samples > 1 else 1}


def test_multiple_choice_is_shuffled_and_graded_by_letter(data: Path) -> None:
    seen: list[str] = []

    class Reader(Oracle):
        def generate_until(self, requests: Any) -> list[str]:
            letters = [letter_of(r.doc, r.args[0]) for r in requests]
            seen.extend(letters)
            return [rf"Thus \boxed{{{letter}}}" for letter in letters]

    items = asked("gpqa_diamond", data, Reader(str, bool))
    assert all(score == 1.0 for item in items for score in item.scores)
    assert len(set(seen)) > 1


def test_prompts_are_the_papers(data: Path) -> None:
    """EOPD's sentence at the end; TSD-KD's shots."""
    oracle = Oracle(lambda doc: "", lambda doc, option: False)
    asked("math500", data, oracle)
    sentence = "Please reason step by step, and put your final answer within \\boxed{}."
    assert oracle.prompts[0] == f"What is 0 + 1?\n{sentence}"
    for name, word in [("gsm8k", "Question:"), ("math", "Problem:"), ("mmlu_stem", "Answer:"), ("bbh", "Q:")]:
        oracle.prompts.clear()
        asked(name, data, oracle)
        assert {prompt.count(word) for prompt in oracle.prompts} == {BENCHMARKS[name].num_fewshot + 1}, name


def test_mathematics_is_compared_by_meaning() -> None:
    assert is_math_equivalent(r"so \boxed{\frac{1}{2}}", "0.5")
    assert is_math_equivalent(r"\boxed{\left(3, \frac{\pi}{2}\right)}", r"\left( 3, \frac{\pi}{2} \right)")
    assert is_math_equivalent(r"first \boxed{3}, no, \boxed{4}", "4") and not is_math_equivalent(r"\boxed{3}", "4")
    assert not is_math_equivalent("", "4")


# Numbers -------------------------------------------------------------------------------------------------------------


def test_pass_at_k_counts_subsets() -> None:
    """Against all subsets of k samples, for every number of right ones."""
    for right in range(7):
        scores = [1.0] * right + [0.0] * (6 - right)
        for k in range(1, 7):
            expected = np.mean([any(subset) for subset in combinations(scores, k)])
            assert pass_at_k(np.array([sum(scores)]), len(scores), k)[0] == pytest.approx(expected, abs=1e-12)
    assert pass_at_k(np.array([3]), 128, 128)[0] == 1.0


def test_intervals_cover_the_mean() -> None:
    """Of 200 samples of 60 coins about 95 % have the true mean in their interval."""
    rng = random.Random(0)
    covered = 0
    for seed in range(200):
        low, high = bootstrap_interval(np.array([float(rng.random() < 0.4) for _ in range(60)]), seed)
        covered += low <= 0.4 <= high
    assert 0.90 <= covered / 200 <= 0.99
    assert bootstrap_interval(np.ones(5)) == (1.0, 1.0)


def test_right_and_wrong_items_are_tested_as_by_mcnemar() -> None:
    """Against the exact binomial test of the items on which two models differ; the order doesn't matter."""
    for wins, losses, both in [(0, 0, 9), (1, 0, 3), (6, 0, 10), (2, 9, 4), (12, 1, 0), (60, 35, 100), (80, 75, 900)]:
        ours = np.array([1.0] * wins + [0.0] * losses + [1.0] * both)
        theirs = np.array([0.0] * wins + [1.0] * losses + [1.0] * both)
        expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
        p = paired_permutation_test(ours, theirs)
        exact = wins + losses <= 13
        assert p == pytest.approx(expected, abs=1e-9 if exact else 6 * (expected / 10_000) ** 0.5)
        assert paired_permutation_test(theirs, ours) == pytest.approx(p, abs=1e-9 if exact else 0.02)


def test_scores_in_between_are_tested_by_all_sign_patterns() -> None:
    rng = random.Random(0)
    for _ in range(5):
        ours, theirs = ([rng.randrange(9) / 8 for _ in range(10)] for _ in range(2))
        differences = [a - b for a, b in zip(ours, theirs, strict=True)]
        sums = [sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in product((1, -1), repeat=10)]
        as_extreme = np.mean([abs(total) >= abs(sum(differences)) - 1e-9 for total in sums])
        assert paired_permutation_test(np.array(ours), np.array(theirs)) == pytest.approx(as_extreme)


def test_p_values_are_calibrated() -> None:
    """Of models that are equally good, one in twenty pairs has p < 0.05."""
    rng = np.random.default_rng(0)
    pairs = (((rng.random(40) < 0.5) * 1.0, (rng.random(40) < 0.5) * 1.0) for _ in range(300))
    assert 0.01 < np.mean([paired_permutation_test(*pair) < 0.05 for pair in pairs]) < 0.09


# The command ---------------------------------------------------------------------------------------------------------

DEMO = ["tsdkd://demo/student", "teacher=tsdkd://demo/teacher", "--suite", "demo"]


def ran(out: Path, *flags: str, models: list[str] = DEMO) -> int:
    return main(["eval", *models, "--output_dir", str(out), "--limit", "12", "--samples", "2", *flags])


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_two_models_in_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And nothing is asked twice: a second call adds what the first one lacks, to the same result."""
    out = tmp_path / "out"
    assert ran(out, "--batch_size", "16") == 0
    table = (out / "results-demo.md").read_text()
    assert table in capsys.readouterr().out
    assert "| student |" in table and "difference from student" in table and "demo pass@2" in table
    results = json.loads((out / "results-demo.json").read_text())["results"]
    teacher = {e["metric"]: e for e in results if e["model"] == "teacher" and e["benchmark"] == "demo"}
    student = {e["metric"]: e for e in results if e["model"] == "student" and e["benchmark"] == "demo"}
    assert teacher["avg@2"]["mean"] > student["avg@2"]["mean"] and teacher["avg@2"]["p"] < 0.05
    assert teacher["avg@2"]["low"] <= teacher["avg@2"]["mean"] <= teacher["avg@2"]["high"]
    items = rows(out / "teacher/demo.jsonl")
    assert teacher["avg@2"]["mean"] == pytest.approx(100 * np.mean([row["scores"] for row in items]))

    assert ran(out, "--samples", "8", "--k", "5,8", "--output_dir", str(tmp_path / "k")) == 0
    assert "demo pass@5 | demo pass@8 |" in (tmp_path / "k/results-demo.md").read_text()
    right = [sum(row["scores"]) for row in rows(tmp_path / "k/teacher/demo.jsonl")]
    results = json.loads((tmp_path / "k/results-demo.json").read_text())["results"]
    (five,) = [e["mean"] for e in results if e["model"] == "teacher" and e["metric"] == "pass@5"]
    assert five == pytest.approx(100 * np.mean([1 - math.comb(8 - int(c), 5) / math.comb(8, 5) for c in right]))
    capsys.readouterr()

    file = out / "teacher/demo_greedy.jsonl"
    whole = file.read_text()
    lines = whole.splitlines(keepends=True)
    file.write_text("".join(lines[:7]) + lines[7][:20])  # a kill in the middle of a line
    sampled = out / "teacher/demo.jsonl"
    samples = sampled.read_text()
    sampled.write_text(samples[:-50])
    assert ran(out, "--batch_size", "16") == 0
    assert sorted(file.read_text().splitlines()) == sorted(whole.splitlines())
    assert sampled.read_text() == samples
    assert (out / "results-demo.md").read_text() == table


def test_published_rows_are_beside_their_pair(data: Path, tmp_path: Path) -> None:
    """A run's student belongs to the model that it started from."""
    from tsdkd.evaluation.results import BenchmarkResult, write_results

    (tmp_path / "tsdkd_config.yaml").write_text("model_name_or_path: Qwen/Qwen2.5-1.5B-Instruct\n")
    measured = [BenchmarkResult("mine", BENCHMARKS[name], np.ones((4, 1))) for name in ("gsm8k", "sciq")]
    table = write_results(measured, {"mine": str(tmp_path)}, "mine", tmp_path, "tsd-kd").read_text()
    assert "TSD-KD, Tables 1 and 2" in table and "| TSD-KD | 60.1 | 93.0 |" in table
    (tmp_path / "tsdkd_config.yaml").write_text("[")
    assert (
        "Tables 1 and 2"
        not in write_results(measured, {"mine": str(tmp_path)}, "mine", tmp_path, "tsd-kd").read_text()
    )
    assert "Tables 1 and 2" not in write_results(measured, {"mine": "gpt2"}, "mine", tmp_path, "tsd-kd").read_text()


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        (["--suite", "tsd-kd"], "--allow_code_execution"),
        (["--benchmarks", "demmo"], "did you mean 'demo'"),
        (["--suit", "demo"], "--suit: unknown flag, did you mean '--suite'?"),
        (["--answer_column", "gold"], "--answer_column: only with a file of problems"),
        (["--grader", "mine:grade"], "--grader: only with a file of problems"),
        (["--baseline", "nobody"], "--baseline: must be one of"),
        (["--data_dir", "nowhere"], "--data_dir: no such directory"),
        (["--k", "3"], "--k: pass@3 needs at least 3 samples, found 2"),
        (["--model_args", "pretrained=x"], "--model_args: pretrained can't be set here"),
        (["--model_args", "foo"], "--model_args: expected name=value, found 'foo'"),
    ],
)
def test_bad_input(changes: list[str], found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, exit code 2, before a model is loaded and with nothing written."""
    assert ran(tmp_path / "out", *changes) == 2
    error = capsys.readouterr().err
    assert found in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ([], "--suite: missing; choose tsd-kd, eopd, ood, demo, or name benchmarks or your own file"),
        (["--benchmarks", "gsm9k"], "--benchmarks: unknown 'gsm9k', did you mean 'gsm8k'? (tsd-kd has gsm8k, "),
        (["--benchmarks", "gsm8k,aime24"], "gsm8k is in tsd-kd, aime24 is in eopd; evaluate one suite at a time"),
        (["--benchmarks", "demo"], "demo is in demo and other; their settings differ, choose one with --suite"),
        (["--benchmarks", "org/name"], "--benchmarks: there is no file 'org/name'"),
        (["--benchmarks", "mbpp"], "MBPP: grading runs the programs"),
    ],
)
def test_a_suite_that_benchmarks_do_not_tell(
    flags: list[str], found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if flags[1:] == ["demo"]:
        monkeypatch.setitem(SUITES, "other", replace(SUITES["demo"], name="other", apply_chat_template=False))
    assert ran(tmp_path / "out", *flags, models=["tsdkd://demo/student"]) == 2
    error = capsys.readouterr().err
    assert found in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_benchmark_tells_its_suite_and_one_sample_is_enough(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sample: avg@1 is all there is, under that name; `--k 1` asks for nothing else."""
    out, student = tmp_path / "out", ["tsdkd://demo/student"]
    flags = ["--benchmarks", "aime24", "--data_dir", str(data), "--max_new_tokens", "8", "--output_dir", str(out)]
    assert ran(out, *flags, "--samples", "1", "--k", "1", "--limit", "1", models=student) == 0
    table = (out / "results-eopd.md").read_text()
    assert table.startswith("|  | AIME24 avg@1 |\n") and "| student | 0.0 [0.0, 0.0] |" in table
    (entry,) = json.loads((out / "results-eopd.json").read_text())["results"]
    assert (entry["metric"], entry["items"], entry["low"], entry["high"]) == ("avg@1", 1, 0.0, 0.0)

    both = ["tsdkd://demo/student", "teacher=tsdkd://demo/teacher"]
    assert ran(tmp_path / "demo", "--benchmarks", "demo", "--k", "1", models=both) == 0
    table = (tmp_path / "demo/results-demo.md").read_text()
    assert table.startswith("|  | demo avg@2 |\n") and "avg@n is the mean over n samples, which is pass@1" in table
    assert ran(tmp_path / "one", "--benchmarks", "demo", "--samples", "1", models=both) == 0
    table = (tmp_path / "one/results-demo.md").read_text()
    assert table.startswith("|  | demo avg@1 |\n") and "| difference from student | demo avg@1 |" in table


# A file of one's own -------------------------------------------------------------------------------------------------

OWN = ["tsdkd://demo/student", "teacher=tsdkd://demo/teacher"]


def demo_rows(count: int = 12) -> list[dict[str, Any]]:
    lines = (resources.files("tsdkd") / "demo/test.jsonl").read_text().splitlines()[:count]
    return [json.loads(line) for line in lines]


def own_file(path: Path, some_rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in some_rows))
    return str(path)


WALKS = ["--grader", "tsdkd.demo.task:is_correct", "--max_new_tokens", "8"]  # as in the demo's suite


def ran_own(out: Path, file: str, *flags: str, models: list[str] = OWN) -> int:
    return ran(out, "--benchmarks", file, "--max_new_tokens", "64", *flags, models=models)


def test_a_file_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Is a benchmark: as many items are right as of the same problems in the demo's suite, greedily item by item."""
    out, file = tmp_path / "out", own_file(tmp_path / "mine.jsonl", demo_rows())
    assert ran_own(out, file, *WALKS) == 0
    printed, errors = capsys.readouterr()
    assert "mine, greedy" not in errors  # no progress bars: this isn't a terminal
    table = (out / "results-mine.md").read_text()
    assert table in printed and "Settings of mine: backend hf, chat template yes, max_new_tokens 8" in table
    assert table.startswith("|  | mine, greedy | mine avg@2 | mine pass@2 |") and "(p = " in table
    assert "wrote results-mine.md, results-mine.json and all items to " in printed
    assert f"<user> {demo_rows()[0]['prompt']} <sol>" in printed
    assert ran(tmp_path / "demo") == 0
    for model in ("student", "teacher"):
        own, demo = (
            rows(folder / model / f"{name}_greedy.jsonl")
            for folder, name in ((out, "mine"), (tmp_path / "demo", "demo"))
        )
        assert [row["responses"] for row in own] == [row["responses"] for row in demo]
        assert [row["scores"] for row in own] == [row["scores"] for row in demo]
    results = {
        (e["model"], e["metric"]): e["mean"] for e in json.loads((out / "results-mine.json").read_text())["results"]
    }
    assert results["teacher", "avg@2"] > results["student", "avg@2"]

    items = out / "teacher/mine.jsonl"
    whole = items.read_text()
    items.write_text("".join(whole.splitlines(keepends=True)[:5]))
    assert ran_own(out, file, *WALKS) == 0
    assert items.read_text().splitlines()[:5] == whole.splitlines()[:5] and len(rows(items)) == 12
    capsys.readouterr()
    own_file(tmp_path / "mine.jsonl", [*demo_rows()[1:], demo_rows()[0]])
    assert ran_own(out, file, *WALKS) == 2
    assert "data was" in capsys.readouterr().err


def test_conversations_numbers_and_other_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A prompt may be messages, also with a solution at the end; an answer may be a number, in any readable format."""
    problems = [{"prompt": row["prompt"], "answer": str(number)} for number, row in enumerate(demo_rows(4))]
    chats = [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": "answer 1"}]}
        | {"gold": float(row["answer"])}
        for row in problems
    ]
    student = OWN[:1]
    (tmp_path / "table.csv").write_text(
        "".join(["q,gold\n", *(f'"{row["prompt"]}",{row["answer"]}\n' for row in problems)])
    )
    plain = own_file(tmp_path / "plain.jsonl", problems)
    chat = own_file(tmp_path / "chat.json", chats)
    table = str(tmp_path / "table.csv")
    gold = ["--answer_column", "gold"]
    assert ran_own(tmp_path / "out", plain, models=student) == 0
    assert ran_own(tmp_path / "out", chat, *gold, models=student) == 0
    assert ran_own(tmp_path / "out", f"{table},{chat}", "--prompt_column", "q", *gold, models=student) == 2
    assert "chat.json has no column 'q'" in capsys.readouterr().err
    assert ran_own(tmp_path / "out", table, "--prompt_column", "q", *gold, models=student) == 0
    assert {path.name for path in (tmp_path / "out").glob("*.md")} == {
        f"results-{n}.md" for n in ("plain", "chat", "table")
    }
    greedy = [rows(tmp_path / f"out/student/{name}_greedy.jsonl") for name in ("plain", "chat", "table")]
    assert [[row["scores"] for row in some] for some in greedy] == [[row["scores"] for row in greedy[0]]] * 3
    assert [[row["responses"] for row in some] for some in greedy] == [[row["responses"] for row in greedy[0]]] * 3

    turns = [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2"},
        {"role": "user", "content": "w3"},
    ]
    several = own_file(tmp_path / "several.jsonl", [{"prompt": turns, "answer": 1}])
    assert ran_own(tmp_path / "turns", several, "--apply_chat_template", "false", models=student) == 2
    assert "row 0 isn't a single user message" in capsys.readouterr().err
    assert not (tmp_path / "turns").exists()
    assert ran_own(tmp_path / "turns", several, models=student) == 0
    assert all(word in prompt(tmp_path / "turns", "student", "several") for word in ("w1", "w2", "w3"))
    assert ran_own(tmp_path / "text", plain, "--apply_chat_template", "false", models=student) == 0
    assert prompt(tmp_path / "text", "student", "plain") == problems[0]["prompt"]


def test_a_grader_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the current directory; its scores aren't mixed with math-verify's, and its mistakes are told in a line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_graders.py").write_text(
        "def contains(completion, answer):\n    return f' {answer} ' in completion\n"
        "def fails(completion, answer):\n    raise KeyError('nothing')\n"
        "def says(completion, answer):\n    return 'yes'\n"
        "number = 3\n"
    )
    problems = [row | {"answer": row["prompt"].split()[-1]} for row in demo_rows(4)]  # the last move
    file = own_file(tmp_path / "mine.jsonl", problems)
    student, out = OWN[:1], tmp_path / "out"
    assert ran_own(out, file, "--grader", "my_graders:contains", models=student) == 0
    for row in rows(out / "student/mine.jsonl"):
        answer = problems[row["doc_id"]]["answer"]
        assert row["scores"] == [float(f" {answer} " in text) for text in row["responses"]]
    capsys.readouterr()
    assert ran_own(out, file, models=student) == 2
    assert "grader was 'my_graders:contains', now None" in capsys.readouterr().err
    source = tmp_path / "my_graders.py"
    source.write_text(source.read_text().replace("return f' {answer} ' in", "return f' {answer} ' not in"))
    assert ran_own(out, file, "--grader", "my_graders:contains", models=student) == 2
    assert "has items of other settings: grader_source was '" in capsys.readouterr().err
    for name, found in [
        ("my_graders:fails", "my_graders:fails raised KeyError: 'nothing'"),
        ("my_graders:says", "my_graders:says returned 'yes', expected True or False"),
        ("my_graders:number", "must be a function, found 3"),
        ("my_graders:nothing", "has no 'nothing'"),
        ("no_such_module:f", "there is no module 'no_such_module'"),
        ("my_graders", "found 'my_graders'"),
    ]:
        assert ran_own(tmp_path / "bad", file, "--grader", name, models=student) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("tsdkd eval: grader: ") and found in error


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("none.jsonl", None, "there is no file"),
        ("org/name", None, "there is no file"),
        ("empty.jsonl", "", "empty.jsonl"),
        ("damaged.jsonl", '{"prompt": "a", "answer": 1}\n{"prompt"', "can't be read"),
        ("text.txt", "What?", "must end in"),
        (
            "a.jsonl",
            '{"question": "a", "answer": 1}',
            "--prompt_column: {} has no column 'prompt' or 'messages'; it has 'question', 'answer'; set --",
        ),
        (
            "b.jsonl",
            '{"prompt": "a", "gold": 1}',
            "--answer_column: {} has no column 'answer'; it has 'prompt', 'gold'",
        ),
        ("c.jsonl", '{"prompt": "a", "answer": 1}\n{"prompt": " ", "answer": 1}', "row 1: no prompt"),
        ("d.jsonl", '{"prompt": "a", "answer": null}', "row 0: answer must be text or a number, found None"),
        (
            "h.jsonl",
            f'{{"prompt": "a", "answer": 1{"0" * 5000}}}',
            "row 0: answer must be text or a number, found inf",
        ),
        ("i.jsonl", '{"prompt": "a", "answer": true}', "row 0: answer must be text or a number, found True"),
        ("e.jsonl", '{"prompt": "a", "answer": ["1"]}', "row 0: answer must be text or a number, found ['1']"),
        ("f.jsonl", '{"prompt": [{"role": "user"}], "answer": "1"}', "row 0: no prompt: prompt must hold messages"),
        ("g h.jsonl", '{"prompt": "a", "answer": 1}', "its name must have letters"),
        ("gsm8k.jsonl", '{"prompt": "a", "answer": 1}', "another benchmark is called 'gsm8k'"),
        *((f"{name}.jsonl", '{"prompt": "a", "answer": 1}', f"a suite is called {name!r}") for name in SUITES),
        ("a,b.jsonl", '{"prompt": "a", "answer": 1}', "commas separate files"),
        ("folder.jsonl/", None, "folder.jsonl"),
    ],
)
def test_a_file_that_cannot_be_used(
    name: str, content: str | None, found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Is told in one line, before a model is loaded and with nothing written."""
    if content is not None:
        (tmp_path / name).write_text(content)
    elif name.endswith("/"):
        (tmp_path / name).mkdir()
    assert ran_own(tmp_path / "out", f"{tmp_path}/{name}", models=OWN[:1]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    is_column = found.startswith(("--prompt_column", "--answer_column"))
    assert error.startswith("tsdkd eval: " if is_column else "tsdkd eval: --benchmarks: ")
    assert found.format(tmp_path / name) in error
    assert not (tmp_path / "out").exists()


def test_numbers_are_written_out(tmp_path: Path) -> None:
    """math-verify doesn't read exponents."""
    numbers = [0.00005, 1e22, -2.5, 3.0, 7]
    file = own_file(tmp_path / "mine.jsonl", [{"prompt": "w1", "answer": number} for number in numbers[:4]])
    answers = load_problems(ProblemFile(file))["answer"]
    assert answers == ["0.00005", "10000000000000000000000", "-2.5", "3.0"]
    assert all(is_math_equivalent(f"\\boxed{{{answer}}}", answer) for answer in answers)
    assert not is_math_equivalent("\\boxed{5}", answers[0])
    file = own_file(tmp_path / "whole.jsonl", [{"prompt": "w1", "answer": numbers[4]}])
    assert load_problems(ProblemFile(file))["answer"] == ["7"]


def test_results_of_different_files_have_different_names() -> None:
    sets = [["a.jsonl", "b.jsonl"], ["a+b.jsonl"], ["a.jsonl", "b+c.jsonl"], ["a+b.jsonl", "c.jsonl"]]
    sets += [[f"{'x' * 70}.jsonl", f"{'y' * 70}{i}.jsonl"] for i in range(2)]
    names = [resolve_suite(None, files).name for files in sets]
    assert len(set(names)) == len(names) and names[0] == "a+b" and all(len(name) <= 100 for name in names)


def test_what_a_file_cannot_be_combined_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = own_file(tmp_path / "mine.jsonl", demo_rows(2))
    for flags, found in [
        (["--suite", "demo"], "can't be combined with --suite demo"),
        (["--benchmarks", f"{file},demo"], "can't be combined with benchmark demo"),
        (["--benchmarks", f"{file},{file}"], "another benchmark is called 'mine'"),
        (["--data_dir", str(tmp_path)], "--data_dir: it replaces the data of a suite"),
    ]:
        assert ran_own(tmp_path / "out", file, *flags) == 2
        error = capsys.readouterr().err
        assert found in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_missing_models_and_data(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ran(tmp_path / "a", models=["nowhere/at-all", "--suite", "demo"]) == 2
    assert "nowhere/at-all" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert ran(tmp_path / "b", "--suite", "eopd", "--data_dir", str(tmp_path / "empty")) == 2
    assert "math500/<split>.jsonl" in capsys.readouterr().err
    assert ran(tmp_path / "c", models=["a=x", "a=y", "--suite", "demo"]) == 2
    assert "two are called 'a'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gsm8k", "sciq", "aime24", "mmlu_stem"])
def test_rows_of_another_shape(name: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Are found before a model is loaded."""
    suite = "eopd" if name == "aime24" else "tsd-kd"
    shutil.copytree(data, tmp_path / "data")
    for file in (tmp_path / "data").rglob("*.jsonl"):
        file.write_text(file.read_text().replace('"answer"', '"anwser"').replace('"correct_answer"', '"right"'))
    flags = ["--suite", suite, "--benchmarks", name, "--data_dir", str(tmp_path / "data")]
    assert ran(tmp_path / "out", *flags, models=["tsdkd://demo/student"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert str(tmp_path / "data") in error and BENCHMARKS[name].title in error


@pytest.mark.parametrize("tests", [["assert True", 1, "x"], [["assert True"]] * 3, [{"a": 1}] * 3])
def test_tests_that_are_no_text(tests: list, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Are found before a model is loaded, too, and not when a program is graded."""
    written(tmp_path, "mbpp_sandboxed", {"test": [{**programming(0), "test_list": tests}] * 4})
    flags = ["--suite", "tsd-kd", "--benchmarks", "mbpp", "--allow_code_execution", "--data_dir", str(tmp_path)]
    assert ran(tmp_path / "out", *flags, models=["tsdkd://demo/student"]) == 2
    assert "MBPP" in capsys.readouterr().err.splitlines()[-1]


CUT = {
    "empty": lambda lines: [],
    "not JSON": lambda lines: ["not json", *lines[1:]],
    "a list": lambda lines: ["[1, 2]", *lines[1:]],
    "cut off": lambda lines: [*lines[:-1], lines[-1][:9]],
    "a row without a question": lambda lines: [lines[0], lines[1].replace("question", "qestion"), *lines[2:]],
    "a row without an answer": lambda lines: [*lines[:2], json.dumps(json.loads(lines[2]) | {"answer": None})],
    "too few examples": lambda lines: lines[:3],
}


@pytest.mark.parametrize(
    ("how", "split"), [*((how, "train") for how in CUT), *((how, "test") for how in CUT if how != "too few examples")]
)
def test_damaged_local_data(
    how: str, split: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data / "gsm8k", tmp_path / "data/gsm8k")
    file = tmp_path / f"data/gsm8k/{split}.jsonl"
    file.write_text("\n".join(CUT[how](file.read_text().splitlines())))
    flags = ["--suite", "tsd-kd", "--benchmarks", "gsm8k", "--data_dir", str(tmp_path / "data")]
    assert ran(tmp_path / "out", *flags, models=["tsdkd://demo/student"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert str(tmp_path / "data") in error and error.startswith("tsdkd eval:")


def test_changed_local_data_is_not_mixed(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(data / "aime24", tmp_path / "data/aime24")
    flags = ["--suite", "eopd", "--benchmarks", "aime24", "--data_dir", str(tmp_path / "data")]
    flags += ["--max_new_tokens", "8"]
    assert ran(tmp_path / "out", *flags, models=["tsdkd://demo/student"]) == 0
    file = tmp_path / "data/aime24/train.jsonl"
    file.write_text(file.read_text().replace("+ 1?", "+ 2?"))
    assert ran(tmp_path / "out", *flags, models=["tsdkd://demo/student"]) == 2
    assert "data was" in capsys.readouterr().err


def test_output_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = ["tsdkd://demo/student", "--suite", "demo", "--benchmarks", "demo"]
    for number, name in enumerate(("student/demo.jsonl", "results-demo.md")):
        (tmp_path / f"{number}" / name).mkdir(parents=True)
        assert ran(tmp_path / f"{number}", models=one) == 2
        assert str(tmp_path / f"{number}" / name) in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "student").write_text("a file")
    assert ran(tmp_path, models=one) == 2
    assert str(tmp_path / "student") in capsys.readouterr().err.splitlines()[-1]


def test_a_model_without_a_chat_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(resources.files("tsdkd") / "demo/student", tmp_path / "base")
    (tmp_path / "base/chat_template.jinja").unlink()
    both = ["tsdkd://demo/student", str(tmp_path / "base"), "--suite", "demo"]
    assert ran(tmp_path / "out", models=both) == 2
    assert "--apply_chat_template: base has no chat template" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert ran(tmp_path / "out", "--apply_chat_template", "false", models=both) == 0


def test_a_context_that_is_too_short(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--suite", "eopd", "--benchmarks", "aime24", "--data_dir", str(data)]
    assert ran(tmp_path, *flags, models=["tsdkd://demo/student"]) == 2
    assert "the context of student has only 128; set a lower --max_new_tokens" in capsys.readouterr().err
    greedy = ["tsdkd://demo/student", "--suite", "tsd-kd", "--benchmarks", "gsm8k", "--data_dir", str(data)]
    assert ran(tmp_path, models=greedy) == 2
    assert "the context of student has only 128; leave it out" in capsys.readouterr().err
    assert ran(tmp_path, *flags, "--max_new_tokens", "8", models=["tsdkd://demo/student"]) == 0


# Prompts -------------------------------------------------------------------------------------------------------------

THINKS = TEMPLATE + "{% if enable_thinking is defined and enable_thinking is false %}w51 {% endif %}{{ mood }}"


@pytest.fixture
def thinker(saved_model: Callable[..., str], tmp_path: Path) -> Path:
    """A model whose chat template knows `enable_thinking`, as Qwen3's does, and something else."""
    folder = Path(shutil.copytree(saved_model("qwen3", 0), tmp_path / "thinker"))
    tokenizer = build_tokenizer()
    tokenizer.chat_template = THINKS
    tokenizer.save_pretrained(str(folder))
    return folder


def run_of(model: Path, folder: Path, **config: Any) -> str:
    """A folder as a run leaves it."""
    shutil.copytree(model, folder)
    (folder / "tsdkd_config.yaml").write_text(json.dumps({"method": "eopd", **config}))
    return str(folder)


def prompt(out: Path, model: str, benchmark: str = "aime24") -> str:
    return (out / model / f"{benchmark}.prompt.txt").read_text()


def test_prompts_are_rendered_as_in_training(
    thinker: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run's student as the run's settings say; other models without thinking in EOPD's suites, if their template
    knows it; and everybody can see it."""
    out, suite = tmp_path / "out", ["--suite", "eopd", "--benchmarks", "aime24", "--data_dir", str(data)]
    suite += ["--max_new_tokens", "4"]
    models = [str(thinker), "plain=tsdkd://demo/student"]
    models += [run_of(thinker, tmp_path / "mood", chat_template_kwargs={"mood": "w7"})]
    models += [run_of(thinker, tmp_path / "bare", chat_template_source="none")]
    assert ran(out, *suite, models=models) == 0
    sentence = "Please reason step by step, and put your final answer within \\boxed{}."
    question = f"What is 0 + 1?\n{sentence}"
    asked = {"thinker": "w51 ", "mood": "w7"}
    for name, mark in asked.items():
        assert prompt(out, name) == f"<user> {question} <assistant> {mark}"
    assert prompt(out, "bare") == question and "w51" not in prompt(out, "plain")
    printed = capsys.readouterr().out
    assert all(prompt(out, name) in printed for name in ("thinker", "plain", "mood", "bare"))

    other = tmp_path / "other"
    assert ran(other, *suite, "--model_args", "enable_thinking=none", models=models[:2]) == 0
    assert "w51" not in prompt(other, "thinker")
    assert ran(tmp_path / "true", *suite, "--apply_chat_template", "true", models=models[3:]) == 0
    assert prompt(tmp_path / "true", "bare") == f"<user> {question} <assistant> "


def test_a_changed_rendering_is_not_mixed(
    thinker: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With items that are there; and a run's checkpoint is asked as the run."""
    run = Path(run_of(thinker, tmp_path / "run", chat_template_kwargs={"mood": "w7"}))
    suite = ["--suite", "eopd", "--benchmarks", "aime24", "--data_dir", str(data), "--max_new_tokens", "4"]
    checkpoint = str(shutil.copytree(thinker, run / "checkpoint-2"))
    out = tmp_path / "out"
    assert ran(out, *suite, models=[str(run), checkpoint]) == 0
    assert prompt(out, "checkpoint-2") == prompt(out, "run") and prompt(out, "run").endswith("w7")
    items = (out / "run/aime24.jsonl").read_text()
    capsys.readouterr()

    (run / "tsdkd_config.yaml").write_text("chat_template_kwargs: {mood: w8}")
    assert ran(out, *suite, models=[str(run)]) == 2
    assert "chat_template_kwargs was {'mood': 'w7'}, now {'mood': 'w8'}" in capsys.readouterr().err
    (run / "tsdkd_config.yaml").write_text("chat_template_kwargs: {mood: w7}")
    (run / "chat_template.jinja").write_text(THINKS + " ")
    assert ran(out, *suite, models=[str(run)]) == 2
    assert "chat_template was" in capsys.readouterr().err
    assert (out / "run/aime24.jsonl").read_text() == items
    (run / "tsdkd_config.yaml").write_text("[")
    assert ran(out, *suite, models=[str(run)]) == 2
    assert "tsdkd_config.yaml can't be read" in capsys.readouterr().err
    (run / "tsdkd_config.yaml").write_text("chat_template_kwargs: {enable_thinking: true}")
    assert ran(out, *suite, models=[str(run)]) == 2
    assert "think_end_token" in capsys.readouterr().err


def test_items_of_other_settings_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = ["tsdkd://demo/student", "--suite", "demo", "--benchmarks", "demo"]
    assert ran(tmp_path, models=one) == 0
    capsys.readouterr()
    assert ran(tmp_path, "--seed", "5", models=one) == 2
    error = capsys.readouterr().err
    assert "seed was 0, now 5" in error and error.count("output_dir") == 1
    shutil.copytree(resources.files("tsdkd") / "demo/student", tmp_path / "copy")
    assert ran(tmp_path / "out", models=["a=" + str(tmp_path / "copy"), *one[1:]]) == 0
    os.utime(tmp_path / "copy/model.safetensors", (0, 0))  # other weights
    assert ran(tmp_path / "out", models=["a=" + str(tmp_path / "copy"), *one[1:]]) == 2
    assert "revision was" in capsys.readouterr().err
    assert len(rows(tmp_path / "student/demo.jsonl")) == 12
    assert {row["seed"] for row in rows(tmp_path / "student/demo.jsonl")} == {0}
