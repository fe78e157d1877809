"""On a GPU: `scripts/gpu_check OUT`, or `CUDA_VISIBLE_DEVICES=0 scripts/test -m gpu`. Skipped without one.

With TSDKD_GPU_REHEARSAL=1 and no GPU the same tests run on the CPU, those of a GPU's memory excepted: it shows that
they can run, and catches what doesn't need CUDA.
"""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset

from conftest import QUIET, build_model, build_tokenizer, completions_of, flags, make_rows, on_cpus, weights
from test_fused import TERMS, Model, Pair, assert_same, draw, run, run_exactly
from tsdkd import EOPDConfig, EOPDTrainer, TSDKDConfig, TSDKDTrainer
from tsdkd.cli import main
from tsdkd.lm_head import triton_kernels
from tsdkd.lm_head.dense import DenseHead
from tsdkd.lm_head.fused import FusedHead
from tsdkd.lm_head.projection import Projection
from tsdkd.methods import METHODS
from tsdkd.methods.tsd_kd import TSDKDObjective
from tsdkd.rollout.base import SamplingConfig
from tsdkd.rollout.captured import CapturedStep
from tsdkd.rollout.hf import HuggingFaceSampler

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
REHEARSAL = bool(os.environ.get("TSDKD_GPU_REHEARSAL"))
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CUDA and not REHEARSAL, reason="no CUDA device")]
VOCABULARY, HIDDEN, TEACHER_HIDDEN, RESPONSES, LENGTH = 32768, 256, 320, 4, 96

