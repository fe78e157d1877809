"""Every method, on a device that isn't there. `test_virtual_device.py` runs this in a process of its own: all of it
knows the device."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from triton.runtime import interpreter

import virtual_device
from conftest import QUIET, build_model, flags, make_rows, weights, write_jsonl
from tsdkd.cli import main
from tsdkd.lm_head import fused, triton_kernels
from tsdkd.lm_head.fused import FusedHead
from tsdkd.lm_head.projection import Projection
from tsdkd.lm_head.rows import GradOutputs, SoftmaxRows
from tsdkd.lm_head.statistics import StatisticsRequest
from tsdkd.lm_head.triton_rows import TritonRows
from tsdkd.methods import METHODS
from tsdkd.models.teacher import load_teacher
from tsdkd.rollout.hf import sample_completions
from tsdkd.rollout.seeding import prompt_generator

os.environ["ACCELERATE_TORCH_DEVICE"] = virtual_device.DEVICE
virtual_device.install()
triton_kernels.BLOCK = 128  # the vocabularies are small

BF16, PURE = {"bf16": True}, {"bf16": True, "dtype": "bfloat16"}  # float32 weights under autocast; bfloat16 weights
CHECKPOINTED, WHOLE, RECORDED = {"gradient_checkpointing": True}, {"fused_head": False}, {"record_steps": 1}
RUNS: list[tuple[str, dict[str, Any]]] = [
    ("tsd-kd", {"adaptive_opener": True, **RECORDED}),
    ("tsd-kd", BF16 | CHECKPOINTED | {"log_term_gradients": 1}),
    ("tsd-kd", PURE | WHOLE | RECORDED),
    ("tsd-kd-released", BF16 | WHOLE),
    ("gkd", PURE | CHECKPOINTED | RECORDED),
    ("distillm", BF16 | {"on_policy_share": 0.9}),
    ("speculative-kd", WHOLE | CHECKPOINTED | RECORDED),
    ("supervised-kd", PURE),
    ("seq-kd", BF16 | CHECKPOINTED),
    ("kd", WHOLE | RECORDED),
    ("minillm", BF16 | CHECKPOINTED),
    ("eopd", RECORDED),
    ("eopd", BF16 | WHOLE | CHECKPOINTED | RECORDED),
    ("eopd", PURE | {"top_p": 0.9}),
    ("eopd-full", PURE | CHECKPOINTED),
    ("eopd-random", BF16 | RECORDED),
    ("opd", WHOLE),
    ("opd-entropy-bonus", PURE | WHOLE),
    ("opd-advantage-shaping", BF16),
]


def command(method: str, saved_model: Any, folder: Path, **options: Any) -> list[str]:
    """`tsdkd train` for two steps of two micro-batches, with an evaluation in between and a checkpoint after each."""
    data, held_out = (write_jsonl(folder.parent / f"{n}.jsonl", make_rows(n)) for n in (16, 4))
    values = {**QUIET, "use_cpu": False, "method": method, "dataset_name": data, "eval_dataset_name": held_out}
    values |= {"model_name_or_path": saved_model("gemma2", 0), "output_dir": folder, "dataloader_pin_memory": False}
    if METHODS[method].config_class.has_teacher:
        values |= {"teacher_model_name_or_path": saved_model("qwen3", 1, rows=70)}
    values |= {"max_steps": 2, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "seed": 3}
    values |= {"max_new_tokens": 18, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
    values |= {"eval_strategy": "steps", "eval_steps": 1, "eval_delay": 2, "learning_rate": 1e-3}
    if hasattr(METHODS[method].config_class, "rollout_batch_size"):
        values |= {"rollout_batch_size": 12}
    return ["train", *flags(**values | options)]


@pytest.mark.parametrize(("method", "options"), RUNS, ids=str)
def test_a_run_and_its_resume(method: str, options: dict[str, Any], saved_model: Any, tmp_path: Path) -> None:
    """The second step, resumed from the first one's checkpoint, ends with the same weights."""
    folder = tmp_path / "run"
    arguments = command(method, saved_model, folder, resume=True, **options)
    assert main(arguments) == 0
    whole = weights(folder)
    assert whole.isfinite().all() and not torch.equal(whole, weights(folder / "checkpoint-1"))
    shutil.rmtree(folder / "checkpoint-2")
    (folder / "model.safetensors").unlink()
    assert main(arguments) == 0
    assert torch.equal(weights(folder), whole)


