"""A teacher whose prompts are rendered differently: `teacher_chat_template_kwargs`."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

import reference
from conftest import DDP, TEMPLATE, build_tokenizer, flags, launch, weights
from test_trainers import config, first_log, models, on_policy_sequences, prompt_ids, response_logits, rows
from tsdkd import ConfigError, DataError
from tsdkd.__main__ import main
from tsdkd.analysis.load import read_records
from tsdkd.errors import ModelError
from tsdkd.methods import METHODS

TEACHER_TEMPLATE = "w55 w54 w53 " + TEMPLATE + "{% if thinking %}w50 {% endif %}"
KWARGS = {"thinking": True}


def teacher_prompt_ids(text: str) -> list[int]:
    """What the teacher must see: word by word, without the library."""
    return build_tokenizer()(f"w55 w54 w53 <user> {text} <assistant> w50")["input_ids"]


@pytest.fixture(scope="module")
def pair(saved_model: Any, tmp_path_factory: Any) -> tuple[str, str]:
    """A student and a teacher with another chat template."""
    student, teacher = saved_model("qwen3", 0), tmp_path_factory.mktemp("teacher")
    shutil.copytree(saved_model("qwen3", 1), teacher, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.chat_template = TEACHER_TEMPLATE
    tokenizer.save_pretrained(teacher)
    return student, str(teacher)


def train(method: str, pair: tuple[str, str], folder: Path, data: Dataset, **options: Any) -> Any:
    cls = METHODS[method]
    args = config(cls.config_class, folder, **{"teacher_chat_template_kwargs": KWARGS, **options})
    trainer = cls(*pair, args, train_dataset=data)
    trainer.train(resume_from_checkpoint=bool(options.get("resume")) or None)
    return trainer


def both_logits(pair: tuple[str, str], data: Dataset) -> tuple[list[list[int]], list[Any], list[Any]]:
    """The student's completions, and the logits of both models for them, each after its own prompt."""
    sequences = on_policy_sequences(pair[0], data, 64)
    tokens = [completion for _, completion in sequences]
    theirs = [(teacher_prompt_ids(row["prompt"]), ids) for row, ids in zip(data, tokens, strict=True)]
    student, teacher = models(*pair)
    return tokens, response_logits(student, sequences, 64), response_logits(teacher, theirs, 64)


@pytest.mark.parametrize("options", [{}, {"padding_free": False}, {"fused_head": False}], ids=str)
@pytest.mark.parametrize("method", ["tsd-kd", "eopd"])
def test_each_model_reads_its_own_prompt(method, options, pair, tmp_path):
    """The papers' losses from logits of separate, unpadded sequences. One prompt for both gives another loss."""
    data = rows()
    tokens, *logits = both_logits(pair, data)
    options = {**options, "rollout_batch_size": 6} if method == "eopd" else options
    if method == "eopd":
        old = [
            [reference.log_softmax(row)[token] for row, token in zip(one, ids, strict=True)]
            for one, ids in zip(logits[0], tokens, strict=True)
        ]
        expected = reference.eopd_loss(*logits, tokens, old)["loss"]
    else:
        expected = reference.tsd_kd_loss(*logits)["loss"]
    found = first_log(train(method, pair, tmp_path, data, **options))["loss"]
    assert found == pytest.approx(expected, rel=5e-5)
    same = train(method, pair, tmp_path / "same", data, **options, teacher_chat_template_kwargs=None)
    assert abs(first_log(same)["loss"] - expected) > 1e-3 * abs(expected)


def test_the_fixed_completions_too(pair, tmp_path):
    data = rows()
    tokenizer = build_tokenizer()
    completions = [[*tokenizer(row["completion"])["input_ids"], 1][:12] for row in data]
    prompts = [(prompt_ids(row["prompt"]), teacher_prompt_ids(row["prompt"])) for row in data]
    logits = [
        response_logits(model, [(p[i], c) for p, c in zip(prompts, completions, strict=True)], 64)
        for i, model in enumerate(models(*pair))
    ]
    expected = reference.tsd_kd_loss(*logits)["loss"]
    assert first_log(train("tsd-kd", pair, tmp_path, data, lmbda=0.0))["loss"] == pytest.approx(expected, rel=5e-5)


def test_records_are_of_both_prompts(pair, tmp_path):
    data = rows()
    train("tsd-kd", pair, tmp_path, data, record_steps=1, train_sampling_strategy="sequential")
    (record,) = read_records(tmp_path)
    _, student, teacher = both_logits(pair, data)
    for name, logits in (("student_entropy", student), ("teacher_entropy", teacher)):
        expected = torch.tensor([reference.token_entropy(row) for one in logits for row in one])
        torch.testing.assert_close(torch.from_numpy(record.columns[name]), expected, rtol=1e-3, atol=1e-4)


def test_an_unfinished_rollout_resumes_bitwise(pair, tmp_path):
    """EOPD keeps the teacher's part of a window in the checkpoint."""
    values: dict[str, Any] = {"rollout_batch_size": 12, "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    values |= {"learning_rate": 0.05, "lr_scheduler_type": "constant"}
    train("eopd", pair, tmp_path / "whole", rows(12), **values)
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "parts" / "checkpoint-1")
    train("eopd", pair, tmp_path / "parts", rows(12), **values, resume=True)
    assert (weights(tmp_path / "whole" / "checkpoint-4") == weights(tmp_path / "parts" / "checkpoint-4")).all()


