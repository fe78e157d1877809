"""Several processes: DDP and ZeRO take the steps of one process, wherever the teacher is."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import flags, on_cpus, run_to_end, weights
from crash import wait_for
from preloaded import python
from tsdkd.cli import main
from tsdkd.errors import PreemptedError

pytest.importorskip("deepspeed")

RUN = {"use_cpu": "true", "bf16": "false", "disable_tqdm": "true", "max_length": 64, "max_new_tokens": 12, "seed": 7}
RUN |= {"optim": "sgd", "max_grad_norm": 0, "lr_scheduler_type": "constant", "learning_rate": 0.1, "warmup_steps": 0}
RUN |= {"gradient_checkpointing": "true", "report_to": "none", "log_term_gradients": 0, "max_steps": 5}


@pytest.fixture
def command(saved_model, rows_file, tmp_path):
    """A run of five steps, whose students' layers are all sharded under ZeRO-3."""

    def make(method: str, folder: str, batch: int, **changes: object) -> list[str]:
        family = {"tsd-kd": "gemma2", "eopd": "llama"}[method]  # tied and soft-capped; a head of its own
        values = {
            "model_name_or_path": saved_model(family, 0),
            "teacher_model_name_or_path": saved_model("qwen3", 1, rows=70, hidden=48),
            "dataset_name": rows_file,
            "method": method,
            "output_dir": tmp_path / folder,
            "per_device_train_batch_size": batch,
            "logging_steps": 1,
            "save_steps": 5,
            **({"rollout_batch_size": 8} if method == "eopd" else {}),
        }
        return ["train", *flags(**{**values, **RUN, **changes})]

    return make


def launcher(command: list[str], config: str, processes: int = 2) -> list[str]:
    """`tsdkd train` that starts its own processes."""
    several = ["--accelerate_config", config, "--num_processes", str(processes), "--main_process_port", "0"]
    return ["-m", "tsdkd", *command, *several]


def start(command: list[str], config: str, processes: int = 2) -> subprocess.CompletedProcess:
    """It, on the CPU, to its end."""
    return run_to_end([python(), *launcher(command, config, processes)], on_cpus())


def logged(folder: Path, name: str) -> list[float]:
    """A metric at each step."""
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry[name] for entry in state["log_history"] if name in entry]


def losses(folder: Path) -> list[float]:
    """Of each step."""
    return logged(folder / "checkpoint-5", "loss")


AS_ON_CUDA = """
from torch.nn.parallel import DistributedDataParallel
init = DistributedDataParallel.__init__
def init_for_a_device(self, *args, **kwargs):
    init(self, *args, **kwargs)
    self.device_ids, self.device_type = [0], "cpu"
DistributedDataParallel.__init__ = init_for_a_device
"""


