"""What short runs of every method give stays what is on record: see `invariants.py`."""

import pytest

from invariants import compare, is_recorded_machine


def require_same(part: str) -> None:
    if not is_recorded_machine(part):
        pytest.skip("the record was written on another kind of machine, which rounds differently")
    assert compare(part) == []


def test_runs_in_one_process_are_those_on_record() -> None:
    require_same("one process")


def test_runs_in_two_processes_are_those_on_record() -> None:
    require_same("two processes")


@pytest.mark.vllm
def test_runs_with_vllm_are_those_on_record() -> None:
    pytest.importorskip("vllm")
    require_same("vllm")
