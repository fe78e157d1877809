"""The fast set, `scripts/test --fast`: which tests are left out of it, by the marker `slow`.

Whole files: what starts several processes, compiles, builds, or drives another program. Single tests: those that take
longest. Of matrices every n-th case stays.
"""

import re
from collections import Counter

import pytest

SLOW_FILES = {
    "test_gpu.py",
    "test_gpu_check.py",
    "test_invariants.py",
    "test_reliability.py",
    "test_sandbox.py",
    "test_slurm.py",
    "test_virtual_device.py",
    "test_vllm.py",
    "test_vllm_server.py",
    "test_wheel.py",
    "test_zero.py",
}
SLOW_TESTS: set[str] = set()
EVERY_NTH: dict[str, int] = {}
"""Test -> n, for tests with many cases."""


def mark_slow(items: list[pytest.Item]) -> None:
    """Mark what isn't in the fast set."""
    seen: Counter[str] = Counter()
    for item in items:
        test = re.sub(r"\[.*", "", item.nodeid.rpartition("/")[2], flags=re.DOTALL)
        file = test.partition("::")[0]
        nth = seen[test] % EVERY_NTH.get(test, 1)
        seen[test] += 1
        if file in SLOW_FILES or test in SLOW_TESTS or nth:
            item.add_marker(pytest.mark.slow)