@pytest.fixture
def ddp_as_on_cuda(tmp_path, monkeypatch):
    """DDP knows its device and moves its inputs there, as accelerate makes it on CUDA."""
    (tmp_path / "sitecustomize.py").write_text(AS_ON_CUDA)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Method -> losses and student of one process, made on first use."""
    made = {}

    def of(method, command):
        if method not in made:
            folder = tmp_path_factory.mktemp(method) / "plain"
            assert main(command(method, folder, 4)) == 0
            made[method] = losses(folder), weights(folder)
        return made[method]

    return of


CASES = [
    ("tsd-kd", "ddp", "zero3"),
    ("tsd-kd", "zero1", "replica"),
    ("tsd-kd", "zero3", "replica"),
    ("eopd", "zero2", "cpu_offload"),
]
MORE = [("tsd-kd", "ddp", "replica"), ("tsd-kd", "zero2", "cpu_offload"), ("tsd-kd", "zero3", "zero3")]
MORE += [("eopd", "zero1", "zero3"), ("eopd", "zero2", "replica"), ("eopd", "zero3", "cpu_offload")]
MORE += [("eopd", "ddp", "replica"), ("eopd", "zero3", "zero3")]


@pytest.mark.parametrize("method, config, teacher", CASES + MORE)
def test_the_steps_of_one_process(method, config, teacher, plain, command, saved_model, tmp_path, long):
    if (method, config, teacher) in MORE and not long:
        pytest.skip("--long runs it")
    expected_losses, expected = plain(method, command)
    result = start(command(method, "several", 2, teacher_placement=teacher), config)
    assert result.returncode == 0, result.stderr[-3000:]
    before, found = weights(saved_model("gemma2" if method == "tsd-kd" else "llama", 0)), weights(tmp_path / "several")
    assert (found - expected).norm() <= 1e-4 * (expected - before).norm()
    assert losses(tmp_path / "several") == pytest.approx(expected_losses, rel=1e-4)


@pytest.mark.parametrize("method, config", [("tsd-kd", "zero1"), ("eopd", "zero2"), ("tsd-kd", "zero3")])
def test_several_micro_batches_in_place_of_a_batch(method, config, plain, command, saved_model, tmp_path):
    """Their number differs from gradient_accumulation_steps, which DeepSpeed was configured with."""
    expected_losses, expected = plain(method, command)
    result = start(command(method, "several", 2, max_tokens_per_micro_batch=24), config)
    assert result.returncode == 0, result.stderr[-3000:]
    before, found = weights(saved_model("gemma2" if method == "tsd-kd" else "llama", 0)), weights(tmp_path / "several")
    assert (found - expected).norm() <= 1e-4 * (expected - before).norm()
    assert losses(tmp_path / "several") == pytest.approx(expected_losses, rel=1e-4)


HALF = [
    ("tsd-kd", "ddp"),
    ("tsd-kd", "zero1"),
    ("tsd-kd", "zero3"),
    ("eopd", "ddp"),
    ("eopd", "zero1"),
    ("eopd", "zero2"),
]
MORE_HALF = [("tsd-kd", "zero2"), ("eopd", "zero3")]


@pytest.mark.parametrize("method, config", HALF + MORE_HALF)
def test_a_step_in_bfloat16(method, config, command, saved_model, tmp_path, long, ddp_as_on_cuda):
    """As large as in float32, up to what bfloat16 rounds; and the policy that sampled is still the student's."""
    if (method, config) in MORE_HALF and not long:
        pytest.skip("--long runs it")
    step = {"max_steps": 1, "lmbda": 0, "learning_rate": 1.0, "save_strategy": "no", "save_steps": 500}
    assert main(command(method, "exact", 8, **step)) == 0
    result = start(command(method, "half", 4, **step, bf16="true"), config)
    assert result.returncode == 0, result.stderr[-3000:]
    before = weights(saved_model("gemma2" if method == "tsd-kd" else "llama", 0))
    exact, half = (weights(tmp_path / name) - before for name in ("exact", "half"))
    assert (half - exact).norm() <= 0.2 * exact.norm()
    if method == "eopd":
        assert logged(tmp_path / "half", "policy/approx_kl") == [pytest.approx(0, abs=1e-8)]


