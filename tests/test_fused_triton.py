"""The tests of `test_fused.py` on the Triton kernels, in Triton's interpreter: collected here a second time."""

import pytest

import test_fused
import triton_interpreter
from test_fused import *  # noqa: F403
from tsdkd.lm_head import triton_kernels

triton_interpreter.install()
# no kernel is in these
del test_bad_shapes, test_requests_without_an_answer, test_own_token_losses_see_every_token_once  # noqa: F821


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer and larger operations than on a GPU: the interpreter takes as long for one number as for thousands."""
    monkeypatch.setattr(test_fused, "BACKEND", "triton")
    monkeypatch.setattr(test_fused, "CHUNKS", (7,))  # the loop over chunks is the same for both backends
    monkeypatch.setattr(test_fused, "SMALL_CHUNK", 4)
    monkeypatch.setattr(triton_kernels, "ROWS", 16)
    monkeypatch.setattr(triton_kernels, "BLOCK", 1024)
