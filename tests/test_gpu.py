"""What needs a GPU: `CUDA_VISIBLE_DEVICES=0 scripts/test -m gpu`. Skipped without one."""

import pytest
import torch
from datasets import Dataset

from conftest import QUIET, build_model, build_tokenizer, make_rows
from tsdkd import EOPDConfig, EOPDTrainer, TSDKDConfig, TSDKDTrainer
from tsdkd.fused import FusedHead, Projection
from tsdkd.objectives import Responses
from tsdkd.objectives.tsd_kd import TSDKDObjective
from tsdkd.statistics import LogitsHead

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
VOCABULARY, HIDDEN, TEACHER_HIDDEN, RESPONSES, LENGTH = 32768, 256, 320, 4, 96


def inputs(dtype: torch.dtype, tokens: int = RESPONSES * LENGTH) -> list[torch.Tensor]:
    """Hidden states and heads of student and teacher, float32 numbers that `dtype` holds exactly."""
    make = torch.Generator("cuda").manual_seed(0)
    shapes = [(tokens, HIDDEN), (VOCABULARY, HIDDEN), (tokens, TEACHER_HIDDEN), (VOCABULARY, TEACHER_HIDDEN)]
    made = [torch.randn(shape, generator=make, device="cuda") for shape in shapes]
    made[1] *= 2 * HIDDEN**-0.5
    made[3] *= 2 * TEACHER_HIDDEN**-0.5
    return [x.to(dtype) for x in made]


def loss_and_gradients(tensors: list[torch.Tensor], fused: bool, **options: float) -> list[torch.Tensor]:
    hidden, weight = (x.clone().requires_grad_() for x in tensors[:2])
    if fused:
        head = FusedHead(hidden, Projection(weight), tensors[2], Projection(tensors[3]), **options)
    else:
        head = LogitsHead(hidden @ weight.t(), tensors[2] @ tensors[3].t())
    mask = torch.ones(len(hidden) // LENGTH, LENGTH, dtype=torch.bool, device="cuda")
    loss = TSDKDObjective()(head, Responses(mask)).loss
    loss.backward()
    return [x.detach().double() for x in (loss, hidden.grad, weight.grad)]


def errors(found: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("chunk_gib", [None, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_head_is_as_exact_as_whole_logits(dtype, chunk_gib):
    tensors = inputs(dtype)
    exact = loss_and_gradients([x.double() for x in tensors], fused=False)
    fused = errors(loss_and_gradients(tensors, fused=True, chunk_gib=chunk_gib), exact)
    if dtype == torch.float32:
        assert fused[0] <= 1e-6
        assert max(fused[1:]) <= 1e-5
    else:
        whole = errors(loss_and_gradients(tensors, fused=False), exact)
        assert all(ours <= 1.1 * theirs + 1e-4 for ours, theirs in zip(fused, whole, strict=True))


@pytest.mark.parametrize("chunk_gib", [0.05, 0.2])
def test_peak_memory_keeps_to_the_budget(chunk_gib):
    """Logits within the budget; beside it scratch tiles, and gradients in float32 and as they are returned."""
    tensors = inputs(torch.bfloat16, tokens=RESPONSES * LENGTH * 16)
    loss_and_gradients(tensors, fused=True, chunk_gib=chunk_gib)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    hidden, weight = (x.clone().requires_grad_() for x in tensors[:2])
    head = FusedHead(hidden, Projection(weight), tensors[2], Projection(tensors[3]), chunk_gib=chunk_gib)
    mask = torch.ones(len(hidden) // LENGTH, LENGTH, dtype=torch.bool, device="cuda")
    TSDKDObjective()(head, Responses(mask)).loss.backward()
    extra = torch.cuda.max_memory_allocated() - before
    leaves = (hidden.numel() + weight.numel()) * (2 + 4 + 2)
    assert extra <= (chunk_gib + 0.25) * 2**30 + leaves


@pytest.mark.parametrize("trainer_class, config_class", [(TSDKDTrainer, TSDKDConfig), (EOPDTrainer, EOPDConfig)])
def test_a_step_in_bfloat16_with_gradient_checkpointing(trainer_class, config_class, tmp_path):
    steps = []
    for fused in (True, False):
        values = {**QUIET, "use_cpu": False, "bf16": True, "gradient_checkpointing": True, "fused_head": fused}
        values |= {"max_steps": 1, "per_device_train_batch_size": 6, "optim": "sgd", "learning_rate": 0.1}
        values |= {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "max_length": 64, "lmbda": 0.0}
        values |= {"rollout_batch_size": 6} if config_class is EOPDConfig else {}
        student = build_model("llama", 0)
        before = torch.cat([p.detach().flatten() for p in student.parameters()])
        trainer = trainer_class(
            model=student,
            teacher_model=build_model("qwen3", 1, rows=70, hidden=48),
            args=config_class(output_dir=str(tmp_path), **values),
            train_dataset=Dataset.from_list(make_rows(12)),
            processing_class=build_tokenizer(),
        )
        trainer.train()
        steps.append(torch.cat([p.detach().flatten().cpu() for p in trainer.model.parameters()]) - before)
    assert steps[0].norm() > 1e-3
    assert (steps[0] - steps[1]).norm() <= 0.2 * steps[1].norm()