def test_every_method_is_run() -> None:
    assert {method for method, _ in RUNS} == METHODS.keys() - {"grpo"}


def test_a_teacher_is_read_straight_to_its_device(saved_model: Any, tmp_path: Path) -> None:
    """Before it is placed; the host of eight processes would else hold eight of them."""
    args = METHODS["gkd"].config_class(str(tmp_path), bf16=False)
    config = AutoConfig.from_pretrained(saved_model("qwen3", 1, rows=70))
    teacher = load_teacher(saved_model("qwen3", 1, rows=70), config, args)
    assert {str(p.device) for p in teacher.parameters()} == {virtual_device.DEVICE}


# The test of the test ---------------------------------------------------------------------------------------------


def without_device(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    position = torch.arange(1, batch["input_ids"].shape[1])
    start = batch["prompt_lengths"].unsqueeze(-1)
    return (position >= start) & (position < start + batch["completion_lengths"].unsqueeze(-1))


def cpu_index(rows: SoftmaxRows, ids: torch.Tensor) -> torch.Tensor:
    return rows.logits.gather(-1, ids.cpu())


def cpu_generator(logits: torch.Tensor, uniform: torch.Tensor, top_p: float) -> tuple[torch.Tensor, ...]:
    drawn = torch.rand(len(uniform), device=uniform.device, generator=torch.Generator())
    return drawn.long(), drawn


@pytest.mark.parametrize(
    ("where", "fault", "said"),
    [
        ("tsdkd.trainer.trainer.completion_mask", without_device, "same device"),
        ("tsdkd.lm_head.rows.SoftmaxRows.logps_at", cpu_index, "same device"),
        ("tsdkd.rollout.hf.sample_tokens", cpu_generator, "device type for generator"),
    ],
)
def test_a_planted_fault_is_caught(
    where: str, fault: Any, said: str, saved_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, fault)
    with pytest.raises(RuntimeError, match=said):
        main(command("tsd-kd", saved_model, tmp_path / "run"))


def head_entropy(device: str) -> torch.Tensor:
    weight = torch.linspace(-1, 1, 400).view(50, 8).to(device)
    return FusedHead(weight[:3], Projection(weight))(StatisticsRequest(entropy=True)).entropy.cpu()


def test_the_head_runs_in_triton_where_that_works(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("Failed to find C compiler\nat /usr/bin")

    with virtual_device.counted() as with_triton:
        expected = head_entropy(virtual_device.DEVICE)
    assert not caplog.messages
    fused._triton_works.cache_clear()
    monkeypatch.setattr(interpreter.InterpretedFunction, "run", fail)
    with virtual_device.counted() as with_torch:
        found = [head_entropy(virtual_device.DEVICE) for _ in range(2)]
    fused._triton_works.cache_clear()
    assert with_torch.kernels > 4 * with_triton.kernels
    for entropy in (expected, *found):
        torch.testing.assert_close(entropy, head_entropy("cpu"))
    (said,) = caplog.messages
    assert "Triton" in said and "C compiler" in said and "\n" not in said


def test_what_a_kernel_reads_and_writes_is_counted() -> None:
    logits = torch.zeros(3, 5000, dtype=torch.bfloat16, device=virtual_device.DEVICE)
    rows = TritonRows(Projection(torch.zeros_like(logits)[:, :8]), logits[:, :8], 1.0)
    rows.logits = logits
    with virtual_device.counted() as counts:
        rows.compute_statistics()
    assert counts.kernels == 1 and counts.bytes == 3 * (5000 * 2 + 3 * 4)
    with virtual_device.counted() as counts:
        rows.logits_grad_(None, None, logits, logits, None, GradOutputs(entropy=rows.entropy))
    assert counts.kernels == 1 and counts.bytes == 3 * (5000 * 2 * 2 + 4 * 4)
    with pytest.raises(ValueError, match="cpu tensor"):
        rows.logits_grad_(None, None, logits, logits, None, GradOutputs(entropy=torch.ones(3)))


def test_a_product_is_added_in_float32() -> None:
    half = torch.full((4, 6), 1 / 3, device=virtual_device.DEVICE).bfloat16()
    total = torch.ones(4, 4, device=virtual_device.DEVICE)
    with virtual_device.counted() as counts:
        torch.addmm(total, half, half.t(), out_dtype=torch.float32, out=total)
    assert counts.kernels == 1 and counts.bytes == 2 * 4 * 6 * 2 + 2 * 4 * 4 * 4
    torch.testing.assert_close(total.cpu(), 1 + half.cpu().float() @ half.cpu().float().t())


def test_what_mixes_and_what_does_not() -> None:
    here, there = torch.arange(6.0, device=virtual_device.DEVICE), torch.arange(6.0)
    assert (here + torch.tensor(2.0)).tolist() == [2, 3, 4, 5, 6, 7]
    for mix in (lambda: here + there, lambda: torch.stack([here, there]), lambda: here.masked_fill_(there > 1, 0.0)):
        with pytest.raises(RuntimeError, match="same device"):
            mix()
    with pytest.raises(TypeError, match="numpy"):
        here.numpy()
    assert there[here.long().cpu()].device.type == "cpu"
    assert torch.zeros(2).to(here).device == here.device == torch.zeros_like(here).device


def test_what_is_counted() -> None:
    x = torch.arange(8.0, device=virtual_device.DEVICE)
    waits = [x.tolist, x.cpu, x.sum().item, x.nonzero, lambda: x[x > 3], lambda: torch.tensor([1.0], device=x.device)]
    waits += [lambda: x[torch.tensor([1, 2])], lambda: x.new_tensor(3), lambda: bool((x > 3).all()), x.unique]
    for wait in waits:
        with virtual_device.counted() as counts:
            wait()
        assert counts.syncs == 1, wait
    with virtual_device.counted() as counts:
        y = x[x.long()] + torch.ones(8).to(x.device, non_blocking=True) + 3.0
    assert counts.syncs == 0 and counts.kernels == 4 and counts.moved == 32
    with virtual_device.counted() as counts:
        y[y > 4] = 0.0
        y[y.long()] += 1.0
        y.view(2, 4).t()
    assert counts.syncs == 0
    with virtual_device.counted() as counts:
        x.add_(1.0)
        x.view(8, 1).expand(8, 1000).sum(-1)
    assert counts.bytes == 4 * (8 + 8) + 4 * (8 + 8)


def test_a_rollout_is_the_cpu_s_with_a_wait_in_sixteen_tokens() -> None:
    """Whatever ends, and whenever rows leave the batch."""
    model = build_model("gemma2", 2)
    prompts = [[4 + (7 * i + j) % 50 for j in range(1 + i % 5)] for i in range(24)]
    limits = [1 + (11 * i) % 70 for i in range(24)]

    def rolled_out() -> Any:
        generators = [prompt_generator(0, 0, i) for i in range(24)]
        return sample_completions(model, prompts, limits, generators, stop_token_ids={1, 7}, vocab_size=64)

    on_the_cpu = rolled_out()
    model.to(virtual_device.DEVICE)
    with virtual_device.counted() as counts:
        assert rolled_out() == on_the_cpu
    longest = max(len(completion.ids) for completion in on_the_cpu)
    assert len({len(completion.ids) for completion in on_the_cpu}) > 10 and longest > 48
    assert counts.lines.total() <= -(-longest // 16) + 2  # transformers looks at the prompts' mask twice
