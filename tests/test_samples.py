"""Several completions of a prompt: `num_generations` in training, `eval_samples` in evaluation, and their log."""

import json
import os
import shutil
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import reference
from conftest import DDP, build_model, build_tokenizer, flags, launch, make_rows, run_to_end, weights, write_jsonl
from preloaded import python
from test_trainers import config, first_log, models, on_policy_sequences, response_logits, rows, train
from tsdkd import ConfigError, DataError, EOPDConfig, EOPDTrainer, TSDKDConfig, TSDKDTrainer
from tsdkd.__main__ import main
from tsdkd.analysis.load import read_records
from tsdkd.errors import ResumeError
from tsdkd.methods import METHODS
from tsdkd.trainer.rollouts import EVAL_STEP


def repeated(data: Dataset, count: int) -> Dataset:
    return data.select([i for i in range(len(data)) for _ in range(count)])


def answers(count: int = 5) -> Dataset:
    """Problems whose answer only tells them apart."""
    return Dataset.from_list([{"prompt": row["prompt"], "answer": f"w{i}"} for i, row in enumerate(make_rows(count))])


def test_the_loss_is_that_of_all_completions(saved_model, tmp_path):
    """Two prompts, three completions of each: the paper's terms over six sequences, each with a stream of its own."""
    student, teacher, data = saved_model("qwen3", 0), saved_model("qwen3", 1), rows(2)
    trainer = train(TSDKDTrainer, config(TSDKDConfig, tmp_path, num_generations=3), student, teacher, data)
    sequences = on_policy_sequences(student, repeated(data, 3), 64)
    assert len({tuple(ids) for _, ids in sequences}) == 6
    expected = reference.tsd_kd_loss(*(response_logits(m, sequences, 64) for m in models(student, teacher)))
    log = first_log(trainer)
    assert log["loss"] == pytest.approx(expected["loss"], rel=2e-5)
    assert log["completions/mean_length"] == pytest.approx(sum(len(c) for _, c in sequences) / 6)


