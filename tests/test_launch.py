"""How a run's processes are started: by the YAML's keys, by flags, by itself, and never twice."""

import json
import os
import socketserver
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from conftest import QUIET, on_cpus, run_to_end
from preloaded import python
from test_cli import WITHOUT, without_extras
from tsdkd.cli import main
from tsdkd.compare.config import read_comparison
from tsdkd.config.launch import LAUNCHED
from tsdkd.errors import ConfigError
from tsdkd.launch.processes import resolve_launch
from tsdkd.run.arguments import parse_args_and_config
from tsdkd.run.output_dir import RUN_CONFIG_NAME

EPOCH = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


@pytest.fixture
def config(saved_model, rows_file, tmp_path):
    """`config(**values)` -> the path of a run's YAML; its output is `out` beside it."""

    def write(**values: object) -> str:
        names = {
            "model_name_or_path": saved_model("qwen3", 0),
            "teacher_model_name_or_path": saved_model("qwen3", 1),
            "dataset_name": rows_file,
            "output_dir": str(tmp_path / "out"),
            "max_length": 64,
            "max_new_tokens": 8,
            "max_steps": 2,
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({**names, **QUIET, **values}))
        return str(tmp_path / "run.yaml")

    return write


def test_every_command_takes_a_file_that_says_how_to_launch(config, tmp_path, capsys):
    file = config(accelerate_config="ddp", num_processes=1)
    assert main(["train", "--config", file, "--dry_run"]) == 0
    assert main(["plan", "--config", file]) == 0
    assert "for 1 x 80 GiB (no GPU found" in capsys.readouterr().out
    assert main(["slurm", "--config", file, "--time", "01:00:00"]) == 0
    assert main(["generate", "--config", file, "--output_file", str(tmp_path / "rows.jsonl")]) == 0
    comparison = {"config": file, "output_dir": str(tmp_path / "c"), "seeds": [1], "runs": {"a": {}}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(comparison))
    assert main(["compare", "--config", str(tmp_path / "c.yaml"), "--slurm"]) == 0


def test_a_comparison_launches_as_its_configuration_does(config, tmp_path):
    """Unless it says otherwise."""
    shared = {"config": config(num_processes=2), "output_dir": str(tmp_path / "c"), "seeds": [1], "runs": {"a": {}}}
    for own, expected in (({}, ("ddp", 2)), ({"accelerate_config": "zero2", "num_processes": 3}, ("zero2", 3))):
        (tmp_path / "c.yaml").write_text(yaml.safe_dump({**shared, **own}))
        comparison = read_comparison(str(tmp_path / "c.yaml"))
        start = comparison.launch_spec(comparison.tasks[-1])
        assert start and (start.config, start.num_processes) == expected


def test_what_cannot_be_launched_is_told_with_all_else(config, capsys):
    assert main(["train", "--config", config(accelerate_config="zero9", num_processes=0, beta=7), "--dry_run"]) == 2
    error = capsys.readouterr().err
    assert all(key in error for key in ("accelerate_config", "zero9", "num_processes", "beta"))


def test_a_run_goes_on_however_it_is_launched(config, tmp_path):
    assert main(["train", "--config", config(save_strategy="steps", save_steps=1)]) == 0
    changed = config(save_strategy="steps", save_steps=1, max_steps=3, num_processes=1, accelerate_config="single")
    assert main(["train", "--config", changed, "--resume", "true"]) == 0
    assert yaml.safe_load((tmp_path / "out" / RUN_CONFIG_NAME).read_text())["num_processes"] == 1


# what is started --------------------------------------------------------------------------------------------------


GPUS = "import sys, tsdkd.launch.processes as p; p.num_visible_gpus = lambda: {gpus}\nfrom tsdkd.cli import main\n"
GPUS += "sys.exit(main(sys.argv[1:]))"


def train(file: str, *flags: str, gpus: int = 0, **environment: str) -> subprocess.CompletedProcess:
    """`tsdkd train` on a machine of so many GPUs; the processes that it starts compute on the CPU."""
    program = [python(), "-c", GPUS.format(gpus=gpus), "train", "--config", file, *flags]
    return run_to_end(program, on_cpus() | environment)


