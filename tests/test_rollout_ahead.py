"""`rollout_ahead: 1` with a live vLLM server: whose samples a step trains on, and that a run can be repeated."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from transformers import AutoModelForCausalLM

from conftest import DDP, QUIET, flags, launch, make_rows, weights, write_jsonl
from test_teacher_server import TeacherServer
from test_trainers import config, rows, train
from test_vllm_server import SIZE, Server, logs_of
from tsdkd import ConfigError, EOPDConfig, EOPDTrainer, TSDKDConfig, TSDKDTrainer
from tsdkd.cli import main

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

AHEAD = {"use_vllm": True, "vllm_mode": "server", "rollout_ahead": 1, "vllm_check_every": 2}
RUN = {**QUIET, **AHEAD, "max_length": 64, "max_new_tokens": 12, "per_device_train_batch_size": 4, "max_steps": 8}
RUN |= {"optim": "sgd", "learning_rate": 0.3, "lr_scheduler_type": "constant", "warmup_steps": 0, "seed": 3}
RUN |= {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
EPOCH = 6  # steps, with 24 rows
ANSWERED = "vllm:e2e_request_latency_seconds_count"


@pytest.fixture(scope="module")
def server(saved_model: Callable[..., str]) -> Iterator[Server]:
    started = Server(saved_model("llama", 0, **SIZE), dtype="float32")
    try:
        yield started.wait()
    finally:
        started.kill()


@pytest.fixture
def run(saved_model, rows_file, tmp_path, server) -> Callable[..., Path]:
    def train_in(folder: str, code: int = 0, **values: Any) -> Path:
        names = {"model_name_or_path": saved_model("llama", 0, **SIZE), "dataset_name": rows_file}
        names |= {"teacher_model_name_or_path": saved_model("llama", 1, **SIZE), "vllm_server_port": server.port}
        assert main(["train", *flags(**names, **{**RUN, **values}, output_dir=tmp_path / folder)]) == code
        return tmp_path / folder

    return train_in


class Recording(EOPDTrainer):
    """Keeps the weights before each step, and what each step trains on."""

    def get_batch_samples(self, *args: Any) -> Any:
        found = super().get_batch_samples(*args)
        self.steps = getattr(self, "steps", [])
        batches = [batch for entry in found[0] for batch in entry]
        self.steps.append(({n: p.detach().clone() for n, p in self.model.named_parameters()}, batches))
        return found


@pytest.mark.parametrize("steps_per_rollout", [1, 2])
def test_each_rollout_is_of_the_weights_before_the_step_that_precedes_it(
    steps_per_rollout, server, saved_model, tmp_path
):
    """EOPD's old policy is the one that sampled, and the ratio is that of the policy that is trained."""
    student, teacher = saved_model("llama", 0, **SIZE), saved_model("llama", 1, **SIZE)
    options = {**AHEAD, "vllm_server_port": server.port, "rollout_batch_size": 4 * steps_per_rollout}
    options |= {"per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 0.3, "log_term_gradients": 0}
    trainer = train(Recording, config(EOPDConfig, tmp_path, **options), student, teacher, rows(16))
    behind = {1: [0, 1, 1, 1, 0, 1], 2: [0, 1, 1, 2, 0, 1]}[steps_per_rollout]  # four steps are an epoch
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["policy/weights_behind"] for entry in logs] == behind

    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    for step, (log, (_, (batch,))) in enumerate(zip(logs, trainer.steps, strict=True)):
        model.load_state_dict(trainer.steps[step - behind[step]][0], strict=False)
        with torch.no_grad():
            logps = model(input_ids=batch["input_ids"]).logits.log_softmax(-1)
        own = [
            logps[row, prompt - 1 + i, batch["input_ids"][row, prompt + i]]
            for row, (prompt, length) in enumerate(zip(batch["prompt_lengths"], batch["lengths"], strict=True))
            for i in range(length)
        ]
        old = batch["scores"]["old_per_token_logps"]
        torch.testing.assert_close(old, torch.stack(own), atol=2e-4, rtol=0)
        assert (abs(log["policy/ratio"] - 1) < 1e-3) == (behind[step] == 0)


@pytest.mark.parametrize(
    ("values", "steps"),
    [
        ({"method": "tsd-kd"}, (2, EPOCH)),  # with a rollout ahead, and at the end of an epoch, without one
        ({"method": "eopd", "rollout_batch_size": 8}, (1,)),  # in the middle of a rollout
    ],
)
def test_a_run_can_be_repeated_and_resumed(values, steps, run):
    folder = run("once", **values)
    expected = weights(folder)

    # evaluation between the steps needs the server, too, with other weights
    held_out = write_jsonl(folder.parent / "held_out.jsonl", make_rows(6, seed=5))
    again = run("again", **values, eval_strategy="steps", eval_steps=2, eval_dataset_name=held_out)
    assert torch.equal(weights(again), expected)

    for step in steps:
        shutil.copytree(folder, folder.parent / "resumed")
        for checkpoint in folder.glob("checkpoint-*"):
            if int(checkpoint.name.removeprefix("checkpoint-")) > step:
                shutil.rmtree(folder.parent / "resumed" / checkpoint.name)
        assert torch.equal(weights(run("resumed", **values, resume="true")), expected)
        shutil.rmtree(folder.parent / "resumed")


