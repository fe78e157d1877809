"""Runs `on_virtual_device.py` in a process of its own: once torch knows the device, every test would feel it."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
BYTES = {"tsd-kd": 32, "eopd": 29, "gkd": 29}
"""Limits for a token and a word of the vocabulary: the matrix products, and one pass over the logits per kernel."""


def python(*arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
    command = [sys.executable, "-W", "ignore", *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr[-5000:]
    return result.stdout


def test_every_method_trains_evaluates_saves_and_resumes_on_a_virtual_device() -> None:
    """And what keeps that test honest: planted faults are caught."""
    print(python("-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "on_virtual_device.py")))


def test_a_gpu_is_not_waited_for_all_the_time() -> None:
    printed = python(str(HERE.parent / "benchmarks" / "device_counts.py"), "--methods", *BYTES, "--json")
    for figures in json.loads(printed):
        assert figures["host syncs in 16 tokens"] <= 1, figures["lines of a token"]
        assert figures["host syncs a micro-batch"] <= 10, figures["lines of a micro-batch"]
        assert figures["bytes a word"] <= BYTES[figures["method"]]