def steps(result: subprocess.CompletedProcess, folder: Path) -> int:
    """Of the run, which one process does in 6 steps and two in 3."""
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("saved the student") == 1
    return json.loads((folder / "trainer_state.json").read_text())["global_step"]


def test_several_gpus_are_taken_without_a_word(config, tmp_path):
    """And it says so. The processes read the same file again, and start no others."""
    result = train(config(**EPOCH, use_cpu=False), gpus=2, ACCELERATE_USE_CPU="true")
    assert steps(result, tmp_path / "out") == 3
    assert "starting 2 processes" in result.stderr


def test_the_file_says_how_many(config, tmp_path):
    """On a machine without a GPU too; a flag wins."""
    file = config(**EPOCH, accelerate_config="zero2", num_processes=2, method="eopd", rollout_batch_size=8)
    assert main(["train", "--config", file, "--dry_run"]) == 0  # a mini-batch of 1 x 2 x 2
    assert steps(train(file), tmp_path / "out") == 3
    assert steps(train(file, "--num_processes", "1", "--output_dir", f"{tmp_path}/one"), tmp_path / "one") == 6


def test_one_process_of_a_file_of_ones_own(config, tmp_path):
    """accelerate starts it without a rank; it must not take itself for the one that starts it."""
    own = tmp_path / "launch.yaml"
    own.write_text("{compute_environment: LOCAL_MACHINE, distributed_type: 'NO', num_machines: 1, num_processes: 1}")
    result = train(config(**EPOCH, accelerate_config=str(own)))
    assert steps(result, tmp_path / "out") == 6
    assert result.stderr.count("starting 1 process") == 1


ZERO2 = {"accelerate_config": "zero2"}
TWO_NODES = {"num_machines": 2, "machine_rank": 1, "main_process_ip": "node1"}


