"""One grader: training, the demo, comparisons and `tsdkd eval --suite demo` judge a completion alike."""

import json
import shutil
import subprocess
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from conftest import QUIET, flags, on_cpus, write_jsonl
from preloaded import python
from tsdkd import TSDKDConfig, TSDKDTrainer
from tsdkd.cli import main
from tsdkd.demo.run_demo import evaluate_saved
from tsdkd.grading import is_exact_match

GRADERS = """
NUMBER = 3
def has_word(completion, answer): return answer in completion.split()
def fails(completion, answer): raise RuntimeError("no luck\\nat all")
def scores(completion, answer): return 0.5
def takes_one(completion): return True
"""
DEMO = Path(str(resources.files("tsdkd").joinpath("demo")))
COMPLETION = "y-2 27,5 y+3 27,8"
DEMO_GRADER = "tsdkd.demo.task:is_correct"
Rows = list[dict[str, str]]
PROMPTS = [  # the completion is right for two of them; the others don't offer y-2, or end with another move
    "27,7 x+5 y~3 x#4 y-2 x+9 y#0 y+1 x~4 -> y+3",
    "27,7 x+5 y~3 x#4 y-3 x+9 y#0 y+1 x~4 -> y+3",
    "27,7 y-2 x+5 y~3 x#4 x+9 y#0 y+1 x~4 -> y+3",
    "27,7 x+5 y~3 x#4 y-2 x+9 y#0 y+1 x~4 -> y+4",
]
ROWS: Rows = [{"prompt": prompt, "answer": prompt} for prompt in PROMPTS]
WORDS = ("27,5", "8", "y+3", "27")  # the first and the third are words of the completion
NUMBERS = ("278", "8", "27", "278.0")  # the last number of the completion is 278: commas group digits


