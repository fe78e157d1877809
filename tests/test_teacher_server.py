"""A teacher on vLLM servers: the same losses and gradients as with a local one, and servers that fail."""

import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import torch

from conftest import DDP, QUIET, VLLM_ON_CPUS, flags, launch, weights, zero_launcher
from preloaded import python
from test_trainers import config, first_log, train
from test_vllm_server import Server, free_port
from tsdkd.cli import main
from tsdkd.methods import METHODS

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

SIZE = {"hidden": 64, "head_dim": 32}
PAIRS = {
    "qwen2, tied": ("qwen2", 64, "float32"),
    "qwen3, bfloat16": ("qwen3", 64, "bfloat16"),
    "gemma2, soft cap": ("gemma2", 64, "float32"),
    "llama, padded vocabulary": ("llama", 80, "float32"),  # the last: the next tests use its server, too
}
"""Name -> family, number of logits and dtype of the teacher."""


class TeacherServer(Server):
    """`tsdkd serve teacher` on the loopback."""

    def __init__(self, teacher: str, port: int | None = None, **options: object) -> None:
        self.port = port or free_port()
        values = {"model_name_or_path": teacher, "teacher_model_name_or_path": teacher, "max_length": 64, **options}
        values |= {"dataset_name": "rows.jsonl", "output_dir": "unused"}
        command = [python(), "-m", "tsdkd", "serve", "teacher", *flags(**values)]
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port)],
            env={**os.environ, **VLLM_ON_CPUS},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            process_group=0,
        )
        self.is_ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()  # or its pipe would fill up

    def _read(self) -> None:
        for line in self.process.stdout:
            if line.startswith(f"ready: {self.url} "):
                self.is_ready.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait(self) -> "TeacherServer":
        while not self.is_ready.wait(1):
            assert self.process.poll() is None, "the server ended"
        return self


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[..., TeacherServer]]:
    """Starts servers, one at a time: each needs a GiB."""
    running: dict[tuple, TeacherServer] = {}

    def start(teacher: str, **options: object) -> TeacherServer:
        key = (teacher, *options.items())
        if key not in running:
            for other in running.values():
                other.kill()
            running.clear()
            running[key] = TeacherServer(teacher, **options).wait()
        return running[key]

    yield start
    for server in running.values():
        server.kill()


FLOAT32 = {"dtype": "float32"}


def local_and_served(method: str, pair: tuple[str, str], url: str, folder: Path, **options: Any) -> list[Any]:
    """Trains for two steps of SGD with the teacher in this process, and with the server's."""
    cls = METHODS[method]
    if hasattr(cls.config_class, "rollout_batch_size"):
        options["rollout_batch_size"] = 6
    trainers = []
    for placement in ({}, {"teacher_placement": "server", "teacher_server_base_url": url}):
        path = folder / str(len(trainers))
        values = {"teacher_model_init_kwargs": FLOAT32, "learning_rate": 0.1, "max_steps": 2, **options, **placement}
        trainers.append(train(cls, config(cls.config_class, path, **values), *pair))
        trainers[-1].save_model()
    return trainers


@pytest.mark.parametrize("name", PAIRS)
def test_a_served_teacher_gives_the_steps_of_a_local_one(name, serve, saved_model, tmp_path):
    family, num_rows, dtype = PAIRS[name]
    pair, kwargs = (saved_model(family, 0, **SIZE), saved_model(family, 1, num_rows, **SIZE)), {"dtype": dtype}
    url = serve(pair[1], teacher_model_init_kwargs=json.dumps(kwargs)).url
    is_exact = dtype == "float32"
    # what TSD-KD ranks and selects may change with rounding, and after the first step what the student says
    method, max_steps = ("tsd-kd", 2) if is_exact else ("gkd", 1)
    options = {"teacher_model_init_kwargs": kwargs, "max_steps": max_steps}
    local, served = local_and_served(method, pair, url, tmp_path, **options)
    assert first_log(served)["loss"] == pytest.approx(first_log(local)["loss"], rel=1e-5 if is_exact else 0.02)
    change = (weights(tmp_path / "0") - weights(Path(pair[0]))).norm()
    assert (weights(tmp_path / "1") - weights(tmp_path / "0")).norm() < (1e-4 if is_exact else 0.05) * change
    held = sum(p.numel() for p in served.teacher_model.parameters())
    assert held == num_rows * SIZE["hidden"]


ASKING = ["distillm", "eopd", "eopd-full", "gkd", "kd", "opd", "opd-advantage-shaping", "supervised-kd"]


@pytest.mark.parametrize("method", ASKING)
def test_every_method_that_asks_the_teacher(method, serve, saved_model, tmp_path):
    pair = saved_model("llama", 0, **SIZE), saved_model("llama", 1, 80, **SIZE)
    url = serve(pair[1], teacher_model_init_kwargs=json.dumps(FLOAT32)).url
    local, served = local_and_served(method, pair, url, tmp_path)
    assert first_log(served)["loss"] == pytest.approx(first_log(local)["loss"], rel=1e-5)
    assert torch.allclose(weights(tmp_path / "1"), weights(tmp_path / "0"), rtol=0, atol=1e-5)


