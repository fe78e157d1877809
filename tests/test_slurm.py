"""`tsdkd slurm` on a real SLURM of two nodes on this host: signalled before its limit, requeued, bitwise the same."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml

from conftest import VLLM_ON_CPUS, flags, on_cpus, weights
from test_zero import start
from tsdkd.cli import main

ROOT = Path(__file__).parents[1]
needs_slurm = pytest.mark.skipif(
    not shutil.which("slurmctld") or os.getuid() != 0, reason="needs slurmctld, slurmd and munged, and root"
)
QUIET = {"use_cpu": "true", "bf16": "false", "gradient_checkpointing": "false", "disable_tqdm": "true", "seed": 5}
QUIET |= {"report_to": "none", "max_new_tokens": 8, "learning_rate": 0.01, "log_term_gradients": 0}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment that makes sbatch talk to it."""
    folder = tmp_path_factory.mktemp("slurm")
    up = subprocess.run([ROOT / "scripts/dev/slurm_up", folder], capture_output=True, text=True)
    assert up.returncode == 0, up.stderr
    yield {"SLURM_CONF": str(folder / "slurm.conf")}
    subprocess.run([ROOT / "scripts/dev/slurm_up", "--down", folder], check=True)


@needs_slurm
def test_a_job_is_signalled_and_requeued(slurm, saved_model, rows_file, tmp_path, long):
    if not long:
        pytest.skip("--long runs it: minutes")
    values = {
        "model_name_or_path": saved_model("qwen3", 0),
        "teacher_model_name_or_path": saved_model("qwen3", 1),
        "dataset_name": rows_file,
        "per_device_train_batch_size": 2,
        "max_steps": 800,
        "save_steps": 1000,
        **QUIET,
    }
    script, folder = tmp_path / "job.sbatch", tmp_path / "out"
    written = ["slurm", "--nodes", "2", "--gpus_per_node", "0", "--cpus_per_task", "1", "--time", "00:03:00"]
    written += ["--signal_seconds", "110", "--accelerate_config", "ddp", "--output_file", str(script)]
    assert main([*written, *flags(**values, output_dir=folder)]) == 0
    run = {"env": on_cpus() | slurm, "cwd": tmp_path, "text": True, "capture_output": True}
    job = subprocess.run(["sbatch", "--parsable", script], check=True, **run).stdout.strip()
    end = time.monotonic() + 590
    while not (folder / "model.safetensors").exists():
        log = "".join(path.read_text() for path in tmp_path.glob("out-*.out"))
        state = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], **run).stdout.strip()
        assert state and time.monotonic() < end, (state, log[-3000:])
        time.sleep(1)
    assert "stopped by a signal" in log and "continue with" in log and "tsdkd train" in log
    whole = start(["train", *flags(**values, output_dir=tmp_path / "whole")], "ddp")
    assert whole.returncode == 0, whole.stderr[-2000:]
    assert (weights(folder) == weights(tmp_path / "whole")).all()


