"""Nothing is lost: runs that are killed, damaged, signalled or out of space continue, bitwise as if nothing had been.

`--long` runs the whole campaigns whose figures are in docs/reliability.md; without it, a few cases of each.
"""

import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from conftest import flags, make_rows, on_cpus, write_jsonl
from crash import Run, count_boundaries, run, run_ranks, wait_for
from tsdkd import TSDKDConfig
from tsdkd.checkpointing import checkpoint
from tsdkd.cli import main

QUIET = {"use_cpu": "true", "bf16": "false", "gradient_checkpointing": "false", "disable_tqdm": "true", "seed": 5}
QUIET |= {"report_to": "none", "max_new_tokens": 8, "learning_rate": 0.01, "log_term_gradients": 0}
PREEMPTED = 75


@pytest.fixture
def command(saved_model, rows_file, tmp_path):
    """A run of six steps that saves after 2, 4 and 6 and keeps two; `out` is its folder by default."""

    def make(folder: str | Path = "out", **changes: object) -> list[str]:
        values = {
            "model_name_or_path": saved_model("qwen3", 0),
            "teacher_model_name_or_path": saved_model("qwen3", 1),
            "dataset_name": rows_file,
            "output_dir": tmp_path / folder,
            "per_device_train_batch_size": 4,
            "max_steps": 6,
            "save_steps": 2,
            "save_total_limit": 2,
            "resume": "true",
            **QUIET,
        }
        chosen = {name: value for name, value in {**values, **changes}.items() if value is not None}
        return ["train", *flags(**chosen)]

    return make


def final(folder: Path) -> bytes:
    """The student that a run has saved."""
    return (folder / "model.safetensors").read_bytes()


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


# Killed

METHODS = {
    "tsd-kd": {"adaptive_opener": "true"},
    "eopd": {"method": "eopd", "rollout_batch_size": 12},  # a rollout serves three steps
}


@pytest.mark.parametrize("method", METHODS)
def test_killed_at_every_file_boundary(method, command, tmp_path, long):
    """First save, later ones, rotation, the final student: whatever is on the disk then, the run continues."""
    whole = tmp_path / "whole"
    boundaries = count_boundaries(command(whole, **METHODS[method]), whole)
    assert boundaries > 40
    places = range(boundaries) if long else random.Random(method).sample(range(boundaries), 5)
    for place in places:
        folder = tmp_path / f"killed-{place}"
        argv = command(folder, **METHODS[method])
        code, output = run(argv, folder, kill_at=place)
        assert code == -signal.SIGKILL, (place, output[-2000:])
        code, output = run(argv, folder)
        assert code == 0, (place, output[-2000:])
        assert final(folder) == final(whole), place
        assert checkpoints(folder)[-2:] == ["checkpoint-4", "checkpoint-6"]
        assert not list(folder.glob(".*"))
        shutil.rmtree(folder)


