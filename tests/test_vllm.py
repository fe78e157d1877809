"""Rollouts on a real vLLM engine: they are samples of the student's weights, or the run stops."""

import contextlib
import json
import os
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_CI_ENV", "1")  # no warm-up
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB an engine: all of this file share a process

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from conftest import DDP, QUIET, build_tokenizer, flags, launch, make_rows, zero_launcher
from tsdkd import DataError, EngineError, EOPDConfig, EOPDTrainer, TSDKDConfig, TSDKDTrainer
from tsdkd.cli import main
from tsdkd.data import load_split
from tsdkd.demo.run_demo import evaluate_saved
from tsdkd.run.presets import preset_paths

pytest.importorskip("vllm")
VLLMSampler = pytest.importorskip("tsdkd.rollout.vllm.sampler").VLLMSampler
pytestmark = pytest.mark.vllm

VLLM = {"use_vllm": True, "vllm_check_every": 1}
SIZE = {"hidden": 64, "head_dim": 32}  # vLLM's attention on a CPU takes no 16
STEPS = {**QUIET, "max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 6, "optim": "sgd"}
STEPS |= {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "learning_rate": 0.5, "max_length": 64}
FAMILIES = {"qwen2": "tied, padded", "llama": "untied", "gemma2": "tied, soft-capped", "qwen3": "untied"}


def make_trainer(folder: Path, saved_model: Any, family: str = "llama", method: str = "tsd-kd", **values: Any) -> Any:
    trainer, config = {"tsd-kd": (TSDKDTrainer, TSDKDConfig), "eopd": (EOPDTrainer, EOPDConfig)}[method]
    extra = {"rollout_batch_size": 12} if method == "eopd" else {}
    args = {**STEPS, **VLLM, **extra, "max_new_tokens": 12, "output_dir": str(folder), **values}
    kwargs = {"peft_config": args.pop("peft_config", None)}
    if family == "qwen2":  # transformers loads every qwen2 folder's tokenizer as byte-level BPE
        kwargs |= {"processing_class": build_tokenizer(), "teacher_processing_class": build_tokenizer()}
    return trainer(
        model=saved_model(family, 0, **SIZE),
        teacher_model=saved_model(family, 1, **SIZE),
        args=config(**args),
        train_dataset=Dataset.from_list(make_rows(24)),
        **kwargs,
    )


def exact_logps(model: Any, prompt: list[int], completion: list[int], rows: int = 64) -> torch.Tensor:
    """Log-probabilities of a completion, by one plain forward pass."""
    with torch.no_grad():
        logits = model.eval()(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1, :rows].float()
    return logits.log_softmax(-1).gather(-1, torch.tensor(completion).unsqueeze(-1)).squeeze(-1)


PROMPTS = [[5, 9, 13], [2, 20, 21, 22, 3], list(range(10, 30)), [44]]
LIMITS = [12, 8, 20, 30]
KEYS = [(0, 0, i) for i in range(4)]


def unpacked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Has a CPU engine keep its weights as they are and take them as on a GPU; the tensors of each call."""
    calls, sync = [], VLLMSampler._sync_colocate
    monkeypatch.setattr(
        "vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm",
        lambda layer, remove_weight: setattr(layer, "cpu_linear", torch.nn.functional.linear),
    )

    def sync_unpacked(self, packed):
        model = self.llm.llm_engine.model_executor.driver_worker.model_runner.model
        load = model.load_weights

        def load_weights(weights):
            weights = list(weights)
            calls.append([name for name, _ in weights])
            return load(iter(weights))

        with monkeypatch.context() as patched:
            patched.setattr(model, "load_weights", load_weights)
            sync(self, packed=False)

    monkeypatch.setattr(VLLMSampler, "_sync_colocate", sync_unpacked)
    return calls


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_a_gpu_engine_takes_all_weights_in_one_call(family, saved_model, tmp_path, monkeypatch):
    """Every sync is checked, and the learning rate is large enough for an old weight to show."""
    calls = unpacked(monkeypatch)
    trainer = make_trainer(tmp_path, saved_model, family)
    trainer.train()
    assert calls == 2 * [[name for name, _ in trainer.model.named_parameters()]]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_samples_from_the_students_weights(family, saved_model, tmp_path):
    trainer = make_trainer(tmp_path, saved_model, family)
    model, sampler = trainer.model, trainer.sampler

    def draw(order=(0, 1, 2, 3)):
        drawn = sampler.generate(model, *([values[i] for i in order] for values in (PROMPTS, LIMITS, KEYS)))
        for i, completion in zip(order, drawn, strict=True):
            exact = exact_logps(model, PROMPTS[i], completion.ids)
            assert (exact - torch.tensor(completion.logps)).abs().mean() < 0.05
            assert len(completion.ids) <= LIMITS[i] and not {1} & set(completion.ids[:-1])
            assert completion.stopped == (completion.ids[-1] == 1)
        return [completion.ids for completion in drawn]

    assert sampler.update("loaded") and not sampler.update("loaded")
    first = draw()
    assert draw() == first
    assert draw((2, 0, 3, 1)) == [first[i] for i in (2, 0, 3, 1)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.2)
    assert sampler.update("trained")
    assert draw() != first


def test_evaluation_is_that_of_transformers(tmp_path):
    """In float32 an engine's greedy responses are the model's; and the prompts are rendered alike."""
    student = shutil.copytree(resources.files("tsdkd") / "demo/student", tmp_path / "student")
    with (student / "chat_template.jinja").open("a") as file:
        file.write("{% if enable_thinking is defined and enable_thinking is false %}0,0{% endif %}{{ mood }}")
    (student / "tsdkd_config.yaml").write_text("chat_template_kwargs: {enable_thinking: false, mood: ' x+1'}")
    for backend, extra in (("hf", ""), ("vllm", ",max_model_len=128")):
        command = ["eval", str(student), "--suite", "demo", "--benchmarks", "demo_greedy", "--limit", "16"]
        command += ["--backend", backend, "--model_args", f"dtype=float32{extra}"]
        assert main([*command, "--output_dir", str(tmp_path / backend)]) == 0
    found = [tmp_path / backend / "student/demo_greedy.jsonl" for backend in ("hf", "vllm")]
    hf, vllm = ([json.loads(line)["responses"][0].strip() for line in path.read_text().splitlines()] for path in found)
    assert len(hf) == 16 and hf == vllm
    prompts = {path.with_name("demo_greedy.prompt.txt").read_text() for path in found}
    assert len(prompts) == 1 and prompts.pop().endswith("0,0 x+1")


@pytest.mark.parametrize("method", ["tsd-kd", "eopd"])
def test_training_logs_how_far_engine_and_student_are_apart(method, saved_model, tmp_path):
    trainer = make_trainer(tmp_path, saved_model, method=method, max_steps=4)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    differences = [entry.get("sampling/sampling_logp_difference/mean") for entry in logs]
    rolled_out = [0, 1, 2, 3] if method == "tsd-kd" else [0, 2]
    assert [i for i, value in enumerate(differences) if value is not None] == rolled_out
    assert all(0 < differences[i] < 0.05 for i in rolled_out)
    assert all(logs[i]["sampling/sampling_logp_difference/max"] >= differences[i] for i in rolled_out)
    assert all("speed/weight_sync_seconds" in logs[i] for i in rolled_out)
    if method == "eopd":  # the engine's are the policy that sampled: its ratio is nearly, but not exactly 1
        assert 0 < abs(logs[0]["policy/ratio"] - 1) < 0.05


def test_importance_weights_take_the_students_own_policy(saved_model, tmp_path):
    trainer = make_trainer(tmp_path, saved_model, method="eopd", vllm_importance_sampling_correction=True)
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert log["policy/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert 0 < log["sampling/sampling_logp_difference/mean"] < 0.05


@pytest.mark.parametrize("family, forgotten", [("llama", "lm_head.weight"), ("qwen2", "model.embed_tokens.weight")])
def test_a_sync_that_forgets_a_tensor_stops_the_run(family, forgotten, saved_model, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, saved_model, family, max_steps=8)
    everything = type(trainer.sampler)._iter_named_params
    monkeypatch.setattr(
        type(trainer.sampler),
        "_iter_named_params",
        lambda self: (pair for pair in everything(self) if pair[0] != forgotten),
    )
    with pytest.raises(EngineError, match="doesn't sample from the student's weights"):
        trainer.train()


def test_a_student_with_adapters(saved_model, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = make_trainer(tmp_path, saved_model, max_steps=4, peft_config=config, learning_rate=0.1)
    before = AutoModelForCausalLM.from_pretrained(saved_model("llama", 0, **SIZE), dtype=torch.float32)
    trainer.train()
    base = trainer.model.unload()
    after = dict(base.named_parameters())
    assert all(torch.equal(p, after[name]) for name, p in before.named_parameters())
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry["sampling/sampling_logp_difference/mean"] < 0.05 for entry in logs)


def test_the_demo_learns_as_with_the_students_own_rollouts(tmp_path):
    """With half of its steps; docs/demo.md has the accuracies. The student has about 30 before."""
    assert main(["demo", "--use_vllm", "true", "--max_steps", "150", "--output_dir", str(tmp_path / "run")]) == 0
    rows = list(load_split(str(resources.files("tsdkd").joinpath("demo/test.jsonl")), None, "train"))[:256]
    assert evaluate_saved(str(tmp_path / "run"), rows).metrics["avg@8"] > 50  # 64.5 on one machine


def test_too_small_a_share_of_memory_is_named(saved_model, tmp_path, monkeypatch):
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    with pytest.raises(EngineError, match=r"vLLM can't start \(vllm_gpu_memory_utilization is 0.001\)"):
        make_trainer(tmp_path, saved_model, vllm_gpu_memory_utilization=0.001)


def test_prompts_longer_than_the_engines_context_are_caught_before_training(saved_model, tmp_path):
    with pytest.raises(DataError, match="vllm_max_model_length"):
        make_trainer(tmp_path, saved_model, vllm_max_model_length=4)


@pytest.mark.parametrize("preset", [path.name for path in preset_paths() if "offpolicy" not in path.name])
def test_every_preset_of_the_papers_takes_vllm(preset, saved_model, rows_file, capsys):
    values = {"model_name_or_path": saved_model("qwen3", 0), "teacher_model_name_or_path": saved_model("qwen3", 1)}
    values |= {"dataset_name": rows_file, "dataset_train_split": "train", "use_cpu": "true", "bf16": "false"}
    values |= {
        "prompt_column": "prompt",
        "completion_column": "completion",
        "dataset_config": "null",
        "use_vllm": "true",
    }
    assert main(["train", "--config", preset, "--dry_run", *flags(**values, gradient_accumulation_steps=1)]) == 0
    assert "vLLM (colocate)" in capsys.readouterr().out


@pytest.mark.parametrize("sharing", ["two engines", "one engine for two", "ZeRO-3"])
def test_over_two_processes(sharing, saved_model, rows_file, tmp_path):
    """Every sync is checked on both, and the learning rate is large enough for an old weight to show."""
    values = {**VLLM, **STEPS, "max_steps": 3, "max_new_tokens": 12, "output_dir": tmp_path / "run"}
    values |= {"model_name_or_path": saved_model("llama", 0, **SIZE), "dataset_name": rows_file}
    values |= {"teacher_model_name_or_path": saved_model("llama", 1, **SIZE)}
    values["vllm_tensor_parallel_size"] = 2 if sharing == "one engine for two" else 1
    launcher = DDP
    if sharing == "ZeRO-3":
        pytest.importorskip("deepspeed")
        launcher = zero_launcher(3, tmp_path)
    before = unmapped()
    launch(launcher, ["train", *flags(**values)])
    log_history = json.loads((tmp_path / "run/trainer_state.json").read_text())["log_history"]
    assert sum("sampling/sampling_logp_difference/mean" in entry for entry in log_history) == 3
    assert unmapped() <= before  # or the next engine couldn't start


def unmapped() -> set[Path]:
    """Shared memory of no living process. Other tests run beside these: they soon map what they create, and leave the
    semaphores (of a few bytes) of processes that they kill.
    """
    looks = []
    for _ in range(5):
        files = [file for file in Path("/dev/shm").iterdir() if not file.name.startswith("sem.")]
        mapped = {line.split()[4] for maps in Path("/proc").glob("[0-9]*/maps") for line in lines_of(maps)}
        looks.append({file for file in files if file.exists() and str(file.stat().st_ino) not in mapped})
    return set.intersection(*looks)


def lines_of(file: Path) -> list[str]:
    """None of a process that has ended."""
    with contextlib.suppress(OSError):
        return file.read_text().splitlines()
    return []


def test_weights_are_copied_once_and_again_after_a_resume(saved_model, tmp_path, monkeypatch):
    synced, proven = [], []
    sync, check = VLLMSampler.sync_weights, "tsdkd.trainer.rollouts.check_engine_weights"
    monkeypatch.setattr(VLLMSampler, "sync_weights", lambda self: (synced.append(1), sync(self)))
    monkeypatch.setattr(check, lambda *args: proven.append(len(synced)))
    values = {"save_strategy": "steps", "save_steps": 2, "vllm_check_every": 3, "learning_rate": 0.01}
    run = make_trainer(tmp_path / "run", saved_model, max_steps=4, **values)
    run.train()
    assert (len(synced), proven) == (4, [1, 4])
    run._roll_out(run.model, [list(run.get_train_dataloader())[:1]], 4, "train")  # the weights of step 4
    run._roll_out(run.model, [list(run.get_train_dataloader())[:1]], 5, "train")
    assert len(synced) == 5
    synced.clear(), proven.clear()
    resumed = make_trainer(tmp_path / "run", saved_model, max_steps=4, **values)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert (len(synced), proven) == (2, [1])
    logs = [[e["loss"] for e in t.state.log_history if "loss" in e][-2:] for t in (run, resumed)]
    assert logs[0] == pytest.approx(logs[1], rel=1e-3)