@pytest.mark.parametrize("per_device", [1, 4])
def test_a_prompts_completions_are_in_one_step(per_device, saved_model, tmp_path):
    """Every epoch has each prompt once, in another order, also where its completions are in several batches."""
    options = {"max_steps": 8, "num_generations": 4, "per_device_train_batch_size": per_device}
    options |= {"gradient_accumulation_steps": 4 // per_device, "record_steps": 1, "learning_rate": 1e-5}
    train(
        TSDKDTrainer,
        config(TSDKDConfig, tmp_path, **options),
        saved_model("qwen3", 0),
        saved_model("qwen3", 1),
        rows(4),
    )
    steps = [[sample["index"] for sample in record.samples] for record in read_records(tmp_path)]
    assert [Counter(indices).most_common() for indices in steps] == [[(indices[0], 4)] for indices in steps]
    epochs = [[indices[0] for indices in steps[start : start + 4]] for start in (0, 4)]
    assert all(sorted(epoch) == [0, 1, 2, 3] for epoch in epochs) and epochs[0] != epochs[1]


@pytest.mark.parametrize("method", ["tsd-kd", "gkd", "eopd", "opd", "minillm", "speculative-kd"])
def test_every_on_policy_method_takes_it(method, saved_model, tmp_path):
    trainer_class = METHODS[method]
    options = {"rollout_batch_size": 4} if hasattr(trainer_class.config_class, "rollout_batch_size") else {}
    args = config(trainer_class.config_class, tmp_path, num_generations=3, max_steps=3, max_length=64, **options)
    trainer = train(trainer_class, args, saved_model("qwen3", 0), saved_model("qwen3", 1), rows(4))
    assert trainer.state.global_step == 3 and trainer.state.epoch == 1.5
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


@pytest.mark.parametrize("method", ["tsd-kd", "eopd"])
@pytest.mark.parametrize("step", [1, 3], ids=["first epoch", "second epoch"])
def test_resumes_bitwise(method, step, saved_model, tmp_path):
    """In the middle of an epoch; with EOPD, in the middle of a rollout that serves two steps."""
    values: dict[str, Any] = {"save_strategy": "steps", "save_steps": step, "num_generations": 2, "max_steps": 6}
    values |= {"per_device_train_batch_size": 4, "learning_rate": 0.05, "lr_scheduler_type": "constant"}
    values |= {"rollout_batch_size": 4} if method == "eopd" else {}
    cls = METHODS[method]
    pair = saved_model("qwen3", 0), saved_model("qwen3", 1)
    train(cls, config(cls.config_class, tmp_path / "whole", **values), *pair, rows(4))
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", tmp_path / "parts" / f"checkpoint-{step}")
    args = config(cls.config_class, tmp_path / "parts", **values)
    cls(*pair, args, train_dataset=rows(4)).train(resume_from_checkpoint=True)
    whole, parts = (weights(tmp_path / name / "checkpoint-6") for name in ("whole", "parts"))
    assert (whole == parts).all() and (whole != weights(tmp_path / "whole" / "checkpoint-3")).any()


def test_two_processes_take_the_same_steps_and_resume(saved_model, tmp_path):
    """Also where a prompt's completions are on both processes, and in the middle of the second epoch."""
    values: dict[str, Any] = {"model_name_or_path": saved_model("qwen3", 0), "max_steps": 7, "save_steps": 6}
    values |= {"teacher_model_name_or_path": saved_model("qwen3", 1), "num_generations": 4, "resume": "true"}
    values |= {"dataset_name": write_jsonl(tmp_path / "rows.jsonl", make_rows(4)), "save_strategy": "steps"}
    values |= {"max_new_tokens": 8, "learning_rate": 0.01, "use_cpu": "true", "bf16": "false", "report_to": "none"}
    values |= {"optim": "sgd", "gradient_checkpointing": "false", "lr_scheduler_type": "constant"}
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["train", *flags(**values, per_device_train_batch_size=4, output_dir=one)]) == 0
    command = ["train", *flags(**values, per_device_train_batch_size=2, output_dir=two)]
    launch(DDP, command)
    whole = weights(two)
    torch.testing.assert_close(weights(one), whole, rtol=1e-5, atol=1e-7)
    shutil.rmtree(two / "checkpoint-7")
    (two / "model.safetensors").unlink()
    launch(DDP, command)
    assert (weights(two) == whole).all()


@pytest.mark.parametrize(
    ("cls", "options", "parts"),
    [
        (TSDKDConfig, {"num_generations": 0}, ("num_generations", "at least 1")),
        (TSDKDConfig, {"num_generations": 4, "lmbda": 0.5}, ("num_generations", "lmbda")),
        (TSDKDConfig, {"eval_samples": 0}, ("eval_samples", "at least 1")),
        (METHODS["supervised-kd"].config_class, {"num_generations": 2}, ("num_generations", "data set")),
        (METHODS["distillm"].config_class, {"eval_samples": 2}, ("eval_samples", "data set")),
        (METHODS["grpo"].config_class, {"eval_samples": 2}, ("eval_samples", "TRL")),
        (METHODS["minillm"].config_class, {"eval_samples": 2}, ("eval_samples", "teacher")),
        (TSDKDConfig, {"eval_samples": 2, "lmbda": 0.5}, ("eval_samples", "lmbda")),
    ],
    ids=str,
)
def test_impossible_numbers_are_refused(cls, options, parts, tmp_path):
    with pytest.raises(ConfigError) as error:
        config(cls, tmp_path, **options)
    assert all(part in str(error.value) for part in parts)


def test_batches_that_would_divide_a_prompts_completions_are_refused(saved_model, tmp_path):
    pair = saved_model("qwen3", 0), saved_model("qwen3", 1)
    with pytest.raises(ConfigError, match=r"num_generations: .* found 4; the global batch is 6 .* = 6 completions"):
        TSDKDTrainer(*pair, config(TSDKDConfig, tmp_path, num_generations=4), train_dataset=rows())
    args = config(EOPDConfig, tmp_path, num_generations=3, rollout_batch_size=3)
    with pytest.raises(ConfigError, match=r"rollout_batch_size: .* found 3; the mini-batch is 2 prompts"):
        EOPDTrainer(*pair, args, train_dataset=rows())