def test_adapters_are_continued(command, tmp_path):
    values = {"use_peft": "true", "lora_r": 4, "lora_target_modules": "all-linear"}
    whole, folder = tmp_path / "whole", tmp_path / "out"
    assert main(command(whole, **values)) == 0
    assert run(command(folder, **values), folder, kill_at=40)[0] == -signal.SIGKILL
    assert checkpoints(folder)
    assert main(command(folder, **values)) == 0
    assert (folder / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()


def test_killed_at_random_times(command, tmp_path, long):
    whole = tmp_path / "whole"
    start = time.monotonic()
    assert run(command(whole), whole)[0] == 0
    seconds = time.monotonic() - start
    rng = random.Random(0)
    for attempt in range(30 if long else 3):
        folder = tmp_path / f"killed-{attempt}"
        child = Run(command(folder), folder)
        time.sleep(rng.uniform(0, seconds))
        child.process.kill()
        child.wait()
        code, output = run(command(folder), folder)
        assert code == 0, output[-2000:]
        assert final(folder) == final(whole)
        shutil.rmtree(folder)


# Damaged


@pytest.fixture(scope="module")
def finished(saved_model, rows_file, tmp_path_factory):
    """A finished run with checkpoints after 2 and 4 steps, its command, and its student."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    values = {"model_name_or_path": saved_model("qwen3", 0), "teacher_model_name_or_path": saved_model("qwen3", 1)}
    values |= {"dataset_name": rows_file, "output_dir": folder, "per_device_train_batch_size": 4, "max_steps": 4}
    argv = ["train", *flags(**values, save_steps=2, resume="true", **QUIET)]
    assert main(argv) == 0
    return folder, argv, final(folder)


FILES = ["manifest.json", "model.safetensors", "config.json", "generation_config.json", "tokenizer.json"]
FILES += ["tokenizer_config.json", "chat_template.jinja", "optimizer.safetensors", "process_0.safetensors"]
FILES += ["trainer_state.json"]
DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "flipped": lambda path: path.write_bytes(flip(path.read_bytes())),
}


def flip(content: bytes) -> bytes:
    """One bit of it, the lowest of its middle byte."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def test_files_of_a_checkpoint(finished):
    folder, _, _ = finished
    assert sorted(FILES) == sorted(path.name for path in (folder / "checkpoint-4").iterdir())


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over(name, damage, finished, capsys):
    folder, argv, student = finished
    DAMAGES[damage](folder / "checkpoint-4" / name)
    (folder / "model.safetensors").unlink()
    assert main(argv) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert len(said) == 1 and "checkpoint-4" in said[0] and name in said[0]
    assert final(folder) == student


def test_all_checkpoints_damaged(finished, tmp_path, capsys):
    folder, argv, _ = finished
    copy = tmp_path / "out"
    shutil.copytree(folder, copy)
    for path in copy.glob("checkpoint-*/optimizer.safetensors"):
        path.unlink()
    argv = [str(copy) if word == str(folder) else word for word in argv]
    assert main(argv) == 2
    captured = capsys.readouterr()
    *skipped, last = captured.err.splitlines()
    assert len(skipped) == 2 and all("skipped" in line for line in skipped) and "no checkpoint" in last


# Out of space


@pytest.mark.parametrize("kib", [20, 60])
def test_a_file_that_cannot_be_written(kib, command, tmp_path, capsys):
    """A limit on the size of files is what a full disk is to a process."""
    folder = tmp_path / "out"
    constant = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    assert main(command(**constant, max_steps=2)) == 0
    before = {path: path.read_bytes() for path in (folder / "checkpoint-2").iterdir()}
    student = final(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kib * 1024, hard))
    try:
        assert main(command(**constant)) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tsdkd")]
    assert "checkpoint-4" in line and "can't be written" in line
    assert {path: path.read_bytes() for path in (folder / "checkpoint-2").iterdir()} == before
    assert checkpoints(folder) == ["checkpoint-2"] and final(folder) == student
    assert not list(folder.glob(".writing*"))
    assert main(command(**constant)) == 0
    assert main(command("whole", **constant)) == 0
    assert final(folder) == final(tmp_path / "whole")


def test_a_student_that_cannot_be_written(command, tmp_path, capsys):
    """At the very end, without a checkpoint: the same command trains it again."""
    no_checkpoints = {"save_strategy": "no", "save_steps": None, "save_total_limit": None}
    argv = command(max_steps=2, **no_checkpoints)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20 * 1024, hard))
    try:
        assert main(argv) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tsdkd")]
    assert "output_dir" in line and str(tmp_path / "out") in line and "can't be written" in line
    assert main(argv) == 0
    whole = command("whole", max_steps=2, **no_checkpoints)
    assert main(whole) == 0 and final(tmp_path / "out") == final(tmp_path / "whole")