def test_an_offloaded_teacher_of_one_process(plain, command, tmp_path):
    _, expected = plain("tsd-kd", command)
    result = start(command("tsd-kd", "one", 4, teacher_placement="cpu_offload"), "single", 1)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (weights(tmp_path / "one") - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("method, config", [("tsd-kd", "zero2"), ("eopd", "zero3")])
def test_a_resumed_run_is_bitwise_the_same(method, config, command, tmp_path, long):
    if config == "zero2" and not long:
        pytest.skip("--long runs it")
    values = {"save_steps": 2, "optim": "adamw_torch", "learning_rate": 0.01}
    whole, parts = (command(method, name, 2, resume="true", **values) for name in ("whole", "parts"))
    assert start(whole, config).returncode == 0
    assert start(parts, config).returncode == 0
    for step in (4, 5):
        shutil.rmtree(tmp_path / "parts" / f"checkpoint-{step}", ignore_errors=True)
    (tmp_path / "parts" / "model.safetensors").unlink()
    for file in (tmp_path / "parts" / "checkpoint-2").rglob("*_optim_states.pt"):
        state = torch.load(file, weights_only=False)
        stage = state["optimizer_state_dict"]["zero_stage"]
        state["optimizer_state_dict"]["zero_stage"] = Attribute(type(stage), stage.name)
        rewrite(file, state)
    result = start(parts, config)
    assert result.returncode == 0, result.stderr[-3000:]
    assert torch.equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_what_grpo_keeps_of_a_rollout_is_not_rounded_by_a_resume(demo_rows, tmp_path):
    """On the demo, with two mini-batches a rollout, stopped between them."""
    pytest.importorskip("math_verify")
    values = {"per_device_train_batch_size": 16, "num_generations": 4, "rollout_batch_size": 8, "max_steps": 2}
    values |= {"save_strategy": "steps", "save_steps": 1, "resume": "true", "report_to": "none", "bf16": "true"}
    values |= {"warmup_steps": 0, "learning_rate": 0.1, "optim": "sgd", "output_dir": tmp_path / "out"}
    values |= {"dataset_name": demo_rows}
    command = ["train", "--config", "demo.yaml", "--method", "grpo", *flags(**values)]
    assert start(command, "zero2", 1).returncode == 0
    expected = weights(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoint-2")
    (tmp_path / "out" / "model.safetensors").unlink()
    result = start(command, "zero2", 1)
    assert result.returncode == 0, result.stderr[-3000:]
    assert torch.equal(weights(tmp_path / "out"), expected)
    assert not torch.equal(weights(tmp_path / "out" / "checkpoint-1"), expected)


class Payload:
    """What a stranger's checkpoint may hold."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class Attribute:
    """Pickled as Python 3.11.0 to 3.11.3 pickles the member of an enum."""

    def __init__(self, owner: type, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


def rewrite(file: Path, state: object) -> None:
    """Replace a file of a checkpoint, and set its manifest right: who can do the one can do the other."""
    torch.save(state, file)
    folder = file.parents[1]
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("sha256")
    name = str(file.relative_to(folder))
    manifest["files"][name] = [file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()]
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"sha256": digest, **manifest}))


def test_a_checkpoint_with_code_in_it(command, tmp_path):
    argv = command("tsd-kd", "out", 2, save_steps=2, resume="true", max_steps=2)
    assert start(argv, "zero2").returncode == 0
    file = tmp_path / "out/checkpoint-2/global_step2/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    for payload in (Payload(tmp_path / "ran"), Attribute(torch.optim.Optimizer, "load_state_dict")):
        rewrite(file, {"state": payload})
        result = start([*argv, "--max_steps", "4"], "zero2")
        assert not (tmp_path / "ran").exists()
        assert result.returncode == 2 and file.name in result.stderr, result.stderr[-3000:]


def test_a_launcher_that_is_terminated(command, tmp_path):
    """It passes the signal on, and waits until the processes have saved."""
    folder = tmp_path / "out"
    values = {"save_steps": 10_000, "max_steps": 10_000}
    program = [sys.executable, *launcher(command("tsd-kd", "out", 2, **values), "ddp")]
    process = subprocess.Popen(program, env=on_cpus(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(folder / "tsdkd_config.yaml")
    process.terminate()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == PreemptedError.exit_code
    assert "continue with: tsdkd train" in errors and (folder / ".preempted").exists()
    (checkpoint,) = folder.glob("checkpoint-*")
    assert (checkpoint / "manifest.json").exists()


def test_a_lock_that_a_killed_compilation_left(tmp_path):
    """DeepSpeed would wait for it, forever and silently."""
    (tmp_path / "comm").mkdir()
    (tmp_path / "comm" / "lock").touch()
    environment = on_cpus() | {"ACCELERATE_USE_DEEPSPEED": "true", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tsdkd", "train", "--config", "nowhere.yaml"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert str(tmp_path / "comm" / "lock") in result.stderr


def test_what_a_launch_says(command, tmp_path):
    """One line from the first process, and its exit code; nothing of the launcher's."""
    result = start(command("tsd-kd", "out", 2, learning_rat=1), "ddp")
    assert result.returncode == 2
    assert result.stderr.strip().count("\n") == 0 and "learning_rat" in result.stderr
    result = start(command("tsd-kd", "out", 2), "zero9")
    assert result.returncode == 2 and "accelerate_config" in result.stderr and "zero3" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_launch_whose_first_process_is_late(command, tmp_path, monkeypatch):
    """It is the one that says what is wrong with all."""
    (tmp_path / "sitecustomize.py").write_text("import os, time\ntime.sleep(3 * (os.environ.get('RANK') == '0'))\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    result = start(command("tsd-kd", "out", 2, learning_rat=1), "ddp")
    assert result.returncode == 2
    assert result.stderr.strip().count("\n") == 0 and "learning_rat" in result.stderr
