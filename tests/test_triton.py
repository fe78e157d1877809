"""The Triton kernels: on edges of their own, and compiled for GPUs that aren't there.

They run in Triton's interpreter. `test_fused_triton.py` has the tests that they share with the torch backend.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import triton_interpreter
from test_fused import (
    SAME,
    Model,
    Pair,
    assert_same,
    draw,
    every_precision,
    every_term,
    gradients_of,
    run,
    run_exactly,
)
from tsdkd import losses
from tsdkd.lm_head import triton_kernels
from tsdkd.lm_head.projection import Projection
from tsdkd.lm_head.rows import GradOutputs, SoftmaxRows
from tsdkd.lm_head.softmax import TorchRows
from tsdkd.lm_head.statistics import StatisticsRequest
from tsdkd.lm_head.triton_rows import TritonRows

triton_interpreter.install()
HERE = Path(__file__).parent
BLOCK = triton_kernels.BLOCK


@every_term
@every_precision
@pytest.mark.parametrize("vocab_size", [BLOCK, 2 * BLOCK + 3])
def test_as_launched_on_a_gpu(name: str, dtype: torch.dtype, vocab_size: int) -> None:
    """One row per program, and blocks as wide as there."""
    assert triton_kernels.ROWS == 1
    pair = draw(2, vocab_size, padding=(5, 0)).copy(dtype)
    assert_same(run(pair, name, fused=True, backend="triton"), run_exactly(pair, name), *SAME[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("k", [1, 16, 40, 100])
def test_the_largest_logits(k: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when k exceeds the lanes or the vocabulary, and when logits are equal: the ids may then differ."""
    monkeypatch.setattr(triton_kernels, "BLOCK", 16)
    monkeypatch.setattr(triton_kernels, "ROWS", 4)
    make = torch.Generator().manual_seed(k)
    for size in (3, 16, 33, 90):
        logits = torch.randn(7, size, generator=make).mul(4).round().div(4).to(dtype)
        # the heads are identities: these are the logits, and the teacher's are the same from right to left
        student, teacher = (Model(x, torch.eye(size, dtype=dtype)) for x in (logits, logits.flip(-1)))
        found = Pair(student, teacher, size).fused(backend="triton")(StatisticsRequest(top_k=k))
        assert torch.equal(found.topk_logits.to(dtype), logits.topk(min(k, size)).values)
        assert torch.equal(found.topk_logits.to(dtype), logits.gather(-1, found.topk_ids))
        assert torch.equal(found.teacher_topk_logits.to(dtype), logits.flip(-1).gather(-1, found.topk_ids))
        assert all(len(set(row)) == min(k, size) for row in found.topk_ids.tolist())


@pytest.mark.parametrize("kind", [losses.Divergence(0.0, 0.5), losses.Divergence(1.0, 0.0, 0.5)], ids=str)
def test_a_weighted_divergence(kind: losses.Divergence) -> None:
    pair, found = draw(4, 50), []
    for fused in (True, False):
        copy = pair.copy()
        answer = (copy.fused(backend="triton") if fused else copy.whole())(StatisticsRequest(divergence=kind))
        answer.divergence.sum().backward()
        found.append({"divergence": answer.divergence.detach(), **gradients_of(copy)})
    assert_same(*found, *SAME[torch.float32])


def test_ids_at_the_ends_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "BLOCK", 16)
    pair, found = draw(2, 50), []
    ids = torch.tensor([[0, 15, 16, 31], [32, 48, 49, 47]])
    for fused in (True, False):
        copy = pair.copy()
        answer = (copy.fused(backend="triton") if fused else copy.whole())(StatisticsRequest(ids=ids))
        (answer.logps * torch.tensor([1.0, 2.0, -3.0, 4.0])).sum().backward()
        found.append({"logps": answer.logps.detach(), **gradients_of(copy)})
    assert_same(*found, *SAME[torch.float32])


def everything(rows_class: type[SoftmaxRows], logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """All that the rows of logits can tell, with the same logits from right to left as the teacher's."""
    student, teacher = (
        rows_class(Projection(torch.zeros(x.shape[1], 2)), torch.zeros(len(x), 2), 1.0) for x in (logits, logits)
    )
    student.logits.copy_(logits)
    teacher.logits.copy_(logits.flip(-1))
    student.compute_statistics(top_k=3)
    teacher.compute_statistics()
    ids, kind = torch.tensor([[0, 5]]).expand(len(logits), 2), losses.skew_reverse_kl(0.3)
    divergence, kl, ratio = student.compute_divergence(teacher, kind)
    top, _ = student.topk(3)
    found = {"entropy": student.entropy, "divergence": divergence, "logps": student.logps_at(ids), "top": top}
    grads = GradOutputs(None, torch.ones(len(logits)), torch.ones(ids.shape))
    return {**found, "gradient": student.logits_grad_(teacher, kind, kl, ratio, ids, grads)}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [0, 17, 39])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_logit_that_is_not_finite(bad: float, at: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows where it shows with torch operations, and only in its row."""
    monkeypatch.setattr(triton_kernels, "BLOCK", 16)
    monkeypatch.setattr(triton_kernels, "ROWS", rows)
    logits = torch.linspace(-3, 3, 40).repeat(3, 1)
    logits[1, at] = bad
    found, expected = (everything(rows_class, logits) for rows_class in (TritonRows, TorchRows))
    for name, x in expected.items():
        torch.testing.assert_close(
            found[name], x, equal_nan=True, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert x[0].isfinite().all() and x[2].isfinite().all()


@pytest.fixture(scope="module")
def resources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """What each kernel needs on an A100 and on an H100, by name."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache")), "TRITON_DUMP_PTXAS_LOG": "1"}
    command = [sys.executable, "-W", "ignore", str(HERE / "compile_kernels.py"), "80", "90"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-5000:]
    return json.loads(result.stdout)


def test_kernels_compile(resources: dict[str, dict[str, int]]) -> None:
    """With every combination of flags that a method needs; a processor's registers are enough for four programs."""
    assert {name.rpartition("sm_")[2] for name in resources} == {"80", "90"}
    for name, found in resources.items():
        assert found["spilled"] <= 32, name  # bytes; 0 from Triton 3.9 on
        assert found["registers"] <= 64, name
        assert found["shared"] <= 32 * 1024, name
        if "bf16" in name:  # logits come 16 bytes at a time, and gradients are rounded to the nearest
            assert found["wide loads"] >= (2 if "divergence" in name else 1), name
            assert (found["roundings"] > 0) == ("grad" in name), name
