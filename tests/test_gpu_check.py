"""`scripts/gpu_check`, rehearsed on the CPU: what its parts say arrives, whatever becomes of them."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu_check"
# a benchmark that ends at once, and one that hangs after its first line, with a process of its own session beside it
SABOTAGE = """
import os, subprocess, sys, time
command = " ".join(sys.orig_argv)
if "head.py" in command:
    print("no kernel for this device", flush=True)
    os._exit(3)
if "rollout.py" in command:
    print("| prompts | tokens/s |\\n|---|---|\\n| 64 | 7 |", flush=True)
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"], start_new_session=True)
    open(os.environ["CHILD"], "w").write(str(child.pid))
    time.sleep(600)
"""


def test_a_rehearsal(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SABOTAGE)
    out, child = tmp_path / "out", tmp_path / "child"
    result = subprocess.run(
        [SCRIPT, out, "--parts", "tests", "head", "rollout", "micro_batch", "--limit", "rollout=3"],
        env={
            **os.environ,
            "DEVICE": "cpu",
            "PYTHON": sys.executable,
            "PYTHONPATH": str(tmp_path),
            "PYTEST_ADDOPTS": "-k gkd",
            "CHILD": str(child),
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 1, result.stderr[-3000:]
    assert "no CUDA device: rehearsing on the CPU with small sizes" in result.stdout
    results = json.loads((out / "results.json").read_text())
    assert results["rehearsal"] and results["environment"]["trl"]
    parts = results["parts"]
    outcomes = {name: part["outcome"] for name, part in parts.items()}
    assert outcomes == {
        "tests": "passed",
        "head": "failed, exit code 3",
        "rollout": "stopped after 3 s",
        "micro_batch": "passed",
    }
    assert parts["tests"]["tables"][0]["rows"] == [["test_two_steps_and_the_second_again[gkd]", "passed"]]
    assert "no kernel for this device" in parts["head"]["end"]
    assert parts["rollout"]["tables"][0]["rows"] == [["64", "7"]]
    assert not psutil.pid_exists(pid := int(child.read_text())) or psutil.Process(pid).status() == "zombie"
    estimate, memory, times = parts["micro_batch"]["tables"]
    assert float(estimate["rows"][0][-1]) > 0 and float(memory["rows"][0][1]) > 0
    step, *shares = (float(ms) for ms in times["rows"][0])
    assert 0 < sum(shares) < step and min(shares) > 0
    report = (out / "report.md").read_text()
    assert "| 64 | 7 |" in report and "no kernel for this device" in report and f"| {times['rows'][0][0]} |" in report
    assert "no kernel for this device" in (out / "log.txt").read_text()


def parts(tmp_path: Path, *names: str, **variables: str) -> tuple[int, dict]:
    """Exit code and results of a rehearsal."""
    command = [SCRIPT, tmp_path / "out", "--parts", *names]
    environment = {**os.environ, "DEVICE": "cpu", "PYTHON": sys.executable, **variables}
    code = subprocess.run(command, env=environment, capture_output=True, timeout=600).returncode
    return code, json.loads((tmp_path / "out/results.json").read_text())["parts"]


def test_no_vllm_is_no_failure(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['vllm'] = None")
    code, found = parts(tmp_path, "vllm", PYTHONPATH=str(tmp_path))
    assert code == 0 and found["vllm"]["outcome"] == "left out, vLLM isn't installed"


@pytest.mark.vllm
@pytest.mark.skipif(not find_spec("vllm"), reason="vLLM isn't installed")
def test_vllm_takes_two_steps(tmp_path):
    code, found = parts(tmp_path, "vllm")
    assert code == 0, found["vllm"]["end"]
    (table,) = found["vllm"]["tables"]
    assert [row[:2] for row in table["rows"]] == [["no", "1"], ["no", "2"]]


def test_the_time_counts_from_the_end_of_the_setup(tmp_path):
    """Of a copy whose setup has a download of 470 seconds behind it: bash goes on from the SECONDS it is given."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPT, tmp_path / "scripts")
    programs = {"bare": "echo torch", "arguments": 'echo "$@"'}
    programs["scripts/setup"] = "mkdir -p .venv/bin && cp arguments .venv/bin/python"
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PYTHON": str(tmp_path / "bare"), "SECONDS": "470"}
    command = [tmp_path / "scripts/gpu_check", tmp_path / "out"]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert int(said[said.index("--seconds") + 1]) > 400


def test_what_is_asked_for_is_checked(tmp_path):
    for arguments in (["--parts", "nothing"], ["--limit", "nothing=3"], ["--limit", "head=soon"]):
        command = [SCRIPT, tmp_path / "out", *arguments]
        result = subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True)
        assert result.returncode == 2 and arguments[1].split("=")[0] in result.stderr
    missing = {**os.environ, "WHEELS": str(tmp_path / "nowhere"), "PYTHON": sys.executable}
    result = subprocess.run([SCRIPT, tmp_path / "out"], env=missing, capture_output=True, text=True)
    assert result.returncode == 2 and "nowhere" in result.stderr
    assert not (tmp_path / "out").exists()
