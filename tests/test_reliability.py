"""Nothing is lost: runs that are killed, damaged, signalled or out of space continue, bitwise as if nothing had been.

`--long` runs the whole campaigns whose figures are in docs/reliability.md; without it, a few cases of each.
"""

import errno
import fcntl
import hashlib
import json
import os
import pickle
import platform
import pty
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from datasets import Dataset
from transformers import AutoConfig, TrainerCallback

from conftest import flags, make_rows, on_cpus, write_jsonl
from crash import Run, count_boundaries, run, run_ranks, wait_for
from tsdkd import TSDKDConfig, TSDKDTrainer
from tsdkd.checkpointing import checkpoint
from tsdkd.checkpointing.preemption import catch_signals
from tsdkd.checkpointing.run_lock import LOCK_NAME, RunLock
from tsdkd.cli import main
from tsdkd.config.stop_signals import STOP_SIGNALS
from tsdkd.errors import OutputDirError
from tsdkd.models.identity import identify_model

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
    assert len(skipped) == 2 and all("skipped" in line for line in skipped) and "no valid checkpoint" in last


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


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_saves_and_stops(number, command, tmp_path):
    folder, whole = tmp_path / "out", tmp_path / "whole"
    long_run = {"max_steps": 40, "save_steps": 20, "num_train_epochs": 10}
    child = Run(command(folder, **long_run), folder)
    wait_for(folder / "tsdkd_config.yaml")
    os.kill(child.process.pid, number)
    assert child.wait() == PREEMPTED
    (checkpoint,) = checkpoints(folder)
    (again,) = re.findall(rf"{folder}/{checkpoint}; continue with: tsdkd (.*)", child.output)
    assert (folder / ".preempted").exists() and ("Ctrl-C again" in child.output) == (number == signal.SIGINT)
    assert not (folder / "model.safetensors").exists()
    assert run(shlex.split(again), folder)[0] == 0
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
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == PREEMPTED, errors[-2000:]
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


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_an_ignored_signal_stays_ignored(number, command, tmp_path, monkeypatch):
    """As nohup, and the background of a script, leave it."""
    at_step(monkeypatch, 3, lambda: signal.raise_signal(number))
    before = signal.signal(number, signal.SIG_IGN)
    try:
        assert main(command()) == 0
    finally:
        signal.signal(number, before)
    assert checkpoints(tmp_path / "out") == ["checkpoint-4", "checkpoint-6"]


def test_a_second_ctrl_c_ends_the_process():
    child = os.fork()
    if not child:
        with catch_signals():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGINT


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGHUP])
def test_what_stops_a_launcher_stops_its_processes(number, command, tmp_path, long):
    """Also what it can't tell them of."""
    if number != signal.SIGKILL and not long:
        pytest.skip("a launch takes 20 s")
    folder = tmp_path / "out"
    argv = command(folder, max_steps=4000, save_steps=2000, num_train_epochs=1000)
    process = subprocess.Popen([sys.executable, "-m", "tsdkd", *argv, "--num_processes", "2"], env=on_cpus())
    wait_for(folder / "tsdkd_config.yaml")
    ranks = psutil.Process(process.pid).children()
    process.send_signal(number)
    assert process.wait(60) == (-number if number == signal.SIGKILL else PREEMPTED)
    assert len(ranks) == 2 and not psutil.wait_procs(ranks, 60)[1]
    (checkpoint,) = checkpoints(folder)
    assert (folder / checkpoint / "manifest.json").exists() and (folder / ".preempted").exists()


LAUNCHED_BY = {
    "tsdkd": "import tsdkd.launch.children as c; os.environ.update(c.started_by_this())",
    "torchrun": "os.environ['TORCHELASTIC_RUN_ID'] = 'none'",
    "a shell": "",
    "a shell that a launcher started": "os.environ['TSDKD_STARTED_BY'] = '1@elsewhere'",
}


