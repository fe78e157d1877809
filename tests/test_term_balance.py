"""`term_balance`: the weights that it chooses mean what is stated, survive a resume, and don't depend on the split."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

import reference as ref
from conftest import QUIET, build_model, build_tokenizer, flags, make_rows, weights
from crash import run_ranks
from tsdkd import ConfigError, TSDKDConfig, TSDKDTrainer
from tsdkd.checkpointing.state_file import load_state
from tsdkd.cli import main
from tsdkd.methods import METHODS
from tsdkd.methods.tsd_kd import TSDKDObjective

SHARES = {"indirect": 0.3, "entropy": 0.5}
GIVEN = {**QUIET, "lmbda": 0.0, "max_length": 64, "logging_steps": 1, "optim": "sgd", "lr_scheduler_type": "constant"}
GIVEN |= {"per_device_train_batch_size": 6, "learning_rate": 1e-2, "log_term_gradients": 0, "max_grad_norm": 0.0}
GIVEN |= {"train_sampling_strategy": "sequential"}
"""Trains on the completions of six rows: all of them in each step."""


def train(method: str, folder: Path, trainer_class: Any = None, resume: str | None = None, **values: Any) -> Any:
    trainer_class = trainer_class or METHODS[method]
    trainer = trainer_class(
        model=build_model("llama", 0),
        teacher_model=build_model("qwen3", 1, hidden=48),
        args=trainer_class.config_class(output_dir=str(folder), **{**GIVEN, **values}),
        train_dataset=Dataset.from_list(make_rows(6, completion_words=(9, 40))),
        processing_class=build_tokenizer(),
        teacher_processing_class=build_tokenizer(),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def steps(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def response_terms(student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    """The terms of one response, Eq. 4 to 12, from logits `[L, V]` in float64."""
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    log_m = (0.9 * log_p.exp() + 0.1 * log_q.exp()).log()
    jsd = (0.9 * log_p.exp() * (log_p - log_m) + 0.1 * log_q.exp() * (log_q - log_m)).sum(-1)
    entropies = [-(log_q.exp() * log_q).sum(-1), -(log_p.exp() * log_p).sum(-1)]
    gate = torch.sigmoid(entropies[0].detach() - entropies[1])
    values = entropies[0].tolist()
    nll = []
    for t in range(ref.opener_length(values)):
        scores = student[t][ref.teacher_ranking(student[t].tolist(), teacher[t].tolist(), 10)]
        nll.append(torch.stack([scores[j:].logsumexp(-1) - scores[j] for j in range(10)]).sum())
    entropy = entropies[0][ref.top_entropy_positions(values)].mean()
    return {"direct": (gate * jsd).mean(), "indirect": torch.stack(nll).mean(), "entropy": entropy}


def gradient_norms(rows: Any) -> dict[str, float]:
    """Of each term of TSD-KD, a mean over the responses, one response at a time, unpadded, in float64."""
    student, teacher = build_model("llama", 0).double(), build_model("qwen3", 1, hidden=48).double()
    parameters = list(student.parameters())
    sums = {name: [torch.zeros_like(p) for p in parameters] for name in ("direct", "indirect", "entropy")}
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        positions = slice(len(row["prompt_ids"]) - 1, -1)
        with torch.no_grad():
            of_teacher = teacher(input_ids=ids).logits[0, positions]
        for name, term in response_terms(student(input_ids=ids).logits[0, positions], of_teacher).items():
            for total, gradient in zip(
                sums[name], torch.autograd.grad(term, parameters, retain_graph=True), strict=True
            ):
                total += gradient / len(rows)
    return {name: float(torch.stack([g.norm() for g in total]).norm()) for name, total in sums.items()}


@pytest.mark.parametrize("split", [(6, 1), (2, 3)], ids=["one micro-batch", "three micro-batches"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "dense"])
def test_the_weights_give_the_stated_norms(fused, split, tmp_path):
    batch, accumulation = split
    options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    options |= {"fused_head": fused, "padding_free": False}
    trainer = train("tsd-kd", tmp_path, term_balance=SHARES, max_steps=2, **options)
    norms = gradient_norms(trainer.train_dataset)
    first, second = steps(trainer)
    configured = {"indirect": 0.1, "entropy": 1.0}
    for name, share in SHARES.items():
        assert first[f"term_weight/{name}"] == pytest.approx(configured[name])
        assert first[f"term_share/{name}"] == pytest.approx(configured[name] * norms[name] / norms["direct"], rel=1e-4)
        assert second[f"term_weight/{name}"] == pytest.approx(share * norms["direct"] / norms[name], rel=1e-4)


@pytest.mark.parametrize(
    ("method", "shares"),
    [
        ("tsd-kd", {"entropy": 2.0}),
        ("tsd-kd-released", SHARES),
        ("eopd-full", {"forward_kl": 1.0}),
        ("opd-entropy-bonus", {"entropy": 0.01}),
        ("kd", {"forward_kl": 3.0}),
    ],
)
def test_a_step_has_the_stated_shares_and_weights(method, shares, tmp_path):
    """On a student that doesn't move: the second measurement, after ten steps, finds the shares."""
    options = {"rollout_batch_size": 6} if "opd" in method else {}
    trainer = train(method, tmp_path, term_balance=shares, max_steps=11, learning_rate=1e-30, **options)
    configured, (first, *_, last) = trainer.objective.loss_weights, steps(trainer)
    for name, share in shares.items():
        assert first[f"term_share/{name}"] != pytest.approx(share, rel=0.1)
        assert last[f"term_share/{name}"] == pytest.approx(share, rel=1e-3)
        assert last[f"term_weight/{name}"] * configured[name] > 0  # a bonus stays one
    used = configured | {name: last[f"term_weight/{name}"] for name in shares}
    expected = sum(weight * last[f"loss/{name}"] for name, weight in used.items())
    assert last["loss"] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_measurements_are_averaged(tmp_path):
    """The logarithm of the ratio of the norms, half of it the newest."""
    trainer = train("tsd-kd", tmp_path, term_balance={"entropy": 0.5}, max_steps=22, learning_rate=0.1)
    logs = steps(trainer)
    used = [logs[i]["term_weight/entropy"] for i in (0, 10, 20)]
    ratios = [logs[i]["term_share/entropy"] / weight for i, weight in zip((0, 10, 20), used, strict=True)]
    assert ratios[1] != pytest.approx(ratios[0], rel=0.01)
    average = ratios[0]
    for at, ratio in ((1, ratios[0]), (11, ratios[1]), (21, ratios[2])):
        average = (average * ratio) ** 0.5
        assert logs[at]["term_weight/entropy"] == pytest.approx(0.5 / average, rel=1e-5)


