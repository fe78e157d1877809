"""One rule for where a completion ends, whoever samples it: training, generation, comparison, analysis, demo."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import QUIET, build_model, build_tokenizer, flags, make_rows, write_jsonl
from tsdkd import TSDKDConfig, TSDKDTrainer
from tsdkd.cli import main
from tsdkd.demo.run_demo import evaluate_demo
from tsdkd.rollout import hf
from tsdkd.run.arguments import parse_arguments

STUDENT, TEACHER = {1, 7}, {8, 9}
"""Ids of tokenizer and generation config, all different; the teacher has another one that is not shared."""
WALK = "27,7 x+5 y~3 x#4 y-2 x+9 y#0 y+1 x~4 -> y+3"  # an answer that the demo's grader can read


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    """A student of 64 logits and a teacher of 70, with one vocabulary and four end-of-sequence tokens."""
    folders = []
    for name, rows, eos, generation_eos in (("student", 64, "<eos>", 7), ("teacher", 70, "w4", [9, 66])):
        model, tokenizer = build_model("qwen3", len(folders), rows), build_tokenizer()
        model.generation_config.eos_token_id, tokenizer.eos_token = generation_eos, eos
        folders.append(str(tmp_path / name))
        model.save_pretrained(folders[-1])
        tokenizer.save_pretrained(folders[-1])
    return folders[0], folders[1]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """The stop tokens of every batch that is sampled in this process."""
    found: list[set[int]] = []
    sample = hf._sample  # behind every function that samples

    def spy(*args: Any) -> Any:
        found.append(set(args[-1]))
        return sample(*args)

    monkeypatch.setattr(hf, "_sample", spy)
    return found


def run_values(pair: tuple[str, str], folder: Path, template: str) -> dict[str, Any]:
    data = write_jsonl(folder / "rows.jsonl", make_rows(4))
    values = {"model_name_or_path": pair[0], "teacher_model_name_or_path": pair[1], "dataset_name": data, **QUIET}
    return values | {"eval_dataset_name": data, "max_new_tokens": 6, "max_steps": 1, "chat_template_source": template}


def train(pair: tuple[str, str], folder: Path, template: str) -> str:
    args = TSDKDConfig(str(folder / "run"), max_steps=1, max_new_tokens=6, chat_template_source=template, **QUIET)
    trainer = TSDKDTrainer(pair[0], pair[1], args, train_dataset=Dataset.from_list(make_rows(4)))
    trainer.train()
    trainer.save_model()
    return str(folder / "run")


@pytest.mark.parametrize(("template", "expected"), [("student", STUDENT), ("teacher", STUDENT | TEACHER)])
def test_a_students_completion_ends_at_the_same_tokens_everywhere(
    template: str, expected: set[int], pair: Any, seen: list[set[int]], tmp_path: Path
) -> None:
    """At its own, and at the teacher's where it is to end its turns as the teacher does."""
    student = train(pair, tmp_path, template)
    assert seen and all(ids == expected for ids in seen), "training"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(student), AutoTokenizer.from_pretrained(student)
    assert set(model.generation_config.eos_token_id) == expected, "what is saved"

    seen.clear()
    evaluate_demo(model, tokenizer, [row | {"answer": WALK} for row in make_rows(2)])
    assert seen and all(ids == expected for ids in seen), "demo"

    seen.clear()
    values = run_values(pair, tmp_path, template)
    assert main(["generate", *flags(**values, role="student", output_file=tmp_path / "rows_out.jsonl")]) == 0
    assert seen and all(ids == expected for ids in seen), "generate"

    seen.clear()
    pytest.importorskip("matplotlib")
    from tsdkd.analysis.record_pair import record_pair

    record_pair(parse_arguments(None, flags(**values, output_dir=tmp_path / "pair")), 2).write()
    assert seen and all(ids == expected for ids in seen), "analysis"

    pytest.importorskip("scipy")
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**values, "output_dir": "unused"}))
    comparison = {"config": str(tmp_path / "base.yaml"), "output_dir": str(tmp_path / "out"), "eval_samples": 1}
    comparison |= {"seeds": [1], "runs": {"plain": {"method": "gkd"}}}
    (tmp_path / "comparison.json").write_text(json.dumps(comparison))
    for task in (0, 2):  # the student as it is, and trained
        seen.clear()
        assert main(["compare", "--config", str(tmp_path / "comparison.json"), "--task", str(task)]) == 0
        assert seen and all(ids == expected for ids in seen), "compare"


@pytest.mark.parametrize(("template", "expected"), [("student", STUDENT | TEACHER), ("teacher", TEACHER)])
def test_a_teachers_completion_ends_at_the_same_tokens_everywhere(
    template: str, expected: set[int], pair: Any, seen: list[set[int]], tmp_path: Path
) -> None:
    values = run_values(pair, tmp_path, template)
    assert main(["generate", *flags(**values, output_file=tmp_path / "rows_out.jsonl")]) == 0
    assert seen and all(ids == expected for ids in seen), "generate"

    seen.clear()
    pytest.importorskip("scipy")
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**values, "output_dir": "unused"}))
    comparison = {"config": str(tmp_path / "base.yaml"), "output_dir": str(tmp_path / "out"), "eval_samples": 1}
    comparison |= {"seeds": [1], "runs": {"plain": {"method": "gkd"}}}
    (tmp_path / "comparison.json").write_text(json.dumps(comparison))
    assert main(["compare", "--config", str(tmp_path / "comparison.json"), "--task", "1"]) == 0
    assert seen and all(ids == expected for ids in seen), "compare"