@pytest.mark.parametrize("launcher", LAUNCHED_BY)
def test_who_dies_with_the_process_that_started_it(launcher):
    """The launcher's processes, not what a shell leaves in its background."""
    child = "import tsdkd.launch.children as c; c.stop_with_launcher(); print('ready', flush=True); input()"
    parent = f"import os, subprocess, sys; {LAUNCHED_BY[launcher]}\nsubprocess.run([sys.executable, '-c', {child!r}])"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", parent], **pipes)
    assert process.stdout.readline() == "ready\n"
    (started,) = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    if "shell" not in launcher:
        assert not psutil.wait_procs([started], 30)[1]
    errors = process.communicate("the shell's child has waited for this\n")[1]
    assert errors == ""  # input() would have complained of an end


# Nobody reads


def a_pipe(folder: Path) -> tuple[str, int]:
    os.mkfifo(folder / "pipe")
    return str(folder / "pipe"), os.open(folder / "pipe", os.O_RDONLY | os.O_NONBLOCK)


def a_terminal(folder: Path) -> tuple[str, int]:
    master, slave = pty.openpty()
    name = os.ttyname(slave)
    os.close(slave)
    return name, master


@pytest.mark.parametrize(("output", "writes"), [(a_pipe, True), (a_terminal, True), (a_terminal, False)])
def test_a_run_that_nobody_reads_saves_and_stops(output, writes, command, tmp_path):
    folder = tmp_path / "out"
    long_run = {"max_steps": 40, "save_steps": 20, "num_train_epochs": 10, "logging_steps": 1 if writes else 1000}
    name, reader = output(tmp_path)
    child = Run(command(folder, **long_run), folder, environment={"CRASH_OUTPUT": name})
    wait_for(folder / "tsdkd_config.yaml")
    os.close(reader)
    if not writes:  # a shell tells what it has started
        os.kill(child.process.pid, signal.SIGHUP)
    assert child.wait() == PREEMPTED
    assert len(checkpoints(folder)) == 1 and (folder / ".preempted").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_a_run_and_its_workers(number, command, tmp_path):
    """As scancel and a terminal send it: torch's data loader would raise in the middle of a step where one dies."""
    folder, rows = tmp_path / "out", write_jsonl(tmp_path / "many.jsonl", make_rows(4000))
    argv = command(folder, dataset_name=rows, max_steps=1000, dataloader_num_workers=2)
    program = [sys.executable, "-m", "tsdkd", *argv]
    child = subprocess.Popen(program, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(folder / "checkpoint-2")
    workers = psutil.Process(child.pid).children()
    assert len(workers) >= 2
    os.killpg(child.pid, number)
    errors = child.communicate()[1]
    assert child.returncode == PREEMPTED, errors[-2000:]
    assert errors.count("Ctrl-C again") == (number == signal.SIGINT)
    psutil.wait_procs(workers, timeout=60)
    assert not any(worker.is_running() for worker in workers)


def test_a_full_disk_for_the_log_is_not_the_runs(command, tmp_path):
    folder = tmp_path / "out"
    assert Run(command(folder, logging_steps=1), folder, environment={"CRASH_OUTPUT": "/dev/full"}).wait() == 0
    assert checkpoints(folder) == ["checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize("argv", [["configs"], ["train", "--help"], ["--version"]])
@pytest.mark.parametrize("output", ["unread", "full", "closed"])
def test_a_command_whose_output_goes_nowhere(output, argv):
    """It ends without a word about it."""
    reader, writer = os.pipe()
    os.close(reader)
    stdout = {"unread": writer, "full": os.open("/dev/full", os.O_WRONLY), "closed": None}[output]
    close = (lambda: os.close(1)) if output == "closed" else None
    program = [sys.executable, "-m", "tsdkd", *argv]
    result = subprocess.run(program, stdout=stdout, stderr=subprocess.PIPE, text=True, preexec_fn=close)
    assert result.returncode == 0 and result.stderr == ""


# Two at once


@pytest.fixture
def busy(command, tmp_path):
    """A folder with a run in it, which has saved and is saving; the run's process."""
    folder = tmp_path / "out"
    child = Run(command(folder, max_steps=100_000, num_train_epochs=100_000), folder)
    wait_for(folder / "checkpoint-4")
    yield folder, child
    child.process.kill()
    child.wait()


@pytest.mark.parametrize(
    ("processes", "resume"),
    [(1, {"resume": "true"}), (1, {"resume": "false", "resume_from_checkpoint": "true"}), (2, {"resume": "true"})],
)
def test_a_second_run_is_refused(processes, resume, busy, command):
    """All of its processes say who is there, before anything is deleted or changed."""
    folder, child = busy
    os.kill(child.process.pid, signal.SIGSTOP)
    (folder / ".writing-checkpoint-100000").mkdir(exist_ok=True)  # as it might be
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    argv = command(folder, max_steps=100_000, num_train_epochs=100_000, **resume)
    children = run_ranks(argv, folder.with_name("second"), processes)
    assert [second.wait() for second in children] == [2] * processes
    (line,) = {line for line in children[0].output.splitlines() if line.startswith("tsdkd train")}
    assert str(folder) in line and f"process {child.process.pid} on {platform.node()}" in line
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_script_s_second_run_is_refused(busy, saved_model):
    folder, _ = busy
    args = TSDKDConfig(str(folder), use_cpu=True, bf16=False, report_to="none")
    rows = Dataset.from_list(make_rows(8))
    trainer = TSDKDTrainer(saved_model("qwen3", 0), saved_model("qwen3", 1), args, train_dataset=rows)
    with pytest.raises(OutputDirError, match=f"process {busy[1].process.pid} on"):
        trainer.train()


def test_two_runs_begin_at_once(command, tmp_path, monkeypatch, capsys):
    """The second looked before the first had begun; by now that one has ended."""
    from tsdkd.run import train as runs

    folder = tmp_path / "out"
    build = runs.build_trainer

    def slowly(arguments):
        monkeypatch.setattr(runs, "build_trainer", build)
        assert main(command(folder, max_steps=2, resume="false")) == 0
        return build(arguments)

    monkeypatch.setattr(runs, "build_trainer", slowly)
    assert main(command(folder, max_steps=2, resume="false")) == 2
    assert "another run has started" in capsys.readouterr().err


@pytest.mark.parametrize("resume", ["true", "false"])
def test_a_run_that_got_nowhere_is_not_in_the_way(resume, command, tmp_path):
    """Killed before its first checkpoint, it leaves a configuration, a log, and maybe a part of the checkpoint."""
    folder = tmp_path / "out"
    killed = Run(command(folder, max_steps=100_000, save_steps=100_000, report_to="tensorboard"), folder)
    wait_for(folder / "runs")
    killed.process.kill()
    killed.wait()
    (folder / ".writing-checkpoint-3").mkdir()
    assert main(command(folder, max_steps=2, learning_rate=1e-3, resume=resume)) == 0
    assert "learning_rate: 0.001" in (folder / "tsdkd_config.yaml").read_text()
    assert main(command(folder, max_steps=2, learning_rate=1e-3, resume="false")) == 2


@pytest.mark.parametrize("file", [".writing-draft/chapter", "runs/precious", "tsdkd_config.yaml", "records/step"])
def test_files_that_somebody_else_made_are_in_the_way(file, command, tmp_path, capsys):
    """Beside the configuration of a run that got nowhere, or that configuration itself, edited."""
    folder = tmp_path / "out"
    assert main(command(folder, max_steps=1)) == 0
    config = (folder / "tsdkd_config.yaml").read_text()
    shutil.rmtree(folder)
    (folder / file).parent.mkdir(parents=True)
    (folder / "tsdkd_config.yaml").write_text(config)
    (folder / file).write_text("# notes\n" + config)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main(command(folder, max_steps=1, resume="false")) == 2
    assert "output_dir" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("content", [b"", b"process 1 on elsewhere", b"\xff" * 10_000])
def test_the_lock_of_a_dead_run_locks_nothing(content, command, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / LOCK_NAME).write_bytes(content)
    assert main(command(folder, max_steps=2)) == 0 and not (folder / LOCK_NAME).exists()


def test_a_process_that_was_forked_does_not_keep_the_lock(tmp_path):
    lock = RunLock(tmp_path)
    lock.acquire()
    child = os.fork()
    if not child:
        signal.pause()
    try:
        with pytest.raises(OutputDirError):
            RunLock(tmp_path).acquire()
        os.close(os.dup(lock._descriptor))  # whoever reads the file doesn't unlock it
        lock.close()
        with RunLock(tmp_path).held():
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_file_system_without_locks(command, tmp_path, monkeypatch, capsys):
    flock = fcntl.flock

    def no_locks(file, flags):
        if os.readlink(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}").endswith(LOCK_NAME):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        flock(file, flags)

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert main(command(max_steps=2)) == 0
    assert capsys.readouterr().err.count("don't start a second run") == 1
    assert not (tmp_path / "out" / LOCK_NAME).exists()


# Removed in mid-run


def at_step(monkeypatch, step: int, action) -> None:
    """Do something at the end of a step of the next run."""
    from tsdkd.run import train as runs

    build = runs.build_trainer

    class Accident(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == step:
                action()

    def with_accident(arguments):
        monkeypatch.setattr(runs, "build_trainer", build)
        trainer = build(arguments)
        trainer.add_callback(Accident())
        return trainer

    monkeypatch.setattr(runs, "build_trainer", with_accident)


def replaced_by_a_file(out: Path) -> None:
    shutil.rmtree(out)
    out.write_text("")


def replaced_by_a_link(out: Path) -> None:
    shutil.rmtree(out)
    out.with_name("elsewhere").mkdir()
    out.symlink_to(out.with_name("elsewhere"))


ACCIDENTS = {
    "deleted": shutil.rmtree,
    "moved away": lambda out: out.rename(out.with_name("moved")),
    "emptied": lambda out: [shutil.rmtree(p) if p.is_dir() else p.unlink() for p in list(out.iterdir())],
    "without its configuration": lambda out: (out / "tsdkd_config.yaml").unlink(),
    "without its newest checkpoint": lambda out: shutil.rmtree(out / "checkpoint-2"),
    "without records": lambda out: shutil.rmtree(out / "records"),
    "replaced by a file": replaced_by_a_file,
    "replaced by a link": replaced_by_a_link,
    "replaced by a link to nothing": lambda out: (shutil.rmtree(out), out.symlink_to(out.with_name("nothing"))),
}


@pytest.mark.parametrize("accident", ACCIDENTS)
def test_a_directory_that_is_changed_in_mid_run(accident, command, tmp_path, monkeypatch, capsys):
    """The next save writes what a resume needs, or says by name what it couldn't."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert main(command(whole, record_steps=1)) == 0

    def stop():
        raise KeyboardInterrupt

    at_step(monkeypatch, 3, lambda: ACCIDENTS[accident](out))
    at_step(monkeypatch, 5, stop)
    code, errors = main(command(out, record_steps=1)), capsys.readouterr().err
    if code == 2:
        (line,) = [line for line in errors.splitlines() if line.startswith("tsdkd train")]
        assert str(out) in line and "replaced" in accident
        out.unlink()
    else:
        assert code == 130 and "checkpoint-4" in checkpoints(out)
    assert main(command(out, record_steps=1)) == 0 and final(out) == final(whole)
    assert not (out / LOCK_NAME).exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the writer's thread
@pytest.mark.parametrize("folder", ["out/runs", "out"])
def test_a_log_that_is_deleted_in_mid_run(folder, command, tmp_path, monkeypatch, capsys):
    """TensorBoard's writer can't go on without its file."""
    at_step(monkeypatch, 3, lambda: shutil.rmtree(tmp_path / folder))
    logged = {"report_to": "tensorboard", "logging_steps": 1}
    assert main(command(**logged)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tsdkd train")]
    assert str(tmp_path / "out/runs") in line and "continue with --resume true" in line
    assert main(command(**logged)) == 0


def test_the_best_checkpoint_is_deleted_in_mid_run(command, rows_file, tmp_path, monkeypatch, capsys):
    """The last weights don't pass for the best."""
    out = tmp_path / "out"
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset_name": rows_file}
    values = command(out, load_best_model_at_end=True, metric_for_best_model="loss", **evaluated)
    monkeypatch.setattr(TSDKDTrainer, "evaluate", lambda self, *_, **__: {"eval_loss": self.state.global_step})
    at_step(monkeypatch, 5, lambda: shutil.rmtree(out / "checkpoint-2"))
    assert main(values) == 2
    assert "checkpoint-2 can't be loaded: missing manifest.json" in capsys.readouterr().err
    assert main([*values, "--load_best_model_at_end", "false"]) == 0 and final(out)


@pytest.mark.parametrize("place", ["/proc/tsdkd/out", "/sys/out", "limit/runs/out"])
def test_a_place_that_cannot_be_written(place, command, tmp_path, monkeypatch, capsys):
    """One line, before models are loaded, and nothing is left."""
    from tsdkd.run import train as runs

    monkeypatch.setattr(runs, "build_trainer", None)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if "limit" in place else soft, hard))
    try:
        assert main(command(tmp_path / place)) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capsys.readouterr().err.startswith(f"tsdkd train: output_dir: {tmp_path / place} can't be written: ")
    assert not (tmp_path / "limit").exists()


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
    """Its embedding of w55 is not a number; tests load it as if it had become so in mid-run."""
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
    children = run_ranks(command(**values, save_steps=1, save_total_limit=9), folder, processes, CRASH_ANY_WEIGHTS="1")
    assert [child.wait() for child in children] == [3] * processes
    (line,) = [line for line in children[0].output.splitlines() if line.startswith("tsdkd train")]
    assert "step 3" in line and "max_nonfinite_steps" in line
    assert checkpoints(folder) == ["checkpoint-1", "checkpoint-2"]
    (report,) = folder.glob("nonfinite_step_3_*.jsonl")
    written = [json.loads(text) for text in report.read_text().splitlines()]
    assert bad in [row["index"] for row in written] and len(written) == 4 // processes
    assert "w55" in next(row["prompt"] for row in written if row["index"] == bad)


def test_rollouts_of_a_broken_student(broken_student, command, tmp_path, monkeypatch):
    """Sampling from logits that aren't finite must not be what fails: on a GPU it would take the device with it."""
    monkeypatch.setattr("tsdkd.models.loading.require_finite", lambda *_: None)
    data = rows_with_one_bad(tmp_path / "r.jsonl", 1)
    assert (
        main(command(model_name_or_path=broken_student, dataset_name=data, train_sampling_strategy="sequential")) == 3
    )


def test_steps_that_are_not_finite_can_be_left_out(broken_student, command, tmp_path, monkeypatch, capsys):
    """The weights stay as they are in that step, and only in that."""
    monkeypatch.setattr("tsdkd.models.loading.require_finite", lambda *_: None)
    values = {"model_name_or_path": broken_student, "dataset_name": rows_with_one_bad(tmp_path / "r.jsonl", 9)}
    values |= {"max_steps": 4, "train_sampling_strategy": "sequential", "max_nonfinite_steps": 1, "lmbda": 0}
    assert main(command(**values, save_steps=1, save_total_limit=9)) == 0
    assert "skipped the step (1 of 1)" in capsys.readouterr().err
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
    assert capsys.readouterr().out.count("max_steps was 2, now 4") == 1


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


def another_seed(folder: Path, saved_model) -> None:
    shutil.copyfile(Path(saved_model("qwen3", 7), "model.safetensors"), folder / "model.safetensors")


def one_bit(folder: Path, saved_model) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(flip(path.read_bytes()))


def one_setting(folder: Path, saved_model) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))


