"""What short runs of every method give stays what is on record: see `invariants.py`."""

import pytest

from invariants import compare


def test_runs_in_one_process_are_those_on_record() -> None:
    assert compare("one process") == []


def test_runs_in_two_processes_are_those_on_record() -> None:
    assert compare("two processes") == []


@pytest.mark.vllm
def test_runs_with_vllm_are_those_on_record() -> None:
    pytest.importorskip("vllm")
    assert compare("vllm") == []
