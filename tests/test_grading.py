"""One grader: training, the demo, comparisons and `tsdkd eval --suite demo` judge a completion alike."""

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import PreTrainedTokenizerBase

from conftest import QUIET, flags, write_jsonl
from tsdkd.cli import main
from tsdkd.demo.run_demo import evaluate_saved
from tsdkd.grading import is_exact_match

DEMO = Path(str(resources.files("tsdkd").joinpath("demo")))
COMPLETION = "so a 3 +4 = 7 . then d 5 -2 = 3"  # cut off before the word "answer"
ROWS = [{"prompt": "d 5 -2 ; a 3 +4 ; find d - a", "answer": answer} for answer in ("3", "8", "7", "3.0")]


@pytest.fixture(autouse=True)
def says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model says `COMPLETION`, whatever its tokens are."""
    original = PreTrainedTokenizerBase.decode

    def decode(self: PreTrainedTokenizerBase, token_ids: Any, **kwargs: Any) -> str | list[str]:
        if not kwargs.get("skip_special_tokens"):  # not a completion: lm-eval asks for the text of the end token
            return original(self, token_ids, **kwargs)
        return [COMPLETION] * len(token_ids) if np.ndim(token_ids) == 2 else COMPLETION

    monkeypatch.setattr(PreTrainedTokenizerBase, "decode", decode)


def by_training(folder: Path) -> float:
    values = {**QUIET, "model_name_or_path": DEMO / "student", "teacher_model_name_or_path": DEMO / "teacher"}
    rows = write_jsonl(folder / "rows.jsonl", [row | {"completion": "a"} for row in ROWS])
    values |= {"dataset_name": rows, "eval_dataset_name": rows, "max_steps": 1, "max_new_tokens": 4}
    values |= {"eval_strategy": "steps", "eval_steps": 1, "output_dir": folder / "run", "max_length": 64}
    assert main(["train", *flags(**values)]) == 0
    log = json.loads((folder / "run/trainer_state.json").read_text())["log_history"]
    return 100 * next(row["eval_accuracy"] for row in log if "eval_accuracy" in row)


def by_demo(folder: Path) -> float:
    return evaluate_saved(str(DEMO / "student"), ROWS).metrics["greedy"]


def by_compare(folder: Path) -> float:
    base = {"model_name_or_path": str(DEMO / "student"), "teacher_model_name_or_path": str(DEMO / "teacher")}
    base |= {"dataset_name": write_jsonl(folder / "rows.jsonl", ROWS), "output_dir": "unused", "max_new_tokens": 4}
    base |= {"use_cpu": True, "bf16": False, "max_length": 64}
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
    """The last number counts where nothing is boxed: two of the four answers are 3."""
    assert measure(tmp_path) == 50.0


def test_the_last_box_comes_before_the_last_number() -> None:
    assert is_exact_match(COMPLETION, "3") and not is_exact_match(COMPLETION, "7")
    assert is_exact_match(r"\boxed{7}, not 3", "7") and not is_exact_match(r"\boxed{7}, not 3", "3")
    assert is_exact_match("so answer 1,000", "1000.0") and not is_exact_match("answer", "3")