def test_samples_without_answers_are_refused(saved_model, tmp_path):
    args = config(TSDKDConfig, tmp_path, eval_samples=2)
    data = {"graded": answers(2), "not": answers(2).remove_columns("answer")}
    with pytest.raises(DataError, match="eval_samples: the rows of eval_dataset have no answers"):
        TSDKDTrainer(saved_model("qwen3", 0), saved_model("qwen3", 1), args, train_dataset=rows(), eval_dataset=data)


def test_another_number_does_not_resume(saved_model, tmp_path):
    pair = saved_model("qwen3", 0), saved_model("qwen3", 1)
    options = {"save_strategy": "steps", "save_steps": 1, "num_generations": 2}
    train(TSDKDTrainer, config(TSDKDConfig, tmp_path, **options), *pair, rows())
    args = config(TSDKDConfig, tmp_path, **{**options, "num_generations": 3, "max_steps": 2})
    with pytest.raises(ResumeError, match="num_generations was 2, now 3"):
        TSDKDTrainer(*pair, args, train_dataset=rows()).train(resume_from_checkpoint=True)


def test_records_have_different_prompts_first(saved_model, tmp_path):
    options = {"num_generations": 3, "record_steps": 1, "record_completions": 2}
    pair = saved_model("qwen3", 0), saved_model("qwen3", 1)
    train(TSDKDTrainer, config(TSDKDConfig, tmp_path, **options), *pair, rows(2))
    (record,) = read_records(tmp_path)
    assert sorted(sample["index"] for sample in record.samples) == [0, 1]


def test_the_dry_run_counts_completions(saved_model, rows_file, tmp_path, capsys):
    values = {"model_name_or_path": saved_model("qwen3", 0), "teacher_model_name_or_path": saved_model("qwen3", 1)}
    values |= {"dataset_name": rows_file, "output_dir": str(tmp_path), "use_cpu": "true", "bf16": "false"}
    values |= {"num_generations": 4, "per_device_train_batch_size": 8, "num_train_epochs": 1}
    assert main(["train", *flags(**values), "--dry_run"]) == 0
    printed = " ".join(capsys.readouterr().out.replace("│", "").split())
    num_rows = len(Path(rows_file).read_text().splitlines())
    assert "= 8 completions, 4 for each prompt" in printed
    assert f"optimizer steps {num_rows * 4 // 8} " in printed


class CountingGrader:
    """Calls a completion right if its number of words is even, and remembers its verdicts."""

    def __init__(self) -> None:
        self.verdicts: dict[str, list[bool]] = {}

    def __call__(self, completion: str, answer: str) -> bool:
        verdict = len(completion.split()) % 2 == 0
        self.verdicts.setdefault(answer, []).append(verdict)
        return verdict


def evaluate(pair: tuple[str, str], folder: Path, **options: Any) -> tuple[dict[str, float], dict[str, list[bool]]]:
    grader = CountingGrader()
    args = config(TSDKDConfig, folder, per_device_eval_batch_size=2, **options)
    trainer = TSDKDTrainer(*pair, args, train_dataset=rows(), eval_dataset=answers(), grader=grader)
    return trainer.evaluate(), grader.verdicts


def test_eval_samples_adds_avg_and_pass_at_k(saved_model, tmp_path):
    pair = saved_model("qwen3", 0), saved_model("qwen3", 1)
    one, first = evaluate(pair, tmp_path)
    four, verdicts = evaluate(pair, tmp_path, eval_samples=4)
    assert {len(v) for v in verdicts.values()} == {4} and len(verdicts) == 5
    assert {answer: v[:1] for answer, v in verdicts.items()} == first
    assert four["eval_avg@4"] == pytest.approx(sum(map(sum, verdicts.values())) / 20)
    assert four["eval_pass@4"] == pytest.approx(sum(map(any, verdicts.values())) / 5)
    assert 0 < four["eval_avg@4"] < four["eval_pass@4"]
    assert "eval_avg@1" not in one and one.keys() < four.keys()
    for name in ("eval_loss", "eval_accuracy", "eval_completions/mean_length"):
        assert four[name] == pytest.approx(one[name], rel=1e-6)