@pytest.mark.parametrize("method", ["tsd-kd", "eopd"])
def test_resumes_bitwise(method, saved_model, rows_file, tmp_path):
    """After two measurements, so that the average counts for the third."""
    values = {"model_name_or_path": saved_model("llama", 0), "teacher_model_name_or_path": saved_model("qwen3", 1)}
    values |= {**QUIET, "dataset_name": rows_file, "method": method, "max_steps": 23, "save_steps": 13}
    values |= {"save_strategy": "steps", "logging_steps": 1, "learning_rate": 0.01, "resume": "true", "seed": 3}
    values |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_new_tokens": 8}
    values |= {"rollout_batch_size": 8, "entropy_threshold": 0.1} if method == "eopd" else {}
    values["term_balance"] = json.dumps({"forward_kl": 0.2} if method == "eopd" else SHARES)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["train", *flags(**values, output_dir=whole)]) == 0
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoint-23")
    for name in ("model.safetensors", "trainer_state.json"):
        (parts / name).unlink()
    assert main(["train", *flags(**values, output_dir=parts)]) == 0
    assert (weights(whole) == weights(parts)).all()
    logs = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in (whole, parts)]
    chosen = [[{k: v for k, v in entry.items() if k.startswith("term_")} for entry in log] for log in logs]
    assert chosen[0] == chosen[1]
    assert len({str(entry) for entry in chosen[0]}) > 3