ON_DEVICE = {"use_cpu": not CUDA, "bf16": True, "max_length": 64, "max_new_tokens": 12, "disable_tqdm": True}
ON_DEVICE |= {"report_to": "none", "logging_steps": 1, "save_strategy": "steps", "save_steps": 1, "resume": True}
ON_DEVICE |= {"max_steps": 2, "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0}
"""Two steps in bfloat16, each with a checkpoint."""


def again(folder: Path) -> torch.Tensor:
    """The final weights of a run of two steps, of which everything after the first is then removed."""
    final = weights(folder)
    shutil.rmtree(folder / "checkpoint-2")
    (folder / "model.safetensors").unlink()
    return final


def logged(folder: Path, step: int) -> dict[str, Any]:
    """What a step's line in the log says."""
    state = json.loads((folder / "checkpoint-2" / "trainer_state.json").read_text())
    (entry,) = (entry for entry in state["log_history"] if entry["step"] == step and "loss" in entry)
    return entry


# Launched, as accelerate does on this device -------------------------------------------------------------------------


@dataclass
class Launched:
    """What became of a run under a launcher: two steps, and the second one again from the checkpoint of the first.

    Attributes:
        folder: of the run. `error`: the end of what it printed, if it failed.
        first, resumed: final weights; None where it failed.
    """

    folder: Path
    error: str = ""
    first: torch.Tensor | None = None
    resumed: torch.Tensor | None = None


LAUNCHES = {
    "ddp": ("tsd-kd", "ddp", {"bf16": False}),
    "ddp, bf16": ("eopd", "ddp", {}),
    "zero1": ("eopd", "zero1", {}),
    "zero2": ("tsd-kd", "zero2", {"bf16": False}),
    "zero2, bf16": ("tsd-kd", "zero2", {}),
    "zero3": ("tsd-kd", "zero3", {"bf16": False}),
    "zero3, bf16": ("tsd-kd", "zero3", {}),
    "zero3, eopd": ("eopd", "zero3", {}),
}
"""Name -> method, launch configuration, changes. All train on given completions, which rounding can't change."""


def training(method: str, folder: Path, saved_model: Any, rows_file: str, **changes: Any) -> list[str]:
    """`tsdkd train` with a learning rate at which a step is much larger than bfloat16's rounding of the weights."""
    values = {
        "model_name_or_path": saved_model("llama", 0),
        "teacher_model_name_or_path": saved_model("qwen3", 1, rows=70, hidden=48),
        "dataset_name": rows_file,
        "method": method,
        "output_dir": folder,
        "per_device_train_batch_size": 4,
        "lmbda": 0.0,
        "optim": "sgd",
        "learning_rate": 0.3,
        "gradient_checkpointing": True,
        "log_term_gradients": 0,
        **({"rollout_batch_size": 4} if method == "eopd" else {}),
    }
    return ["train", *flags(**{**values, **ON_DEVICE, **changes})]


def launched(command: list[str], folder: Path, config: str) -> Launched:
    """Run `tsdkd command` twice in the processes of a launch configuration: one on a GPU."""
    several = ["--accelerate_config", config, "--num_processes", "1", "--main_process_port", "0"]
    found = Launched(folder)
    for attempt in ("first", "resumed"):
        process = subprocess.Popen(
            [sys.executable, "-m", "tsdkd", *command, *several],
            env=dict(os.environ) if CUDA else on_cpus(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            output, _ = process.communicate(timeout=70 if CUDA else 600)
        except subprocess.TimeoutExpired:
            for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                child.kill()
            output = "it hung\n" + process.communicate()[0]
        if process.returncode:
            found.error = f"{attempt}: {output[-4000:]}"
            return found
        setattr(found, attempt, weights(folder) if attempt == "resumed" else again(folder))
    return found


@pytest.fixture(scope="module", autouse=True)
def launches(request, saved_model, rows_file, tmp_path_factory):
    """Name -> a future of `Launched`. All start at once and before everything else: most of their time is imports."""
    wanted = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2))
    futures: dict[str, Future[Launched]] = {}
    for name, (method, config, changes) in LAUNCHES.items():
        if name in wanted and (config == "ddp" or find_spec("deepspeed")):
            folder = tmp_path_factory.mktemp("launched") / "run"
            command = training(method, folder, saved_model, rows_file, **changes)
            futures[name] = pool.submit(launched, command, folder, config)
    yield futures
    pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def unwrapped(saved_model, rows_file, tmp_path_factory):
    """`unwrapped(method, changes)` -> the folder of the run without a launcher."""

    def run(method: str, changes: dict[str, Any]) -> Path:
        folder = tmp_path_factory.mktemp("unwrapped") / "run"
        assert main(training(method, folder, saved_model, rows_file, **changes)) == 0
        return folder

    return run


# Every method --------------------------------------------------------------------------------------------------------

OWN: dict[str, dict[str, Any]] = {
    "minillm": {"num_iterations": 2},
    "distillm": {"on_policy_share": 0.9},
    **{name: {"rollout_batch_size": 8} for name in METHODS if "opd" in name},  # resumed in the middle of a rollout
}


@pytest.mark.parametrize("method", METHODS)
def test_two_steps_and_the_second_again(method, saved_model, rows_file, tmp_path):
    """By the student's own completions, where the method has them; the second step also from a checkpoint."""
    folder = tmp_path / "run"
    if method == "grpo":
        pytest.importorskip("math_verify")
        values = {**ON_DEVICE, "per_device_train_batch_size": 16, "num_generations": 4, "rollout_batch_size": 8}
        values["max_new_tokens"] = values.pop("max_length")  # long enough for an answer
        command = ["train", "--config", "demo.yaml", *flags(method=method, output_dir=folder, **values)]
        start = weights(str(resources.files("tsdkd").joinpath("demo/student")))
    else:
        values = {"per_device_train_batch_size": 4, "learning_rate": 0.01, **OWN.get(method, {})}
        values |= {"rollout_batch_size": 4} if method == "minillm" else {}
        command = [
            "train",
            *flags(method=method, output_dir=folder, dataset_name=rows_file),
            *flags(model_name_or_path=saved_model("llama", 0)),
            *flags(teacher_model_name_or_path=saved_model("qwen3", 1, rows=70, hidden=48)),
            *flags(**ON_DEVICE, **values),
        ]
        start = weights(saved_model("llama", 0))
    assert main(command) == 0
    first = again(folder)
    assert main(command) == 0
    moved = (first - start).norm()
    assert moved > 1e-3
    # a CPU repeats itself to the bit; a GPU adds in any order, and AdamW makes full steps of the smallest gradients
    assert (weights(folder) - first).norm() <= (0.05 if CUDA else 0.0) * moved


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_wrapped_student_takes_the_same_steps(name, launches, unwrapped, saved_model):
    if name not in launches:
        pytest.skip("DeepSpeed isn't installed")
    method, _, changes = LAUNCHES[name]
    folder = unwrapped(method, changes)
    found = launches[name].result()
    if found.error:
        pytest.fail(found.error, pytrace=False)
    start, expected = weights(saved_model("llama", 0)), weights(folder)
    moved = (expected - start).norm()
    # DeepSpeed's weights are rounded, autocast rounds what it multiplies; rounded logits can choose other candidates
    allowed = {"tsd-kd": 0.25, "eopd": 0.15}[method] if changes.get("bf16", True) else 1e-3
    assert (found.first - expected).norm() <= allowed * moved
    assert (found.resumed - found.first).norm() <= 0.01 * moved
    theirs, ours = logged(found.folder, 1), logged(folder, 1)
    assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=0.03)
    if method == "eopd":  # the first step after a rollout: the student still is the policy that sampled
        assert abs(theirs["policy/approx_kl"]) < 1e-8 and abs(ours["policy/approx_kl"]) < 1e-8


# The head ------------------------------------------------------------------------------------------------------------


def inputs(dtype: torch.dtype, tokens: int = RESPONSES * LENGTH) -> list[torch.Tensor]:
    """Hidden states and heads of student and teacher, float32 numbers that `dtype` holds exactly."""
    make = torch.Generator(DEVICE).manual_seed(0)
    shapes = [(tokens, HIDDEN), (VOCABULARY, HIDDEN), (tokens, TEACHER_HIDDEN), (VOCABULARY, TEACHER_HIDDEN)]
    made = [torch.randn(shape, generator=make, device=DEVICE) for shape in shapes]
    made[1] *= 2 * HIDDEN**-0.5
    made[3] *= 2 * TEACHER_HIDDEN**-0.5
    return [x.to(dtype) for x in made]