@pytest.mark.parametrize(
    ("gpus", "found", "flags", "environment", "expected"),
    [
        (8, {}, {}, {}, ("ddp", 8)),
        (8, ZERO2, {}, {}, ("zero2", 8)),
        (8, ZERO2, {"accelerate_config": "zero3"}, {}, ("zero3", 8)),
        (8, {**ZERO2, "num_processes": "4"}, {}, {}, ("zero2", 4)),
        (8, {"num_processes": 4}, {"num_processes": 2}, {}, ("ddp", 2)),
        (8, {"num_processes": 1}, {}, {}, None),
        (8, {"accelerate_config": "single"}, {}, {}, None),
        (8, {"use_cpu": "true"}, {}, {}, None),
        (4, ZERO2, TWO_NODES, {}, ("zero2", 8)),
        (4, {"accelerate_config": "zero2_multinode"}, TWO_NODES, {}, ("zero2_multinode", 8)),
        (1, {}, {}, {}, None),
        (1, ZERO2, {}, {}, None),
        (1, ZERO2, {"accelerate_config": "zero2"}, {}, ("zero2", 1)),  # asked for
        (1, {"accelerate_config": "zero3_offload"}, {}, {}, ("zero3_offload", 1)),  # does something for one too
        (0, {}, {}, {}, None),
        (0, ZERO2, {}, {}, None),
        (0, {**ZERO2, "num_processes": 2}, {}, {}, ("zero2", 2)),
        (0, {"use_cpu": True, "num_processes": 2}, {}, {}, ("ddp", 2)),
        (8, ZERO2, {}, {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "8"}, None),  # torchrun, accelerate launch
        (8, ZERO2, {}, {"WORLD_SIZE": "1", "RANK": "0"}, ("zero2", 8)),  # a pod of one node
        (8, ZERO2, {}, {"ACCELERATE_MIXED_PRECISION": "no"}, None),  # accelerate launch --num_processes 1
        (0, {}, {"main_process_port": 0}, {}, None),
        (0, {}, {"accelerate_config": "zero2"}, {}, ("zero2", 1)),
        (0, {}, {}, {"OMPI_COMM_WORLD_SIZE": "2"}, None),  # mpirun on CPUs, which accelerate knows
        (8, ZERO2, {}, {"SLURM_STEP_NUM_TASKS": "1"}, ("zero2", 8)),
        (
            8,
            ZERO2,
            TWO_NODES,
            {"SLURM_STEP_NUM_TASKS": "2"},
            ("zero2", 16),
        ),  # tsdkd slurm
    ],
    ids=str,
)
def test_what_is_started(gpus, found, flags, environment, expected, monkeypatch, tmp_path):
    for name, value in {"CUDA_VISIBLE_DEVICES": "3,5", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("tsdkd.launch.processes.num_visible_gpus", lambda: gpus)
    start = resolve_launch({**found, **flags}, flags)
    assert (start and (start.config, start.num_processes)) == expected
    if start is None and gpus == 8 and "use_cpu" not in found and "LOCAL_RANK" not in environment:
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"  # `Trainer` would spread one process over all


@pytest.mark.parametrize(
    ("gpus", "found", "flags", "environment", "said"),
    [
        (8, {"num_processes": 16}, {}, {}, ("num_processes", "16", "8")),
        (8, {"accelerate_config": "single", "num_processes": 2}, {}, {}, ("num_processes", "single", "2")),
        (8, {"accelerate_config": "zero2_multinode"}, {}, {}, ("main_process_ip", "2 machines")),
        (8, {}, {}, {"SLURM_STEP_NUM_TASKS": "2"}, ("num_processes", "SLURM_STEP_NUM_TASKS", "alone")),
        (1, {}, {}, {"SLURM_STEP_NUM_TASKS": "8"}, ("num_processes", "SLURM_STEP_NUM_TASKS", "alone")),
        (1, {}, {}, {"OMPI_COMM_WORLD_SIZE": "8"}, ("num_processes", "OMPI_COMM_WORLD_SIZE", "alone")),
        (8, {}, {"accelerate_config": "ddp"}, {"LOCAL_RANK": "0"}, ("accelerate_config", "launcher")),
    ],
    ids=str,
)
def test_what_cannot_be_started(gpus, found, flags, environment, said, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("tsdkd.launch.processes.num_visible_gpus", lambda: gpus)
    with pytest.raises(ConfigError) as caught:
        resolve_launch({**found, **flags}, flags)
    (problem,) = caught.value.problems
    assert all(text in problem for text in said)


def test_processes_that_do_not_know_of_each_other(config, monkeypatch, tmp_path, capsys):
    """As accelerate starts them for GPUs that aren't there; each would train the same."""
    monkeypatch.setenv(LAUNCHED, "2")
    assert main(["train", "--config", config()]) == 2
    assert "2 processes were started" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["just a string", "", "a: [b", "- 1"])
def test_a_launch_configuration_that_is_none(text, config, tmp_path, capsys):
    (tmp_path / "launch.yaml").write_text(text)
    file = config(num_processes=2)
    capsys.readouterr()  # the models that are saved show a bar
    assert main(["train", "--config", file, "--accelerate_config", f"{tmp_path}/launch.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "accelerate_config" in error and "launch.yaml" in error


def test_a_job_decides_on_its_processes_itself(config, capsys):
    assert main(["slurm", "--config", config(), "--time", "01:00:00", "--num_processes", "4"]) == 2
    assert "gpus_per_node" in capsys.readouterr().err


# what is missing --------------------------------------------------------------------------------------------------


def test_all_that_is_missing_is_told_before_a_process_starts(config, tmp_path):
    wanted = {"accelerate_config": "zero2", "num_processes": 2, "use_vllm": True, "use_peft": True}
    no_vllm = "import tsdkd.rollout.base\ntsdkd.rollout.packages_distributions = dict\n"
    program = WITHOUT.replace("from tsdkd.cli", f"{no_vllm}from tsdkd.cli")
    command = ["train", "--config", config(**wanted)]
    less = [*command, "--use_vllm", "false", "--use_peft", "false", "--accelerate_config", "ddp", "--dry_run"]
    (errors, code), (more_errors, less_code) = without_extras(program, command, less)
    lines = errors.splitlines()
    assert code == 2 and len(lines) == 3 and "starting" not in errors
    assert [any(text in line for line in lines) for text in ("[vllm]", "[deepspeed]", "[peft]")] == [True] * 3
    assert less_code == 0, more_errors  # what needs none of them is fine


VLLM = {"use_vllm": True, "vllm_mode": "colocate", "vllm_enable_sleep_mode": True, "vllm_gpu_memory_utilization": 0.25}
VLLM |= {"vllm_check_every": 10}


@pytest.mark.parametrize(
    ("flags", "left_out"),
    [
        (["--use_vllm", "false"], ["vllm_check_every", "vllm_enable_sleep_mode", "vllm_gpu_memory_utilization"]),
        (["--method", "minillm"], ["use_vllm", "vllm_check_every", "vllm_enable_sleep_mode"]),
        (["--method", "seq-kd"], ["use_vllm", "vllm_check_every", "vllm_gpu_memory_utilization"]),
        (["--lmbda", "0"], ["use_vllm", "vllm_check_every"]),
        (["--vllm_mode", "server"], ["vllm_enable_sleep_mode", "vllm_gpu_memory_utilization"]),
    ],
    ids=str,
)
def test_a_flag_that_takes_the_engine_away(flags, left_out, config):
    arguments = parse_args_and_config(config(**VLLM), flags)
    assert all(
        any(key in note for note in arguments.notes) and key not in arguments.explicit_values for key in left_out
    )
    server = flags[0] == "--vllm_mode"
    assert arguments.training_args.use_vllm == server
    with pytest.raises(ConfigError):  # where it isn't the file's
        own = ["--vllm_model_impl", "vllm"] if server else ["--vllm_check_every", "20"]
        parse_args_and_config(config(**VLLM), [*flags, *own])


# a login node -----------------------------------------------------------------------------------------------------


def test_a_dry_run_without_a_gpu(config, tmp_path, capsys):
    """bf16 presets are planned; training says in one line what it needs."""
    file = config(**EPOCH, bf16=True, use_cpu=False)
    assert main(["train", "--config", file, "--dry_run", "--accelerate_config", "zero1"]) == 0
    assert "bf16: true" in capsys.readouterr().out
    shipped = config(**EPOCH, bf16=True, use_cpu=False, accelerate_config="ddp")
    assert main(["train", "--config", shipped, "--dry_run"]) == 0
    assert "2 x 2 accumulated x 8 processes = 32" in capsys.readouterr().out  # those that it is for
    file = config(**EPOCH, bf16=True, use_cpu=False)
    assert main(["train", "--config", file]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "bf16" in error and "use_cpu" in error and "GPU" in error


@pytest.fixture
def dropping():
    """A server that closes every connection, and the requests that it got."""
    seen: list[bytes] = []

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            seen.append(self.rfile.readline())

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
        server.shutdown()


@pytest.mark.parametrize("command", ["train --dry_run", "train", "plan"])
def test_a_hub_that_does_not_answer_is_asked_once(command, config, tmp_path, dropping):
    address, seen = dropping
    names = {} if command == "train" else {"model_name_or_path": "someone/student", "dataset_name": "someone/rows"}
    file = config(**names, teacher_model_name_or_path="someone/teacher")
    where = on_cpus() | {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    program = [sys.executable, "-m", "tsdkd", *command.split(), "--config", file]
    result = subprocess.run(program, env=where, capture_output=True, text=True)
    assert result.returncode == 2 and len(seen) == 1
    assert result.stderr.count(f"{address} can't be reached") == 1 and "Retry" not in result.stderr, result.stderr
    if "--dry_run" in command:  # says what it can
        assert "max_completion_length: 8" in result.stdout and "global batch" in result.stdout