LORA = {"use_peft": "true", "lora_r": 4, "lora_target_modules": "all-linear"}


@pytest.mark.parametrize(
    ("field", "values", "change"),
    [
        ("teacher_model_name_or_path", {}, another_seed),
        ("teacher_model_name_or_path", {}, one_bit),
        ("teacher_model_name_or_path", {"method": "eopd", "rollout_batch_size": 4}, one_setting),
        ("model_name_or_path", LORA, one_bit),
    ],
)
def test_other_frozen_weights_are_not_resumed(field, values, change, command, saved_model, tmp_path, capsys):
    """Under the same name, with the same sizes and times. A copy with other times is the same model."""
    folder = tmp_path / "frozen"
    shutil.copytree(saved_model("qwen3", 0), folder)
    argv = {"max_steps": 2, **values, field: folder}
    assert main(command(**argv)) == 0
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    change(folder, saved_model)
    for path, time_ns in times.items():
        os.utime(path, ns=(time_ns, time_ns))
    assert main(command(**{**argv, "max_steps": 4})) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tsdkd train")]
    assert f"resume: {field}: " in line and str(folder) in line and line.count("sha256") == 2
    shutil.rmtree(folder)
    shutil.copytree(saved_model("qwen3", 0), folder, copy_function=shutil.copyfile)
    assert main(command(**{**argv, "max_steps": 4})) == 0