def test_the_samples_are_those_of_their_seeds(saved_model, tmp_path):
    """Each with a stream of its own, whatever the batches, and the same in every evaluation."""
    seen: list[str] = []

    def remember(completion: str, answer: str) -> bool:
        seen.append(completion)
        return False

    student, tokenizer, data = saved_model("qwen3", 0), build_tokenizer(), answers(3)
    args = config(TSDKDConfig, tmp_path, per_device_eval_batch_size=3, eval_samples=2)
    trainer = TSDKDTrainer(
        student, saved_model("qwen3", 1), args, train_dataset=rows(), eval_dataset=data, grader=remember
    )
    for _ in range(2):
        trainer.evaluate()
    expected = [
        tokenizer.decode(ids, skip_special_tokens=True)
        for sample in range(2)
        for _, ids in on_policy_sequences(student, data, 64, step=EVAL_STEP + sample)
    ]
    assert seen == expected * 2 and len(set(expected)) == 6


def test_the_best_model_can_be_chosen_by_it(saved_model, rows_file, tmp_path, monkeypatch, capsys):
    """By the command line, with the name that the log prints."""
    problems = tmp_path / "problems.jsonl"
    answers(4).to_json(problems)
    values = {"model_name_or_path": saved_model("qwen3", 0), "teacher_model_name_or_path": saved_model("qwen3", 1)}
    values |= {"dataset_name": rows_file, "eval_dataset_name": str(problems), "output_dir": str(tmp_path / "out")}
    values |= {"use_cpu": "true", "bf16": "false", "report_to": "none", "max_new_tokens": 6, "max_steps": 2}
    values |= {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "save_strategy": "steps"}
    values |= {"eval_samples": 3, "load_best_model_at_end": "true", "metric_for_best_model": "avg@3"}
    values |= {"grader": "grade_lengths:grade", "learning_rate": 0.1}
    (tmp_path / "grade_lengths.py").write_text("def grade(text, answer):\n    return len(text) % 2 == 0\n")
    monkeypatch.chdir(tmp_path)
    assert main(["train", *flags(**values)]) == 0
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    scores = [
        [entry[f"eval_{name}"] for name in ("avg@3", "pass@3")]
        for entry in state["log_history"]
        if "eval_loss" in entry
    ]
    assert state["best_metric"] == max(average for average, _ in scores) < max(share for _, share in scores)
    printed = capsys.readouterr().out
    assert all(f"avg@3 {100 * average:.1f} %, pass@3 {100 * share:.1f} %" in printed for average, share in scores)


def test_each_evaluation_has_a_table_of_its_own(saved_model, tmp_path, capsys):
    args = config(TSDKDConfig, tmp_path, log_completions=True, eval_strategy="steps", eval_samples=2)
    parts = {"a/b": answers(2), "c": answers(3)}
    pair = saved_model("qwen3", 0), saved_model("qwen3", 1)
    trainer = TSDKDTrainer(*pair, args, train_dataset=rows(), eval_dataset=parts)
    trainer.predict(trainer.eval_dataset["c"])  # ends without an evaluation's callback
    trainer.train()
    sizes = {p.name: len(p.read_text().splitlines()) for p in (tmp_path / "completions").iterdir()}
    names = ("eval_a_b-00000001.jsonl", "eval_c-00000001.jsonl", "train-00000001.jsonl")
    assert sizes == dict(zip(names, (2, 3, 6), strict=True))
    assert "eval_a/b_avg@2" in trainer.state.log_history[-2] | trainer.state.log_history[-3]


