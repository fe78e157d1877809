"""Badly timed accidents of runs. Whatever happens, the same command goes on and ends in the bitwise same student."""

import atexit
import os
import pty
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from tsdkd.files import resolve_path

_SETTINGS = "--max_steps 8 --save_strategy steps --save_steps 2 --save_total_limit 2 --report_to none --seed 3"
_SETTINGS += (
    " --max_new_tokens 12 --gradient_accumulation_steps 1 --logging_steps 1 --record_steps 3 --eval_strategy no"
)
_STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
_SECONDS = 300  # until something hangs
_PREEMPTED = 75


def stopped_by_a_signal(rng: random.Random, folder: Path) -> None:
    """While it loads, trains or saves; once, or several signals at once."""
    run = _start(folder / "out")
    _wait_until(run, folder / "out", rng)
    chosen = rng.choices(_STOPS, k=rng.choice([1, 1, 2, 3]))
    for number in chosen:
        run.send_signal(number)
    code = _end(run)
    assert code in (0, _PREEMPTED, 130, *(-number for number in chosen)), code
    _continues(folder / "out")


def killed(rng: random.Random, folder: Path) -> None:
    """With -9."""
    run = _start(folder / "out")
    _wait_until(run, folder / "out", rng)
    run.kill()
    _end(run)
    _continues(folder / "out")