@needs_slurm
def test_a_comparison_as_an_array(slurm, saved_model, rows_file, tmp_path, long):
    """A job for student, teacher and each run; the last one to look writes the table."""
    if not long:
        pytest.skip("--long runs it: minutes")
    base = {
        "model_name_or_path": saved_model("qwen3", 0),
        "teacher_model_name_or_path": saved_model("qwen3", 1),
        "dataset_name": rows_file,
        "eval_dataset_name": rows_file,
        "output_dir": "unused",
        "max_steps": 3,
        **QUIET,
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    comparison = {"config": str(tmp_path / "base.yaml"), "output_dir": str(tmp_path / "out"), "seeds": [1]}
    comparison |= {"eval_samples": 2, "teacher_completions": True, "runs": {"a": {"method": "seq-kd"}, "b": {}}}
    (tmp_path / "comparison.yaml").write_text(yaml.safe_dump(comparison))
    command = ["tsdkd", "compare", "--config", str(tmp_path / "comparison.yaml")]
    run = {"env": on_cpus() | slurm, "cwd": tmp_path, "text": True, "capture_output": True}
    settings = ["--slurm", "--time", "00:10:00", "--gpus_per_node", "0", "--cpus_per_task", "1"]
    script = subprocess.run([*command, *settings], check=True, **run).stdout
    (tmp_path / "job.sbatch").write_text(script)
    subprocess.run(["sbatch", "--wait", "job.sbatch"], check=True, timeout=500, **run)
    subprocess.run([*command, "--report"], check=True, **run)
    assert len((tmp_path / "out/results.jsonl").read_text().splitlines()) == 4


@needs_slurm
@pytest.mark.vllm
def test_a_teacher_on_a_node_of_its_own(slurm, saved_model, rows_file, tmp_path, long):
    """In a partition of its own. Signalled as before a time limit, and requeued; the servers end with their jobs."""
    if not long:
        pytest.skip("--long runs it: minutes")
    values = {
        "model_name_or_path": saved_model("llama", 0, hidden=64, head_dim=32),
        "teacher_model_name_or_path": saved_model("llama", 1, hidden=64, head_dim=32),
        "teacher_model_init_kwargs": json.dumps({"dtype": "float32"}),
        "dataset_name": rows_file,
        "per_device_train_batch_size": 4,
        "max_steps": 800,
        "save_steps": 1000,
        "max_length": 64,
        **QUIET,
        "optim": "sgd",
        "learning_rate": 1e-4,
    }
    script, folder = tmp_path / "job.sbatch", tmp_path / "out"
    written = ["slurm", "--nodes", "1", "--teacher_nodes", "1", "--gpus_per_node", "0", "--time", "01:00:00"]
    written += ["--partition", "main", "--teacher_partition", "teacher"]
    written += ["--accelerate_config", "single", "--output_file", str(script)]
    assert main([*written, *flags(**values, output_dir=folder)]) == 0
    run = {"env": on_cpus() | slurm | VLLM_ON_CPUS, "cwd": tmp_path, "text": True, "capture_output": True}
    job = subprocess.run(["sbatch", "--parsable", script], check=True, **run).stdout.strip()
    partitions, listed, log, signalled = set(), ["main", "teacher"], "", False
    while listed:
        queue = subprocess.run(["squeue", "-h", "-j", job, "-o", "%P"], **run)
        if queue.returncode == 0:  # it fails when the controller is too busy to answer
            listed = queue.stdout.split()
            partitions.update(listed)
        log = "".join(path.read_text() for path in tmp_path.glob("out-*.out"))
        # of a job that ends, one component may be gone before the other
        assert len(listed) != 1 or (folder / "model.safetensors").exists(), (listed, log[-3000:])
        if "step 10/" in log and not signalled:
            subprocess.run(["scancel", "--signal=USR1", job], check=True, **run)
            signalled = True
        time.sleep(1)
    assert (folder / "model.safetensors").exists() and "its output layer; the other layers are on" in log, log[-3000:]
    assert partitions == {"main", "teacher"} and "stopped by a signal" in log, log[-3000:]
    assert main(["train", *flags(**values, output_dir=tmp_path / "local")]) == 0
    assert torch.allclose(weights(folder), weights(tmp_path / "local"), rtol=0, atol=1e-4)


def test_the_shipped_scripts_are_what_the_command_writes(capsys):
    scripts = sorted((ROOT / "scripts/slurm").iterdir())
    assert len(scripts) == 2
    for path in scripts:
        lines = path.read_text().splitlines()
        (command,) = [line.removeprefix("# tsdkd ") for line in lines if line.startswith("# tsdkd slurm")]
        assert main(command.split()) == 0
        assert capsys.readouterr().out == path.read_text()


def test_nodes_for_the_teacher(capsys):
    """A heterogeneous job: the second component has its own nodes, GPUs and partition."""
    command = ["slurm", "--config", "demo.yaml", "--nodes", "2", "--teacher_nodes", "1", "--gpus_per_node", "8"]
    command += ["--partition", "train", "--time", "01:00:00"]
    assert main([*command, "--teacher_partition", "serve", "--teacher_gpus_per_node", "4"]) == 0
    script = capsys.readouterr().out
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    students, teachers = [
        {line.removeprefix("#SBATCH ") for line in part.splitlines() if line.startswith("#SBATCH ")}
        for part in script.split("#SBATCH hetjob")
    ]
    assert students >= {"--nodes=2", "--gpus-per-node=8", "--partition=train", "--time=01:00:00"}
    assert teachers == {"--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=4", "--partition=serve"}
    words = script.split()
    assert "--num_processes $((SLURM_NNODES * 8))" in script  # of the first component: 2 nodes
    assert "--het-group=1" in words and words[words.index("--tensor_parallel_size") + 1] == "4"
    assert main(command) == 0
    same = capsys.readouterr().out
    assert same.count("--partition=train") == same.count("--gpus-per-node=8") == 2
    assert main([*command, "--method", "minillm"]) == 2
    assert "minillm samples with the teacher" in capsys.readouterr().err


def test_a_script_is_never_overwritten(tmp_path, capsys):
    command = ["slurm", "--config", "demo.yaml", "--time", "01:00:00", "--output_dir", "out"]
    assert main([*command, "--output_file", str(tmp_path / "job")]) == 0
    before = (tmp_path / "job").read_text()
    assert main([*command, "--nodes", "7", "--output_file", str(tmp_path / "job")]) == 2
    assert (tmp_path / "job").read_text() == before
    assert main([*command, "--accelerate_config", "zero9"]) == 2
    assert main(["slurm", "--config", "none.yaml", "--time", "01:00:00"]) == 2
    error = capsys.readouterr().err
    assert "zero9" in error and "none.yaml" in error


@pytest.mark.parametrize(
    "flags, found",
    [
        (["--time", "soon"], ["time", "soon", "HH:MM:SS"]),
        (["--time", "00:05:00"], ["signal_seconds", "300"]),
        (["--time", "1-00", "--nodes", "0"], ["--nodes", "0", "at least 1"]),
        (["--time", "30:00", "--gpus_per_node", "-1"], ["--gpus_per_node", "-1"]),
        (["--time", "01:00:00", "--partition", "a b; rm"], ["partition", "a b; rm"]),
        (
            ["--time", "01:00:00", "--teacher_nodes", "1", "--teacher_partition", "a b; rm"],
            ["teacher_partition", "a b; rm"],
        ),
        (["--time", "01:00:00", "--teacher_partition", "serve"], ["teacher_partition", "--teacher_nodes"]),
        (["--time", "01:00:00", "--teacher_gpus_per_node", "0"], ["teacher_gpus_per_node", "--teacher_nodes"]),
        (["--time", "01:00:00", "--run_name", "a\ntouch b"], ["line break"]),
        (["--time", "01:00:00", "--learnin_rate", "1"], ["learnin_rate", "learning_rate"]),
        (["--time", "01:00:00", "--beta", "7"], ["beta", "7"]),
        (["--time", "01:00:00", "--output_file", "/no/such/folder/job"], ["output_file", "/no/such/folder/job"]),
    ],
    ids=str,
)
def test_a_job_that_could_not_run_gets_no_script(flags, found, capsys):
    try:
        code = main(["slurm", "--config", "demo.yaml", "--output_dir", "out", *flags])
    except SystemExit as stopped:  # argparse's way
        code = stopped.code
    printed = capsys.readouterr()
    assert code == 2 and not printed.out
    assert all(text in printed.err for text in found), printed.err