@pytest.fixture
def logged_run(saved_model: Any, tmp_path: Path) -> Any:
    """A run of one step and an evaluation that logs completions to a tracker."""

    def run(tracker: str) -> Any:
        options = {"log_completions": True, "report_to": tracker, "eval_samples": 2, "run_name": "one"}
        args = config(TSDKDConfig, tmp_path / "out", per_device_eval_batch_size=2, eval_strategy="steps", **options)
        student, teacher = build_model("qwen3", 0), build_model("qwen3", 1)
        trainer = TSDKDTrainer(
            student,
            teacher,
            args,
            train_dataset=rows(6),
            eval_dataset=answers(3),
            grader=CountingGrader(),
            processing_class=build_tokenizer(),
            teacher_processing_class=build_tokenizer(),
        )
        trainer.train()
        return trainer

    return run


def test_completions_are_printed_and_in_tensorboard(logged_run, tmp_path, capsys):
    logged_run("tensorboard")
    printed = capsys.readouterr().out
    assert printed.count("Step 1") == 2 and "Ended" in printed and "Correct" in printed
    (file,) = (tmp_path / "out").rglob("events.out.tfevents*")
    events = EventAccumulator(str(file.parent), size_guidance={"tensors": 0})
    events.Reload()
    text = {
        name: events.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0].decode()
        for name in ("completions", "eval/completions")
    }
    assert text["completions"].count("**prompt**") == 6 and "correct:" not in text["completions"]
    assert text["eval/completions"].count("correct: ") == 3 == text["eval/completions"].count("**answer**")
    assert "    <user> " in text["completions"]


def test_the_folder_keeps_completions_and_the_report_shows_the_newest(logged_run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    logged_run("none")
    (folder,) = {path.parent for path in (tmp_path / "out").rglob("*.jsonl")}
    rows = [json.loads(line) for line in (folder / "eval-00000001.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and {row["correct"] for row in rows} <= {True, False} and rows[0]["answer"] == "w0"
    (folder / "train-00000002.jsonl").write_text('{"step": 2, "prompt": "<b>w7", "completion": "</table>"}\n')
    (tmp_path / "out" / "tsdkd_config.yaml").write_text("method: tsd-kd\nnum_generations: 4\n")
    assert main(["report", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "&lt;b&gt;w7" in page and "&lt;/table&gt;" in page and "eval, step 1" in page and "train, step 2" in page
    assert rows[0]["completion"] in page and "4 completions of each" in page
    (folder / "eval-00000009.jsonl").write_text("[]\n")
    assert main(["report", str(tmp_path / "out")]) == 0
    assert "eval-00000009.jsonl" in (tmp_path / "out" / "report.html").read_text()


def test_completions_are_a_table_in_wandb(logged_run, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    import wandb

    logged_run("wandb")
    wandb.finish()
    tables = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.rglob("*.table.json")}
    assert len(tables) == 2
    by_columns = {tuple(table["columns"]): table["data"] for table in tables.values()}
    training = ("step", "prompt", "completion", "tokens", "ended")
    assert by_columns.keys() == {training, (*training, "answer", "correct")}
    assert len(by_columns[training]) == 6 and all(row[0] == 1 for row in by_columns[training])


def test_completions_are_a_table_in_trackio(saved_model, rows_file, tmp_path):
    """By the command line, in a process of its own: trackio reads its folder from the environment once."""
    pytest.importorskip("trackio")
    values = {"model_name_or_path": saved_model("qwen3", 0), "teacher_model_name_or_path": saved_model("qwen3", 1)}
    values |= {"dataset_name": rows_file, "output_dir": str(tmp_path / "out"), "use_cpu": "true", "bf16": "false"}
    values |= {"report_to": "trackio", "log_completions": "true", "max_steps": 1, "logging_steps": 1}
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    command = [python(), "-m", "tsdkd", "train", *flags(**values, max_new_tokens=6, save_strategy="no")]
    assert run_to_end(command, environment).returncode == 0
    (file,) = (tmp_path / "trackio").glob("*.db")
    logged = [json.loads(row[0]) for row in sqlite3.connect(file).execute("select metrics from metrics")]
    (table,) = (entry["completions"]["_value"] for entry in logged if "completions" in entry)
    assert [*table[0]] == ["step", "prompt", "completion", "tokens", "ended"] and table[0]["tokens"] <= 6