def nobody_reads(rng: random.Random, folder: Path) -> None:
    """A pipe or a terminal that closes, for one stream or both."""
    reader, writer = rng.choice([os.pipe, pty.openpty])()
    streams = rng.choice([{"stdout": writer}, {"stderr": writer}, {"stdout": writer, "stderr": writer}])
    run = _start(folder / "out", **{"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **streams})
    os.close(writer)
    end = time.monotonic() + rng.uniform(0, 12)
    while time.monotonic() < end and run.poll() is None:
        os.set_blocking(reader, False)
        try:
            os.read(reader, 10_000)
        except OSError:
            time.sleep(0.05)
    os.close(reader)
    code = _end(run)
    assert code in (0, _PREEMPTED, -signal.SIGPIPE), code
    _continues(folder / "out")


def two_at_once(rng: random.Random, folder: Path) -> None:
    """Or three, of which some may find the directory when it is there already. One is the run."""
    out, runs = folder / "out", []
    for _ in range(rng.choice([2, 2, 3])):
        resume = rng.choice(["true", "false"])
        runs.append(_start(out, "--resume", resume, "--max_steps", "20", stderr=subprocess.PIPE))
        time.sleep(rng.choice([0, rng.uniform(0, 8)]))
    said = [run.communicate(timeout=_SECONDS)[1].decode() for run in runs]
    codes = [run.returncode for run in runs]
    assert set(codes) <= {0, 2} and 0 in codes, (codes, said)
    for code, text in zip(codes, said, strict=True):
        assert "Traceback" not in text
        assert (
            code == 0 or f"output_dir: another run is using {out} (process" in text or "contains an earlier" in text
        ), text
    _continues(out, "--max_steps", "20")


def a_launcher(rng: random.Random, folder: Path) -> None:
    """It, or one of its two processes, is killed or signalled. None of them is left, and all is."""
    out, two = folder / "out", ("--num_processes", "2")
    launcher = _start(out, *two)
    _wait_until(launcher, out, rng)
    ranks = psutil.Process(launcher.pid).children()
    victim = rng.choice([launcher, launcher, *ranks])
    if victim.is_running() if isinstance(victim, psutil.Process) else victim.poll() is None:
        victim.send_signal(rng.choice([signal.SIGKILL, signal.SIGKILL, *_STOPS]))
    _end(launcher)
    assert not psutil.wait_procs(ranks, _SECONDS)[1], "left behind"
    _continues(out, *two)


def changed_directory(rng: random.Random, folder: Path) -> None:
    """Some of the output directory, or all, is deleted, moved or replaced in mid-run, maybe more than once."""
    out, longer = folder / "out", ("--max_steps", "20")
    run = _start(out, *longer, stderr=subprocess.PIPE)
    for attempt in range(rng.choice([1, 1, 2])):
        _wait_until(run, out, rng, ["tsdkd_config.yaml", "checkpoint-2"])
        parts = sorted(out.glob("*")) if out.is_dir() else []
        _change(rng.choice([out, *parts]), folder / f"moved-{attempt}", rng)
    errors = run.communicate(timeout=_SECONDS)[1].decode()
    if run.returncode == 0:
        assert _student(out) == _uninterrupted(*longer), "another student"
        _continues(out, *longer)
        return
    (line,) = re.findall(r"tsdkd train: .*", errors)  # maybe behind a progress bar
    assert run.returncode == 2 and str(out) in line and "Traceback" not in errors, errors


def other_teacher(rng: random.Random, folder: Path) -> None:
    """A byte of it is another, or only its files' times and owner: the one is refused, the other goes on."""
    teacher, out = folder / "teacher", folder / "out"
    shutil.copytree(_demo("teacher"), teacher)
    named = ("--teacher_model_name_or_path", str(teacher))
    assert _end(_start(out, *named, "--max_steps", str(rng.choice([2, 3, 4])))) == 0
    weights = teacher / "model.safetensors"
    is_changed = rng.random() < 0.7
    if is_changed:
        content = bytearray(weights.read_bytes())
        header = 8 + int.from_bytes(content[:8], "little")
        for _ in range(rng.choice([1, 5])):
            content[rng.randrange(header, len(content)) & ~3] ^= 1 << rng.randrange(3)  # the lowest bits of a number
        times = weights.stat()
        weights.write_bytes(content)
        os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    else:
        shutil.copyfile(weights, folder / "copy")
        os.replace(folder / "copy", weights)
        os.utime(weights, (rng.randrange(10**9), rng.randrange(10**9)))
    run = _start(out, *named, stderr=subprocess.PIPE)
    errors = run.communicate(timeout=_SECONDS)[1].decode()
    assert run.returncode == (2 if is_changed else 0), errors
    assert is_changed == (
        f"resume: teacher_model_name_or_path: the weights or the config.json of {teacher} have changed" in errors
    ), errors


def nowhere_to_write(rng: random.Random, folder: Path) -> None:
    """One line, exit code 2, and nothing is left."""
    (folder / "file").touch()
    limit = rng.choice([None, rng.randrange(64, 4096)])  # torch itself needs some bytes
    depth = "/".join(rng.choices(["a", "b", "c d", "é"], k=rng.randint(1, 4)))
    roots = [folder] if limit is not None else ["/proc", "/sys", "/proc/self", folder / "file", "/dev/full"]
    out = Path(rng.choice(roots), depth)
    before = sorted(folder.rglob("*"))

    def restrict() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    run = _start(out, "--resume", "false", stderr=subprocess.PIPE, preexec_fn=restrict)
    errors = run.communicate(timeout=_SECONDS)[1].decode()
    (line,) = [line for line in errors.splitlines() if line.startswith("tsdkd train: ")]
    assert run.returncode == 2 and "output_dir" in line and "Traceback" not in errors, errors
    assert sorted(folder.rglob("*")) == before


ATTACKS: dict[str, Callable[[random.Random, Path], None]] = {
    "a signal": stopped_by_a_signal,
    "kill -9": killed,
    "nobody reads": nobody_reads,
    "two at once": two_at_once,
    "a launcher": a_launcher,
    "a changed directory": changed_directory,
    "another teacher": other_teacher,
    "nowhere to write": nowhere_to_write,
}


def _start(out: Path, *flags: str, **options: Any) -> subprocess.Popen[bytes]:
    command = ["train", "--config", "demo.yaml", *_SETTINGS.split(), "--output_dir", str(out), "--resume", "true"]
    batch = "2" if "--num_processes" in flags else "4"
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    merged = dict(zip(command[1::2], command[2::2], strict=True)) | {"--per_device_train_batch_size": batch} | given
    program = [sys.executable, "-m", "tsdkd", "train", *(word for pair in merged.items() for word in pair)]
    threads = {"OMP_NUM_THREADS": "1", "ACCELERATE_TORCH_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, **threads, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(program, env=environment, **{**streams, **options})


def _end(run: subprocess.Popen[bytes]) -> int:
    return run.wait(_SECONDS)


_SIGNS = ["nothing", "tsdkd_config.yaml", "tsdkd_config.yaml", "checkpoint-2", "checkpoint-6"]


def _wait_until(run: subprocess.Popen[bytes], out: Path, rng: random.Random, signs: list[str] = _SIGNS) -> None:
    """Some time: while it starts, once it has begun, or about a save."""
    sign = rng.choice(signs)
    end = time.monotonic() + _SECONDS
    while sign != "nothing" and not (out / sign).exists() and run.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(rng.choice([0, rng.uniform(0, 0.3), rng.uniform(0, 2)]))


def _change(place: Path, elsewhere: Path, rng: random.Random) -> None:
    """Delete something, move it away, or put something else in its place, while it may be written."""
    how = rng.choice(["deleted", "moved", "a file", "a link"])
    try:
        if how == "deleted" and place.is_dir():
            shutil.rmtree(place, ignore_errors=True)
        elif how == "deleted":
            place.unlink()
        else:
            place.rename(elsewhere)
            if how == "a file":
                place.write_text("something else")
            elif how == "a link":
                place.symlink_to(elsewhere)
    except OSError:
        pass  # it is gone, or there again


def _continues(out: Path, *flags: str) -> None:
    run = _start(out, *flags, stderr=subprocess.PIPE)
    errors = run.communicate(timeout=_SECONDS)[1].decode()
    assert run.returncode == 0, errors[-2000:]
    assert _student(out) == _uninterrupted(*flags), "another student"
    assert not [path.name for path in out.glob(".*")] and not (out / "_tsdkd.lock").exists()


@cache
def _uninterrupted(*flags: str) -> bytes:
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    assert _end(_start(Path(folder, "out"), *flags)) == 0
    return _student(Path(folder, "out"))


def _student(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def _demo(role: str) -> Path:
    return Path(str(resolve_path(f"tsdkd://demo/{role}")))