@pytest.fixture(autouse=True)
def says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model says `COMPLETION`, whatever its tokens are."""
    original = PreTrainedTokenizerBase.decode

    def decode(self: PreTrainedTokenizerBase, token_ids: Any, **kwargs: Any) -> str | list[str]:
        if not kwargs.get("skip_special_tokens"):  # not a completion: lm-eval asks for the text of the end token
            return original(self, token_ids, **kwargs)
        return [COMPLETION] * len(token_ids) if np.ndim(token_ids) == 2 else COMPLETION

    monkeypatch.setattr(PreTrainedTokenizerBase, "decode", decode)


def with_column(name: str, texts: tuple[str, ...]) -> Rows:
    return [row | {name: text} for row, text in zip(ROWS, texts, strict=True)]


def by_training(folder: Path, rows: Rows = ROWS, **options: Any) -> float:
    options = {"grader": DEMO_GRADER, **options}
    values = {**QUIET, "model_name_or_path": DEMO / "student", "teacher_model_name_or_path": DEMO / "teacher"}
    path = write_jsonl(folder / "rows.jsonl", [row | {"completion": "a"} for row in rows])
    values |= {"dataset_name": path, "eval_dataset_name": path, "max_steps": 1, "max_new_tokens": 4, **options}
    values |= {"eval_strategy": "steps", "eval_steps": 1, "output_dir": folder / "run", "max_length": 64}
    assert main(["train", *flags(**values)]) == 0
    log = json.loads((folder / "run/trainer_state.json").read_text())["log_history"]
    return 100 * next(row["eval_accuracy"] for row in log if "eval_accuracy" in row)


def by_demo(folder: Path) -> float:
    return evaluate_saved(str(DEMO / "student"), ROWS).metrics["greedy"]


def by_compare(folder: Path, rows: Rows = ROWS, **options: Any) -> float:
    options = {"grader": DEMO_GRADER, **options}
    base = {"model_name_or_path": str(DEMO / "student"), "teacher_model_name_or_path": str(DEMO / "teacher")}
    base |= {"dataset_name": write_jsonl(folder / "rows.jsonl", rows), "output_dir": "unused", "max_new_tokens": 4}
    base |= {"use_cpu": True, "bf16": False, "max_length": 64, **options}
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    values = {
        "config": str(folder / "base.yaml"),
        "output_dir": str(folder / "out"),
        "runs": {"gkd": {"method": "gkd"}},
    }
    values |= {"eval_dataset_name": base["dataset_name"], "eval_samples": 1}
    (folder / "comparison.yaml").write_text(yaml.safe_dump(values))
    assert main(["compare", "--config", str(folder / "comparison.yaml"), "--task", "0"]) == 0
    return float(json.loads((folder / "out/student/result.json").read_text())["greedy"])


def by_eval(folder: Path) -> float:
    pytest.importorskip("lm_eval")
    (folder / "data/demo_greedy").mkdir(parents=True)
    write_jsonl(folder / "data/demo_greedy/test.jsonl", ROWS)
    command = ["eval", "tsdkd://demo/student", "--suite", "demo", "--benchmarks", "demo_greedy"]
    assert main([*command, "--data_dir", str(folder / "data"), "--output_dir", str(folder / "out")]) == 0
    (entry,) = json.loads((folder / "out/results-demo.json").read_text())["results"]
    return float(entry["mean"])


@pytest.mark.parametrize("measure", [by_training, by_demo, by_compare, by_eval])
def test_every_path_grades_alike(measure: Callable[[Path], float], tmp_path: Path) -> None:
    assert measure(tmp_path) == 50.0


@pytest.mark.parametrize("measure", [by_training, by_compare])
def test_without_a_grader_the_last_number_counts(measure: Callable[..., float], tmp_path: Path) -> None:
    assert measure(tmp_path, with_column("answer", NUMBERS), grader="null") == 50.0


@pytest.mark.parametrize("measure", [by_training, by_compare])
def test_the_demo_s_grader_tells_which_answers_it_needs(
    measure: Callable[..., float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AssertionError):
        measure(tmp_path, with_column("answer", NUMBERS))
    expected = "is_correct raised ValueError: expected a problem of the demo as the answer, found '278'"
    assert f"grader: tsdkd.demo.task:{expected}" in capsys.readouterr().err


@pytest.mark.parametrize("measure", [by_training, by_compare])
def test_a_grader_of_ones_own(
    measure: Callable[..., float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is found in the current directory, and answers in another column."""
    (tmp_path / "word_grader.py").write_text(GRADERS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    rows = with_column("gold", WORDS)
    assert measure(tmp_path, rows, answer_column="gold", grader="word_grader:has_word") == 50.0
    shutil.rmtree(tmp_path / ("run" if measure is by_training else "out"))
    for grader, found in (
        ("fails", "raised RuntimeError: no luck, for the completion of row 0: "),
        ("scores", "returned 0.5, expected True or False, for the completion of row 0: "),
    ):
        capsys.readouterr()
        with pytest.raises(AssertionError):
            measure(tmp_path, rows, answer_column="gold", grader=f"word_grader:{grader}")
        completion = "" if measure is by_compare else COMPLETION  # a comparison asks before it trains
        assert f"grader: word_grader:{grader} {found}{completion!r}" in capsys.readouterr().err
        shutil.rmtree(tmp_path / ("run" if measure is by_training else "out"))


@pytest.mark.parametrize(
    ("grader", "found"),
    [
        ("nowhere_at_all:grade", "there is no module 'nowhere_at_all'"),
        ("word_grader:has_wrod", "has no 'has_wrod', did you mean 'has_word'?"),
        ("word_grader:NUMBER", "word_grader:NUMBER must be a function, found 3"),
        ("word_grader:takes_one", "must take a completion and an answer, found (completion)"),
        ("broken_grader:grade", "the module broken_grader can't be imported: ZeroDivisionError: division by zero"),
        ("script_grader:grade", "the module script_grader can't be imported: SystemExit"),
        ("lazy_grader:grade", "the module lazy_grader can't be imported: ModuleNotFoundError"),
        ("word_grader.py:grade", "must be package.module:name, without a folder and without .py"),
        ("word_grader", "must be package.module:name"),
    ],
)
@pytest.mark.parametrize("command", ["train", "dry run", "compare"])
def test_a_grader_that_is_none_is_told_first(
    command: str,
    grader: str,
    found: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "word_grader.py").write_text(GRADERS, encoding="utf-8")
    (tmp_path / "broken_grader.py").write_text("1 / 0", encoding="utf-8")
    (tmp_path / "script_grader.py").write_text("raise SystemExit(5)", encoding="utf-8")
    (tmp_path / "lazy_grader.py").write_text("def __getattr__(name):\n    import not_installed", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    if command == "compare":
        with pytest.raises(AssertionError):
            by_compare(tmp_path, grader=grader)
    else:
        values = {**QUIET, "model_name_or_path": DEMO / "student", "teacher_model_name_or_path": DEMO / "teacher"}
        values |= {"dataset_name": DEMO / "train.jsonl", "output_dir": "run", "grader": grader}
        assert main(["train", *flags(**values), *(["--dry_run"] if command == "dry run" else [])]) == 2
        left = {path for path in tmp_path.rglob("*") if "__pycache__" not in str(path)}
        assert left == set(before)
    lines = [line for line in capsys.readouterr().err.splitlines() if "grader" in line]
    assert lines and all(found in line for line in lines)
    assert len(lines) == 1 or command == "compare"


def test_a_grader_that_fails_on_one_process_stops_all(tmp_path: Path) -> None:
    """All of them say it together, so that none is left waiting."""
    text = "import os\ndef grade(completion, answer):\n    return 1 / (os.environ['RANK'] == '0')\n"
    (tmp_path / "one_grader.py").write_text(text, encoding="utf-8")
    values = {**QUIET, "model_name_or_path": DEMO / "student", "teacher_model_name_or_path": DEMO / "teacher"}
    rows = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    values |= {"dataset_name": rows, "eval_dataset_name": rows, "max_steps": 1, "max_new_tokens": 4}
    values |= {"eval_strategy": "steps", "eval_steps": 1, "output_dir": "run", "per_device_eval_batch_size": 2}
    values |= {"grader": "one_grader:grade", "num_processes": 2}
    command = [python(), "-m", "tsdkd", "train", *flags(**values)]
    result = subprocess.run(command, cwd=tmp_path, env=on_cpus(), capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.count("one_grader:grade raised ZeroDivisionError: division by zero, for the completion") == 1
    assert "Traceback" not in result.stderr and "gloo" not in result.stderr


def test_a_run_goes_on_with_its_grader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its accuracies would not be of one kind."""
    (tmp_path / "word_grader.py").write_text(GRADERS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    options = {"grader": "word_grader:has_word", "save_strategy": "steps", "save_steps": 1, "resume": "true"}
    rows = with_column("answer", WORDS)
    assert by_training(tmp_path, rows, **options) == 50.0
    with pytest.raises(AssertionError):
        by_training(tmp_path, rows, **{**options, "grader": "word_grader:scores", "max_steps": 2})
    assert "grader was 'word_grader:has_word', now 'word_grader:scores'" in capsys.readouterr().err


def test_a_grader_in_python(tmp_path: Path) -> None:
    trainer = TSDKDTrainer(
        str(DEMO / "student"),
        str(DEMO / "teacher"),
        TSDKDConfig(str(tmp_path), **QUIET, max_new_tokens=4, eval_strategy="steps", eval_steps=1),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS),
        grader=lambda completion, answer: answer == PROMPTS[1] and completion == COMPLETION,
    )
    assert trainer.evaluate()["eval_accuracy"] == 0.25


def test_the_last_box_comes_before_the_last_number() -> None:
    assert is_exact_match("so 3 + 4 = 7 . then 5 - 2 = 3", "3") and not is_exact_match("3 + 4 = 7 .", "3")
    assert is_exact_match(r"\boxed{7}, not 3", "7") and not is_exact_match(r"\boxed{7}, not 3", "3")
    assert is_exact_match("so answer 1,000", "1000.0") and not is_exact_match("answer", "3")