@pytest.fixture(scope="module")
def teacher(saved_model: Callable[..., str]) -> Iterator[dict[str, str]]:
    """The options of a teacher on a server."""
    float32 = json.dumps({"dtype": "float32"})
    started = TeacherServer(saved_model("llama", 1, **SIZE), teacher_model_init_kwargs=float32)
    try:
        url = started.wait().url
        yield {"teacher_placement": "server", "teacher_server_base_url": url, "teacher_model_init_kwargs": float32}
    finally:
        started.kill()


@pytest.mark.parametrize("with_servers", [False, True], ids=["local teacher", "teacher on a server"])
def test_two_processes(with_servers, server, saved_model, rows_file, tmp_path, request):
    names = {"model_name_or_path": saved_model("llama", 0, **SIZE), "dataset_name": rows_file}
    names |= {"teacher_model_name_or_path": saved_model("llama", 1, **SIZE), "vllm_server_port": server.port}
    names |= request.getfixturevalue("teacher") if with_servers else {}
    for folder, batch, launcher in (("one", 4, None), ("two", 2, DDP)):
        values = {**names, **RUN, "per_device_train_batch_size": batch, "output_dir": tmp_path / folder}
        if launcher is None:
            assert main(["train", *flags(**values)]) == 0
        else:
            launch(launcher, ["train", *flags(**values)])
    logs = [logs_of(tmp_path / folder) for folder in ("one", "two")]
    assert [entry["policy/weights_behind"] for entry in logs[1]] == [0, 1, 1, 1, 1, 1, 0, 1]
    for one, two in zip(*logs, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)


@pytest.mark.parametrize("method", ["tsd-kd", "eopd"])
def test_with_the_teacher_on_a_server_too(method, teacher, run, tmp_path):
    """Also with evaluations in between, which ask the teacher for other sequences."""
    expected = weights(run("local", method=method))
    held_out = write_jsonl(tmp_path / "held_out.jsonl", make_rows(6, seed=5))
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset_name": held_out}
    for folder, values in (("served", {}), ("evaluated", evaluated)):
        found = weights(run(folder, **teacher, **values, method=method))
        assert torch.allclose(found, expected, rtol=0, atol=1e-4)


def test_the_teacher_scores_while_the_student_trains(server, teacher, saved_model, tmp_path):
    """When a step begins whose completions were sampled ahead, the teacher's server has answered for all of them."""

    def num_answered() -> float:
        metrics = requests.get(teacher["teacher_server_base_url"] + "/metrics", timeout=60).text
        return sum(float(line.split()[-1]) for line in metrics.splitlines() if line.startswith(ANSWERED))

    class Waiting(TSDKDTrainer):
        steps_ahead = []

        def _roll_out(self, model: Any, parts: Any, step: int, mode: str) -> Any:
            if self._rollout_ahead is not None:
                deadline = time.monotonic() + 300
                while num_answered() < before + 4 * (step + 1):
                    assert time.monotonic() < deadline, "the teacher hasn't been asked"
                    time.sleep(0.05)
                self.steps_ahead.append(step)
            return super()._roll_out(model, parts, step, mode)

    options = {**RUN, **teacher, "teacher_model_init_kwargs": {"dtype": "float32"}, "vllm_server_port": server.port}
    trainer = Waiting(
        model=saved_model("llama", 0, **SIZE),
        teacher_model=saved_model("llama", 1, **SIZE),
        args=config(TSDKDConfig, tmp_path, **options),
        train_dataset=rows(24),
    )
    before = num_answered()
    trainer.train()
    assert Waiting.steps_ahead == [1, 2, 3, 4, 5, 7]  # six steps are an epoch


def test_a_server_that_dies_while_the_student_trains(saved_model, run, server, capsys):
    def kill_after_two_checkpoints() -> None:
        while not (folder / "checkpoint-2" / "trainer_state.json").exists():
            time.sleep(0.01)
        server.kill()

    folder = run("reference").parent / "killed"
    expected = weights(folder.parent / "reference")
    killer = threading.Thread(target=kill_after_two_checkpoints)
    killer.start()
    capsys.readouterr()
    run("killed", code=2, max_steps=500)
    killer.join()
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tsdkd train:")]
    assert len(errors) == 1 and "--resume true" in errors[0]

    server.process = Server(saved_model("llama", 2, **SIZE), server.port, "float32").wait().process
    for checkpoint in folder.glob("checkpoint-*"):
        if int(checkpoint.name.removeprefix("checkpoint-")) > 2:
            shutil.rmtree(checkpoint)
    assert torch.equal(weights(run("killed", resume="true")), expected)


def test_a_trainer_that_chooses_completions_of_its_own_is_refused(saved_model, tmp_path):
    class Own(EOPDTrainer):
        def _select_completions(self, *args: Any) -> Any:
            return super()._select_completions(*args)

    with pytest.raises(ConfigError, match="rollout_ahead: Own"):
        train(Own, config(EOPDConfig, tmp_path, **AHEAD), saved_model("llama", 0), saved_model("llama", 1))