def test_rotation_keeps_the_one_that_was_just_written(command, tmp_path):
    """A damaged one, which the resume passed over, may have a higher number."""
    for step in (2, 4, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
    checkpoint.rotate_checkpoints(tmp_path / "checkpoint-4", keep=1, best=None)
    assert checkpoints(tmp_path) == ["checkpoint-4"]


# Signalled


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_stops(number, command, tmp_path):
    folder, whole = tmp_path / "out", tmp_path / "whole"
    long_run = {"max_steps": 40, "save_steps": 20, "num_train_epochs": 10}
    child = Run(command(folder, **long_run), folder)
    wait_for(folder / "tsdkd_config.yaml")
    os.kill(child.process.pid, number)
    assert child.wait() == PREEMPTED
    assert "--resume true" in child.output and (folder / ".preempted").exists()
    assert not (folder / "model.safetensors").exists()
    assert run(command(folder, **long_run), folder)[0] == 0
    assert run(command(whole, **long_run), whole)[0] == 0
    assert final(folder) == final(whole)
    assert not (folder / ".preempted").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_a_launcher_before_there_is_anything_to_save(number, command, tmp_path):
    folder = tmp_path / "out"
    launcher = [sys.executable, "-m", "tsdkd", *command(folder), "--num_processes", "2", "--main_process_port", "0"]
    process = subprocess.Popen(launcher, env=on_cpus(), stderr=subprocess.PIPE, text=True)
    while len(psutil.Process(process.pid).children()) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(1)  # they import torch, for longer than that
    process.send_signal(number)
    assert process.wait(60) == PREEMPTED, process.stderr.read()[-2000:]
    assert not folder.exists()


def test_a_signal_while_the_processes_wait_for_each_other(command, tmp_path, monkeypatch):
    """The first of them writes as soon as all have come; by then each of them can be signalled."""
    from tsdkd.run import train as runs

    build = runs.build_trainer

    def signalled(arguments):
        trainer = build(arguments)
        monkeypatch.setattr(trainer.accelerator, "wait_for_everyone", lambda: signal.raise_signal(signal.SIGTERM))
        return trainer

    def too_early(*_):
        raise AssertionError("this would have ended the process")

    monkeypatch.setattr(runs, "build_trainer", signalled)
    before = signal.signal(signal.SIGTERM, too_early)
    try:
        assert main(command()) == PREEMPTED
    finally:
        signal.signal(signal.SIGTERM, before)
    assert checkpoints(tmp_path / "out") == ["checkpoint-1"]


def test_two_runs_do_not_share_a_directory(command, tmp_path, monkeypatch, capsys):
    """The second looked before the first had begun."""
    from tsdkd.run import train as runs

    folder = tmp_path / "out"
    build = runs.build_trainer

    def slowly(arguments):
        monkeypatch.setattr(runs, "build_trainer", build)
        assert main(command(folder, max_steps=2, resume="false")) == 0
        return build(arguments)

    monkeypatch.setattr(runs, "build_trainer", slowly)
    assert main(command(folder, max_steps=2, resume="false")) == 2
    assert "another run has begun" in capsys.readouterr().err


def test_a_signal_to_some_ranks(command, tmp_path, long):
    """All agree, whenever it comes: rollout, forward, save, evaluation; to one rank or to both."""
    values = {"max_steps": 12, "save_steps": 3, "eval_strategy": "steps", "eval_steps": 4, "num_train_epochs": 10}
    values |= {
        "per_device_train_batch_size": 2,
        "eval_dataset_name": write_jsonl(tmp_path / "eval.jsonl", make_rows(8)),
    }
    whole = tmp_path / "whole"
    start = time.monotonic()
    assert [child.wait() for child in run_ranks(command(whole, **values), whole)] == [0, 0]
    seconds = time.monotonic() - start
    rng, stops = random.Random(1), 0
    for attempt in range(50 if long else 3):
        folder = tmp_path / f"signalled-{attempt}"
        children = run_ranks(command(folder, **values), folder)
        wait_for(folder / "tsdkd_config.yaml")
        time.sleep(rng.uniform(0, 0.6 * seconds))
        for child in rng.choice([children, children[:1], children[1:]]):
            if child.process.is_alive():
                os.kill(child.process.pid, rng.choice([signal.SIGTERM, signal.SIGUSR1]))
        codes = [child.wait(120) for child in children]
        assert codes in ([0, 0], [PREEMPTED, PREEMPTED]), (attempt, codes, children[0].output[-2000:])
        stops += codes[0] == PREEMPTED
        if codes[0] == PREEMPTED:
            assert [child.wait() for child in run_ranks(command(folder, **values), folder)] == [0, 0]
        assert final(folder) == final(whole)
        shutil.rmtree(folder)
    assert stops


# Not finite


@pytest.fixture
def broken_student(saved_model, tmp_path):
    """Its embedding of w55 is not a number."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, folder = saved_model("qwen3", 0), tmp_path / "broken"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    model.get_input_embeddings().weight.data[tokenizer.convert_tokens_to_ids("w55")] = float("nan")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows_with_one_bad(path: Path, at: int) -> str:
    rows = [{**row, "prompt": row["prompt"].replace("w55", "w1")} for row in make_rows(16)]
    rows = [{**row, "completion": row["completion"].replace("w55", "w1")} for row in rows]
    rows[at]["prompt"] += " w55"
    return write_jsonl(path, rows)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_loss_that_is_not_finite_stops_all(processes, broken_student, command, tmp_path):
    bad = 9
    values = {"model_name_or_path": broken_student, "dataset_name": rows_with_one_bad(tmp_path / "r.jsonl", bad)}
    values |= {"per_device_train_batch_size": 4 // processes, "max_steps": 4, "train_sampling_strategy": "sequential"}
    values |= {"lmbda": 0}
    folder = tmp_path / "out"
    children = run_ranks(command(**values, save_steps=1, save_total_limit=9), folder, processes)
    assert [child.wait() for child in children] == [3] * processes
    (line,) = [line for line in children[0].output.splitlines() if line.startswith("tsdkd train")]
    assert "step 3" in line and "max_nonfinite_steps" in line
    assert checkpoints(folder) == ["checkpoint-1", "checkpoint-2"]
    (report,) = folder.glob("nonfinite_step_3_*.jsonl")
    written = [json.loads(text) for text in report.read_text().splitlines()]
    assert bad in [row["index"] for row in written] and len(written) == 4 // processes
    assert "w55" in next(row["prompt"] for row in written if row["index"] == bad)


def test_rollouts_of_a_broken_student(broken_student, command, tmp_path):
    """Sampling from logits that aren't finite must not be what fails: on a GPU it would take the device with it."""
    data = rows_with_one_bad(tmp_path / "r.jsonl", 1)
    assert (
        main(command(model_name_or_path=broken_student, dataset_name=data, train_sampling_strategy="sequential")) == 3
    )


def test_steps_that_are_not_finite_can_be_left_out(broken_student, command, tmp_path, capsys):
    """The weights stay as they are in that step, and only in that."""
    values = {"model_name_or_path": broken_student, "dataset_name": rows_with_one_bad(tmp_path / "r.jsonl", 9)}
    values |= {"max_steps": 4, "train_sampling_strategy": "sequential", "max_nonfinite_steps": 1, "lmbda": 0}
    assert main(command(**values, save_steps=1, save_total_limit=9)) == 0
    assert "left out (1 of 1)" in capsys.readouterr().err
    steps = [final(tmp_path / "out" / f"checkpoint-{step}") for step in (1, 2, 3, 4)]
    assert steps[1] == steps[2] and steps[0] != steps[1] and steps[2] != steps[3]
    assert main(command(**values, save_steps=1, save_total_limit=9)) == 0  # finished: nothing is left to do


def test_batches_without_a_token(command, tmp_path):
    """On one of two processes in the first step, on both in the second: no rank waits, the second changes nothing."""
    rows = [{**row, "finish_reason": "length"} for row in make_rows(12)]  # cut: no end token is added
    for place in (0, 1, 4, 5, 6, 7):
        rows[place]["completion"] = ""
    values = {"dataset_name": write_jsonl(tmp_path / "rows.jsonl", rows), "per_device_train_batch_size": 2, "lmbda": 0}
    values |= {"optim": "sgd", "max_steps": 3, "save_steps": 1, "save_total_limit": 3, "warmup_steps": 0}
    folder = tmp_path / "out"
    children = run_ranks(command(train_sampling_strategy="sequential", **values), folder)
    assert [child.wait(120) for child in children] == [0, 0], children[0].output[-2000:]
    first, second, third = (final(folder / f"checkpoint-{step}") for step in (1, 2, 3))
    assert first == second and second != third


# Growing


def test_a_short_soak():
    """The long one is `python benchmarks/soak.py`, with each rollout engine."""
    script = Path(__file__).parents[1] / "benchmarks" / "soak.py"
    command = [sys.executable, str(script), "--steps", "60", "--settle", "30"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]


# The wrong run


def test_another_configuration_is_not_resumed(command, tmp_path, capsys):
    assert main(command(max_steps=2)) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert main(command(max_steps=2, learning_rate=0.02, beta=0.5)) == 2
    error = capsys.readouterr().err
    assert "learning_rate was 0.01, now 0.02" in error and "beta was 0.9, now 0.5" in error
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    assert main(command(max_steps=4, logging_steps=1)) == 0  # longer, and logged otherwise
    assert "max_steps was 2, now 4" in capsys.readouterr().out


def test_a_checkpoint_of_another_run_is_not_resumed(command, tmp_path, capsys):
    assert main(command(max_steps=2)) == 0
    theirs = {"resume": "false", "resume_from_checkpoint": tmp_path / "out/checkpoint-2"}
    assert main(command("other", learning_rate=0.02, **theirs)) == 2
    error = capsys.readouterr().err
    assert "resume_from_checkpoint" in error and "learning_rate was 0.01, now 0.02" in error
    assert not (tmp_path / "other").exists()
    assert main(command("longer", **theirs)) == 0


def test_other_rows_are_not_resumed(command, tmp_path, capsys):
    data = write_jsonl(tmp_path / "rows.jsonl", make_rows(24))
    assert main(command(max_steps=2, dataset_name=data)) == 0
    write_jsonl(tmp_path / "rows.jsonl", make_rows(24, seed=1))
    assert main(command(max_steps=4, dataset_name=data)) == 2
    assert "train_dataset" in capsys.readouterr().err


def test_another_number_of_processes_is_refused(command, tmp_path):
    folder = tmp_path / "out"
    assert run(command(max_steps=2), folder)[0] == 0
    children = run_ranks(command(max_steps=4), folder)
    assert [child.wait() for child in children] == [2, 2]
    assert "written by 1 process, found 2" in children[0].output


# Secrets


def test_tokens_are_in_no_file_and_no_log(command, tmp_path, monkeypatch):
    canary = "hf_canaryCANARYcanaryCANARY"
    monkeypatch.setenv("HF_TOKEN", canary)
    config = yaml.safe_dump({"hub_token": canary})
    (tmp_path / "token.yaml").write_text(config)
    folder = tmp_path / "out"
    argv = [
        *command(max_steps=2, report_to="tensorboard", log_level="debug"),
        "--config",
        str(tmp_path / "token.yaml"),
    ]
    code, output = run(argv, folder)
    assert code == 0, output[-2000:]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any("tfevents" in path.name for path in files)
    assert not [path for path in files if canary.encode() in path.read_bytes()]
    assert canary not in output
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pth", ".pkl")]  # nothing is pickled


def test_pickled_arguments_have_no_token():
    """`Trainer` writes them beside a model that it pushes."""
    args = TSDKDConfig("out", hub_token="hf_canary", use_cpu=True, bf16=False)
    assert args.hub_token == "hf_canary" and b"hf_canary" not in pickle.dumps(args)