def test_two_processes_choose_the_weights_of_one(saved_model, rows_file, tmp_path):
    values = {"model_name_or_path": saved_model("llama", 0), "teacher_model_name_or_path": saved_model("qwen3", 1)}
    values |= {**GIVEN, "lmbda": 1.0, "max_new_tokens": 12, "dataset_name": rows_file, "max_steps": 3}
    values |= {"save_strategy": "steps", "save_steps": 3}
    values["term_balance"] = json.dumps(SHARES)
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["train", *flags(**values, output_dir=one)]) == 0
    children = run_ranks(["train", *flags(**{**values, "per_device_train_batch_size": 3}, output_dir=two)], two)
    assert [child.wait() for child in children] == [0, 0], children[0].output[-2000:]
    files = [one / "checkpoint-3/process_0.safetensors", *sorted((two / "checkpoint-3").glob("process_*"))]
    alone, *ranks = (load_state(file)["trainer"]["term_balance"]["log_ratios"] for file in files)
    assert len(ranks) == 2 and ranks[0] == ranks[1]
    assert ranks[0] == pytest.approx(alone, rel=1e-4)
    start = weights(saved_model("llama", 0))
    assert (weights(one) - weights(two)).norm() <= 1e-4 * (weights(one) - start).norm()


def test_deepspeed_is_refused(saved_model, rows_file, tmp_path):
    pytest.importorskip("deepspeed")
    values = {"model_name_or_path": saved_model("llama", 0), "teacher_model_name_or_path": saved_model("qwen3", 1)}
    values |= {**QUIET, "dataset_name": rows_file, "output_dir": tmp_path / "out", "term_balance": json.dumps(SHARES)}
    environment = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "tsdkd", "train", *flags(**values)]
    result = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr[-2000:]
    assert "term_balance" in result.stderr and "DeepSpeed" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


class OwnWeights(TSDKDObjective):
    """Computes its loss with weights of its own."""

    def loss(self, statistics, completions):
        output = super().loss(statistics, completions)
        output.weights = dict(self.loss_weights)
        return output


class OwnWeightsTrainer(TSDKDTrainer):
    objective_class = OwnWeights


def test_an_objective_that_ignores_the_weights_is_refused(tmp_path):
    """When the first weights should have been used."""
    with pytest.raises(ConfigError, match=r"term_balance.*OwnWeights.*current_weights"):
        train("tsd-kd", tmp_path, OwnWeightsTrainer, term_balance=SHARES, max_steps=11)


def test_reentrant_checkpointing_is_refused(tmp_path):
    """It computes no gradients but those of the whole loss."""
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ConfigError, match="use_reentrant"):
        train("tsd-kd", tmp_path, term_balance=SHARES, **options)


@pytest.mark.parametrize("before", [{}, {"term_balance": {"indirect": 2.0}}], ids=["off", "another term"])
def test_a_script_may_add_terms_when_it_resumes(before, tmp_path):
    saves = {"save_strategy": "steps", "save_steps": 10, "max_steps": 10}
    train("tsd-kd", tmp_path, **saves, **before)
    options = {**saves, "max_steps": 12, "term_balance": {"entropy": 0.5}}
    trainer = train("tsd-kd", tmp_path, resume=str(tmp_path / "checkpoint-10"), **options)
    eleventh, twelfth = steps(trainer)[-2:]
    assert eleventh["term_weight/entropy"] == 1.0
    expected = 0.5 / eleventh["term_share/entropy"]
    assert twelfth["term_weight/entropy"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shares", [{"direct": 1.0}, {"indirekt": 1.0}, {"entropy": -1.0}, {}])
def test_a_trainer_refuses_what_the_command_line_refuses(shares, tmp_path):
    with pytest.raises(ConfigError, match="term_balance"):
        train("tsd-kd", tmp_path, term_balance=shares)


def test_a_configuration_holds_the_shares(tmp_path):
    assert TSDKDConfig(str(tmp_path), **QUIET, term_balance={"entropy": "5e-1"}).term_balance == {"entropy": 0.5}
