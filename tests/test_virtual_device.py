"""Runs `on_virtual_device.py` in a process of its own: once torch knows the device, every test would feel it."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def python(*arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
    command = [sys.executable, "-W", "ignore", *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr[-5000:]
    return result.stdout


def test_every_method_trains_evaluates_saves_and_resumes_on_a_virtual_device() -> None:
    """And what keeps that test honest: planted faults are caught."""
    print(python("-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "on_virtual_device.py")))