def bump(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))


@pytest.mark.parametrize(
    ("init_kwargs", "loaded", "others"),
    [
        ({}, ["model.safetensors", "config.json"], ["consolidated.safetensors", "pytorch_model.bin", "notes.json"]),
        ({"use_safetensors": False}, ["pytorch_model.bin"], ["model.safetensors"]),
        ({"variant": "fp16"}, ["model.fp16.safetensors"], ["model.safetensors"]),
        ({"subfolder": "sub"}, ["sub/model.safetensors"], ["model.safetensors"]),
        ({"subfolder": "index"}, ["index/a.safetensors", "index/b.safetensors"], ["index/c.safetensors"]),
    ],
)
def test_what_is_loaded_identifies_a_model(init_kwargs, loaded, others, tmp_path):
    """And nothing else that lies beside it."""
    for name in {*loaded, *others, "model.safetensors", "config.json"}:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(name.encode())
    weight_map = {"x": "a.safetensors", "y": "b.safetensors"}
    (tmp_path / "index").mkdir(exist_ok=True)
    (tmp_path / "index/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    identity = lambda: identify_model(str(tmp_path), AutoConfig.for_model("qwen3"), init_kwargs)  # noqa: E731
    before = identity()
    for name in others:
        bump(tmp_path / name)
    assert identity() == before
    for name in loaded:
        bump(tmp_path / name)
        assert identity() != before
        bump(tmp_path / name)


def test_a_checkpoint_that_does_not_name_the_teacher(command, tmp_path, monkeypatch):
    """Of an earlier version."""
    get_state = TSDKDTrainer._get_extra_state
    without = lambda trainer: {k: v for k, v in get_state(trainer).items() if k != "frozen_models"}  # noqa: E731
    monkeypatch.setattr(TSDKDTrainer, "_get_extra_state", without)
    assert main(command(max_steps=2)) == 0
    monkeypatch.undo()
    assert main(command(max_steps=4)) == 0


def test_a_model_in_the_hub_s_cache_is_known_by_its_files_names(saved_model, tmp_path, monkeypatch):
    """Without reading them; a copy in a folder is the same model."""
    source, snapshot, blobs = Path(saved_model("qwen3", 0)), tmp_path / "snapshots/c0", tmp_path / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    for path in source.iterdir():
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, blob)
        (snapshot / path.name).symlink_to(blob)
    config = AutoConfig.from_pretrained(source)
    assert identify_model(str(snapshot), config) == identify_model(str(source), config)
    config._commit_hash = "c0"
    assert identify_model("someone/absent", config) == "commit c0"


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
