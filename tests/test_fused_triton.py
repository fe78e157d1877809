"""The tests of `test_fused.py` on the Triton kernels, in Triton's interpreter: collected here a second time."""

import pytest

import test_fused
from test_fused import *  # noqa: F403
from tsdkd.lm_head import triton_kernels


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of another shape than on a GPU, for speed: an operation takes the interpreter as long as many numbers."""
    monkeypatch.setattr(test_fused, "BACKEND", "triton")
    monkeypatch.setattr(triton_kernels, "ROWS", 16)
    monkeypatch.setattr(triton_kernels, "BLOCK", 1024)