def loss_and_gradients(
    tensors: list[torch.Tensor], fused: bool, alpha: float = 0.1, **options: Any
) -> list[torch.Tensor]:
    hidden, weight = (x.clone().requires_grad_() for x in tensors[:2])
    if fused:
        head = FusedHead(hidden, Projection(weight), tensors[2], Projection(tensors[3]), **options)
    else:
        head = DenseHead(hidden @ weight.t(), tensors[2] @ tensors[3].t())
    mask = torch.ones(len(hidden) // LENGTH, LENGTH, dtype=torch.bool, device=DEVICE)
    loss = TSDKDObjective(alpha=alpha)(head, completions_of(mask)).loss
    loss.backward()
    return [x.detach().double() for x in (loss, hidden.grad, weight.grad)]


def errors(found: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


only_compiled = pytest.mark.skipif(not CUDA, reason="takes minutes in Triton's interpreter")


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=only_compiled)])
@pytest.mark.parametrize("chunk_gib", [None, 0.01])
@pytest.mark.parametrize("dtype, alpha", [(torch.float32, 0.1), (torch.bfloat16, 0.1), (torch.bfloat16, 0.0)], ids=str)
def test_the_head_is_as_exact_as_whole_logits(dtype, alpha, chunk_gib, backend):
    tensors = inputs(dtype)
    exact = loss_and_gradients([x.double() for x in tensors], fused=False, alpha=alpha)
    fused = errors(loss_and_gradients(tensors, fused=True, alpha=alpha, chunk_gib=chunk_gib, backend=backend), exact)
    if dtype == torch.float32:
        assert fused[0] <= 1e-6
        assert max(fused[1:]) <= 1e-5
    else:
        whole = errors(loss_and_gradients(tensors, fused=False, alpha=alpha), exact)
        # rounded logits are often equal, and which of them are the candidates is left to each implementation
        factor, rest = (1.5, 1e-3) if alpha else (1.1, 1e-4)
        assert all(ours <= factor * theirs + rest for ours, theirs in zip(fused, whole, strict=True)), (fused, whole)


def on_device(model: Model) -> Model:
    return replace(model, **{name: x.detach().to(DEVICE).requires_grad_() for name, x in model.leaves.items()})


@pytest.mark.parametrize("name", TERMS)
def test_kernels_compute_every_statistic(name, monkeypatch):
    """With a soft cap, a scale, a temperature, and columns that don't fill the last block."""
    if not CUDA:
        monkeypatch.setattr(triton_kernels, "ROWS", 32)  # faster in Triton's interpreter
    pair: Pair = draw(40, 5003, padding=(5, 0), temperature=0.7)
    pair = replace(pair, student=on_device(pair.student), teacher=on_device(pair.teacher))
    assert_same(run(pair, name, fused=True, backend="triton"), run_exactly(pair, name), values=1e-5, gradients=1e-4)


@pytest.mark.skipif(not CUDA, reason="the memory of a GPU")
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
    mask = torch.ones(len(hidden) // LENGTH, LENGTH, dtype=torch.bool, device=DEVICE)
    TSDKDObjective()(head, completions_of(mask)).loss.backward()
    extra = torch.cuda.max_memory_allocated() - before
    leaves = (hidden.numel() + weight.numel()) * (2 + 4 + 2)
    assert extra <= (chunk_gib + 0.25) * 2**30 + leaves


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_rollout_samples_the_same_tokens(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a CUDA graph, in a rehearsal a trace: few calls of the model from Python, and weights that change."""
    model = build_model("qwen3", seed=3).to(DEVICE, dtype)
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    sampler = HuggingFaceSampler(Accelerator(cpu=not CUDA), SamplingConfig(frozenset({7}), 64))
    prompts, limits = [[4 + i] * (1 + 3 * i) for i in range(6)], [90, 20, 90, 33, 7, 61]

    def roll_out(step: int) -> list[list[int]]:
        completions = sampler.generate(model, prompts, limits, [(0, step, i) for i in range(len(prompts))])
        return [completion.ids for completion in completions]

    def roll_out_thrice() -> list[list[list[int]]]:
        found = []
        for step, state in enumerate(states):
            model.load_state_dict(state)
            found.append(roll_out(step))
        return found

    states = [{name: w.clone() * (1.0 + 0.1 * k) for name, w in model.state_dict().items()} for k in range(3)]
    captured = roll_out_thrice()
    assert len(calls) < sum(max(map(len, ids)) for ids in captured) / 2
    monkeypatch.setattr(CapturedStep, "__call__", lambda self, *inputs: self.step(*inputs)[0])
    assert captured == roll_out_thrice()


@pytest.mark.parametrize("trainer_class, config_class", [(TSDKDTrainer, TSDKDConfig), (EOPDTrainer, EOPDConfig)])
def test_a_step_in_bfloat16_with_gradient_checkpointing(trainer_class, config_class, tmp_path):
    steps = []
    for fused in (True, False):
        values = {**QUIET, "use_cpu": not CUDA, "bf16": True, "gradient_checkpointing": True, "fused_head": fused}
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