def test_two_processes_take_the_same_steps(pair, rows_file, tmp_path):
    """Sequences that go to another process take the teacher's prompt with them."""
    values: dict[str, Any] = {"model_name_or_path": pair[0], "teacher_model_name_or_path": pair[1]}
    values |= {"dataset_name": rows_file, "teacher_chat_template_kwargs": json.dumps(KWARGS), "max_steps": 3}
    values |= {"max_new_tokens": 8, "learning_rate": 0.01, "use_cpu": "true", "bf16": "false", "report_to": "none"}
    values |= {"save_strategy": "no", "optim": "sgd", "gradient_checkpointing": "false"}
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["train", *flags(**values, per_device_train_batch_size=4, output_dir=one)]) == 0
    launch(DDP, ["train", *flags(**values, per_device_train_batch_size=2, output_dir=two)])
    torch.testing.assert_close(weights(one), weights(two), rtol=1e-5, atol=1e-7)


def test_the_longer_prompt_limits_the_completion(pair, tmp_path):
    data = Dataset.from_list([{"prompt": "w1 w2"}, {"prompt": "w3"}])  # 8 and 7 tokens for the teacher
    cls = METHODS["tsd-kd"]
    args = config(cls.config_class, tmp_path, teacher_chat_template_kwargs=KWARGS, max_length=9)
    trainer = cls(*pair, args, train_dataset=data)
    assert trainer.train_dataset["limit"] == [1, 2]


@pytest.mark.parametrize("method", ["minillm", "speculative-kd", "distillm", "seq-kd", "tsd-kd-released", "grpo"])
def test_methods_that_need_one_prompt_refuse_it(method, tmp_path):
    with pytest.raises(ConfigError, match="teacher_chat_template_kwargs: "):
        config(METHODS[method].config_class, tmp_path, teacher_chat_template_kwargs={})


def test_a_teacher_without_a_template_is_refused(saved_model, pair, tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    cls = METHODS["tsd-kd"]
    args = config(cls.config_class, tmp_path, teacher_chat_template_kwargs={})
    with pytest.raises(DataError, match="teacher_chat_template_kwargs: the teacher's tokenizer has no chat template"):
        cls(*pair, args, train_dataset=rows(), teacher_processing_class=tokenizer)


def test_the_dry_run_shows_both_prompts_and_the_teacher_writes_after_its_own(pair, rows_file, tmp_path, capsys):
    values = {"model_name_or_path": pair[0], "teacher_model_name_or_path": pair[1], "dataset_name": rows_file}
    values |= {"output_dir": str(tmp_path / "out"), "use_cpu": "true", "bf16": "false", "max_new_tokens": 4}
    own = {"teacher_chat_template_kwargs": json.dumps(KWARGS)}
    assert main(["train", *flags(**values, **own), "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "as the student sees it:\n<user> " in printed and "as the teacher sees it:\nw55 w54 w53 <user> " in printed
    texts = []
    for name, options in (("own", own), ("same", {})):
        output = tmp_path / f"{name}.jsonl"
        command = ["generate", *flags(**values, **options), "--output_file", str(output), "--limit", "4"]
        assert main(command) == 0
        texts.append([json.loads(line)["completion"] for line in output.read_text().splitlines()])
    assert texts[0] != texts[1]


def test_hooks_that_would_mix_up_the_prompts_are_refused(pair, tmp_path):
    """A trainer of one's own that trains on other prompts, or on other positions."""

    class Reversed(METHODS["tsd-kd"]):
        def _select_completions(self, *args: Any) -> Any:
            prompts, completions = super()._select_completions(*args)
            return prompts[::-1], completions[::-1]

    class Elsewhere(METHODS["tsd-kd"]):
        def _position_mask(self, batch: Any) -> Any:
            return super()._position_mask(batch)

    args = config(Reversed.config_class, tmp_path, teacher_chat_template_kwargs=KWARGS)
    with pytest.raises(ModelError, match="Reversed trains on other prompts"):
        Reversed(*pair, args, train_dataset=rows()).train()
    with pytest.raises(ConfigError, match="teacher_chat_template_kwargs: Elsewhere"):
        Elsewhere(*pair, args, train_dataset=rows())


def test_a_file_of_completions_has_one_kind_of_prompt(pair, rows_file, tmp_path, capsys):
    values = {"model_name_or_path": pair[0], "teacher_model_name_or_path": pair[1], "dataset_name": rows_file}
    values |= {"use_cpu": "true", "bf16": "false", "max_new_tokens": 4, "output_file": str(tmp_path / "out.jsonl")}
    assert main(["generate", *flags(**values), "--limit", "1"]) == 0
    assert main(["generate", *flags(**values, teacher_chat_template_kwargs="{}"), "--limit", "2"]) == 2
    assert "chat_template_kwargs was" in capsys.readouterr().err


def test_the_teacher_continues_after_its_own_prompt(pair, rows_file, tmp_path):
    """In `tsdkd analyze --token_roles`, as in the losses."""
    from tsdkd.analysis.decisive import _Prefix, _sequence
    from tsdkd.trainer.token_records import RecordedCompletion

    class Record:
        completions = [RecordedCompletion(0, [1, 2], [3, 4], teacher_prompt=[5])]

    assert _sequence(Record, _Prefix(0, [3])) == [1, 2, 3] and _sequence(Record, _Prefix(0, [3]), "teacher") == [5, 3]