def test_prompts_of_the_teachers_own_and_padded_batches(serve, saved_model, tmp_path):
    pair = saved_model("llama", 0, **SIZE), saved_model("llama", 1, 80, **SIZE)
    url = serve(pair[1], teacher_model_init_kwargs=json.dumps(FLOAT32)).url
    own = {"teacher_chat_template_kwargs": {"x": 1}, "padding_free": False, "record_steps": 1}
    local, served = local_and_served("tsd-kd", pair, url, tmp_path, **own)
    assert first_log(served)["loss"] == pytest.approx(first_log(local)["loss"], rel=1e-5)
    records = [pq.read_table(tmp_path / run / "records" / "step-00000000.parquet") for run in ("0", "1")]
    for name in ("teacher_entropy", "teacher_logp"):
        found, expected = (torch.tensor(table[name].to_numpy()) for table in records)
        assert torch.allclose(found, expected, atol=1e-4)


def test_a_run_that_starts_its_server(saved_model, rows_file, tmp_path, monkeypatch):
    for name, value in VLLM_ON_CPUS.items():
        monkeypatch.setenv(name, value)
    names = {"model_name_or_path": saved_model("llama", 0, **SIZE), "dataset_name": rows_file}
    names |= {"teacher_model_name_or_path": saved_model("llama", 1, 80, **SIZE)}
    before = set(psutil.Process().children(recursive=True))
    assert main(["train", *flags(**names, **RUN, output_dir=tmp_path / "local")]) == 0
    assert main(["train", "--teacher_gpus", "1", *flags(**names, **RUN, output_dir=tmp_path / "served")]) == 0
    assert torch.allclose(weights(tmp_path / "local"), weights(tmp_path / "served"), rtol=0, atol=1e-5)
    assert set(psutil.Process().children(recursive=True)) <= before  # the server has ended


@pytest.mark.parametrize("zero", [False, True], ids=["DDP", "ZeRO-3"])
def test_two_processes_take_the_same_steps(zero, serve, saved_model, rows_file, tmp_path):
    names = {"model_name_or_path": saved_model("llama", 0, **SIZE), "dataset_name": rows_file}
    names |= {"teacher_model_name_or_path": saved_model("llama", 1, 80, **SIZE)}
    url = serve(names["teacher_model_name_or_path"], teacher_model_init_kwargs=json.dumps(FLOAT32)).url
    server = {"teacher_placement": "server", "teacher_server_base_url": url}
    launcher = zero_launcher(3, tmp_path) if zero else DDP
    for folder, placement in (("local", {}), ("served", server)):
        launch(launcher, ["train", *flags(**names, **RUN, **placement, output_dir=tmp_path / folder)])
    assert torch.allclose(weights(tmp_path / "local"), weights(tmp_path / "served"), rtol=0, atol=1e-5)


RUN = {**QUIET, "max_length": 64, "max_new_tokens": 12, "per_device_train_batch_size": 4, "max_steps": 12}
RUN |= {"optim": "sgd", "learning_rate": 0.1, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
RUN |= {"teacher_model_init_kwargs": json.dumps(FLOAT32), "seed": 3}


def test_a_server_that_hangs_dies_or_comes_back(saved_model, rows_file, tmp_path, capsys):
    """One story, because a server needs half a minute to start."""
    teacher, other = saved_model("llama", 1, 80, **SIZE), saved_model("llama", 2, 80, **SIZE)
    port = free_port()
    names = {"model_name_or_path": saved_model("llama", 0, **SIZE), "dataset_name": rows_file}
    names |= {"teacher_model_name_or_path": teacher, "teacher_placement": "server"}
    names |= {"teacher_server_base_url": f"http://127.0.0.1:{port}"}
    running: list[TeacherServer] = []

    def start(model: str) -> None:
        running.append(TeacherServer(model, port, teacher_model_init_kwargs=json.dumps(FLOAT32)))

    def run(folder: str, timeout: float = 300.0, then: Callable[[], None] | None = None, **options: Any) -> int:
        """Train; `then` is called after the second checkpoint."""

        def watch() -> None:
            while not (tmp_path / folder / "checkpoint-2" / "trainer_state.json").exists():
                if is_over.wait(0.01):
                    return
            then()

        is_over, watcher = threading.Event(), threading.Thread(target=watch)
        if then is not None:
            watcher.start()
        values = {**names, **RUN, "output_dir": tmp_path / folder, "teacher_server_timeout": timeout, **options}
        code = main(["train", *flags(**values)])
        is_over.set()
        if then is not None:
            watcher.join()
        return code

    def error() -> str:
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("tsdkd train:"))
        return line

    try:
        start(teacher)
        assert run("reference") == 0  # which waits for the server
        expected = weights(tmp_path / "reference")
        capsys.readouterr()

        # it hangs; when it answers again, the run can be resumed
        hang = {"max_steps": 500}
        assert run("hung", 30.0, lambda: os.killpg(running[-1].process.pid, signal.SIGSTOP), **hang) == 2
        assert "no answer in time" in error()
        os.killpg(running[-1].process.pid, signal.SIGCONT)

        # in the middle of a run, another model takes its place
        def replace() -> None:
            running[-1].kill()
            start(other)

        assert run("replaced", then=replace, max_steps=500) == 2
        assert "another model or another revision" in error()

        # a new run doesn't start with it
        assert run("fresh") == 2
        assert f"serves {other}" in error() and not (tmp_path / "fresh").exists()

        # nor without any server; and the checkpoints stay
        running[-1].kill()
        assert run("replaced", 1.0, resume="true") == 2
        assert f"no answer from http://127.0.0.1:{port}" in error()

        # while it is down, the run waits; then it takes the steps that it would have taken
        def restart() -> None:
            running[-1].kill()
            start(teacher)

        start(teacher)
        assert run("restarted", then=restart) == 0
        assert torch.equal(weights(tmp_path / "restarted"), expected)
        shutil.rmtree(tmp_path / "reference")
    finally:
        for server in running:
            server.kill()
