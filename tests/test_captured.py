"""Captured decoding steps: the same tokens as without a capture, whatever changes between and within rollouts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from conftest import build_model
from tsdkd.evaluation.problem_set import ProblemSet, evaluate
from tsdkd.methods.minillm import mixture_choice
from tsdkd.rollout import captured, decoding
from tsdkd.rollout.base import Completion, SamplingConfig
from tsdkd.rollout.hf import HuggingFaceSampler
from tsdkd.rollout.mixed import MixedSampler

ROWS, TOKENS = 64, 90  # more than a buffer's first capacity
PROMPTS = [[4 + i] * (1 + 3 * i) for i in range(6)]
LIMITS = [TOKENS, 20, 90, 33, 7, 61]


def sampler(stop: frozenset[int] = frozenset({7})) -> HuggingFaceSampler:
    return HuggingFaceSampler(Accelerator(cpu=True), SamplingConfig(stop, ROWS))


def roll_out(sampler: HuggingFaceSampler, model: Any, step: int = 0) -> list[list[int]]:
    keys = [(0, step, i) for i in range(len(PROMPTS))]
    return [completion.ids for completion in sampler.generate(model, PROMPTS, LIMITS, keys)]


@contextmanager
def without_buffers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every token by transformers' own caches."""
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "supports_in_place", lambda *_: False)
        yield


def count_forwards(model: nn.Module) -> list[int]:
    """A list that gets an entry for each call of the model's forward in Python."""
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2"])
def test_buffers_and_captures_give_the_tokens_of_transformers_own_caches(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ours = build_model(family, seed=21), sampler()
    got = [roll_out(ours, model, step) for step in range(2)]
    with without_buffers(monkeypatch):
        assert got == [roll_out(sampler(), model, step) for step in range(2)]
    assert {len(ids) for ids in got[0]} != {len(ids) for ids in got[1]}


@pytest.mark.parametrize("window", [4096, 64])
def test_only_a_sliding_window_that_never_slides_is_captured(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(30)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = MistralForCausalLM(
        MistralConfig(vocab_size=ROWS, num_hidden_layers=2, sliding_window=window, initializer_range=0.5, **size)
    ).eval()
    calls = count_forwards(model)
    got = roll_out(sampler(), model)
    assert (len(calls) < max(map(len, got)) / 2) == (window == 4096)
    with without_buffers(monkeypatch):
        assert got == roll_out(sampler(), model)


def test_an_embedding_with_a_pad_token_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch checks a padding_idx above 0 against the embedding's size."""
    model = build_model("llama", seed=24)
    model.get_input_embeddings().padding_idx = 2
    calls = count_forwards(model)
    got = roll_out(sampler(), model)
    assert len(calls) < max(map(len, got)) / 2
    with without_buffers(monkeypatch):
        assert got == roll_out(sampler(), model)


def test_a_capture_gives_the_tokens_of_its_step_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("qwen3", seed=21).to(torch.bfloat16)
    calls = count_forwards(model)
    got = roll_out(sampler(), model)
    assert len(calls) < max(map(len, got)) / 2
    monkeypatch.setattr(captured.CapturedStep, "__call__", lambda self, *inputs: self.step(*inputs)[0])
    assert got == roll_out(sampler(), model)


def test_python_runs_the_model_only_for_the_prompt_and_to_verify() -> None:
    model = build_model("qwen3", seed=22)
    calls, ours = count_forwards(model), sampler(frozenset())
    roll_out(ours, model)
    # the prompt, the trace, and once for each size of the batch and of the buffers
    assert len(calls) <= 2 + 9
    calls.clear()
    roll_out(ours, model, step=1)  # the same sizes
    assert len(calls) == 2


@pytest.mark.parametrize("change", ["in place", "data"])
def test_the_next_rollout_has_the_new_weights(change: str) -> None:
    model, ours = build_model("qwen3", seed=23), sampler()
    before = roll_out(ours, model)
    with torch.no_grad():
        for parameter in model.parameters():
            if change == "in place":
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
            else:
                parameter.data = parameter.data * 1.5
    after = roll_out(ours, model)
    assert after != before and after == roll_out(sampler(), model)


def test_adapters_that_are_merged_between_rollouts() -> None:
    peft = pytest.importorskip("peft")
    base = build_model("qwen3", seed=24)
    model = peft.get_peft_model(base, peft.LoraConfig(init_lora_weights=False, target_modules=["q_proj", "v_proj"]))
    ours = sampler()
    tuned = roll_out(ours, model)
    with model.disable_adapter():
        plain = roll_out(ours, model)
        assert plain == roll_out(sampler(), model) != tuned
    assert roll_out(ours, model) == tuned
    model.merge_adapter()
    assert roll_out(ours, model) == roll_out(sampler(), model)


def test_an_adapter_that_is_added_between_rollouts() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(init_lora_weights=False, target_modules=["q_proj"])
    model, ours = peft.get_peft_model(build_model("qwen3", seed=31), config), sampler()
    calls = count_forwards(model.get_base_model())
    before = roll_out(ours, model)
    model.add_adapter("other", config)
    model.set_adapter("other")
    calls.clear()
    after = roll_out(ours, model)
    assert len(calls) < max(map(len, after)) / 2 and after == roll_out(sampler(), model) != before


def test_all_batches_of_an_evaluation_share_two_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch never frees a trace."""
    traces: list[int] = []
    trace = torch.jit.trace
    monkeypatch.setattr(torch.jit, "trace", lambda *args, **kwargs: (traces.append(1), trace(*args, **kwargs))[1])
    limits = [24] * len(PROMPTS)
    problems = ProblemSet(PROMPTS, ["1"] * len(PROMPTS), limits, {7}, ROWS, str)
    evaluate(build_model("qwen3", seed=32), problems, num_samples=3, batch_size=2)
    assert len(traces) == 2


@pytest.mark.parametrize("family", ["falcon", "qwen3_next"])
def test_models_that_need_transformers_own_caches(family: str) -> None:
    """ALiBi reads a mask `[B, T]`; linear attention has a state instead of keys and values."""
    torch.manual_seed(33)
    size: dict[str, Any] = {"vocab_size": ROWS, "hidden_size": 32, "num_attention_heads": 4, "initializer_range": 0.2}
    if family == "falcon":
        size |= {"alibi": True, "new_decoder_architecture": False, "multi_query": False, "num_hidden_layers": 2}
    else:  # three layers of linear attention and one of full attention
        size |= {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48, "num_hidden_layers": 4}
        size |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = CONFIG_MAPPING[family](eos_token_id=1, **size)
    model = AutoModelForCausalLM.from_config(config).eval()
    together = roll_out(sampler(), model)
    alone = [
        sampler().generate(model, [prompt], [limit], [(0, 0, i)])[0].ids
        for i, (prompt, limit) in enumerate(zip(PROMPTS, LIMITS, strict=True))
    ]
    assert together == alone


def test_a_forward_that_reads_a_value_is_not_captured(caplog: pytest.LogCaptureFixture) -> None:
    """The trace would always add the first token's number."""

    def shift(module: nn.Module, args: Any, output: Any) -> None:
        if int(args[0].sum()) % 2:  # of the ids
            output.mul_(-1.0)

    def build() -> Any:
        model = build_model("qwen3", seed=25)
        model.get_input_embeddings().register_forward_hook(shift)
        return model

    model, ours = build(), sampler()
    calls = count_forwards(model)
    with caplog.at_level("INFO", logger="tsdkd"):
        got = roll_out(ours, model)
    assert "without a capture" in caplog.text and len(calls) >= max(map(len, got))
    with pytest.MonkeyPatch.context() as monkeypatch, without_buffers(monkeypatch):
        assert got == roll_out(sampler(), build())


def test_a_trace_that_computes_something_else_is_not_used() -> None:
    """A decision by Python that a trace can't show: it alternates between calls."""
    model = build_model("qwen3", seed=26)
    calls = [0]

    def alternate(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        calls[0] += 1
        return output * (1 + calls[0] % 2)

    model.get_input_embeddings().register_forward_hook(alternate)
    roll_out(sampler(), model)
    assert calls[0] >= TOKENS - 1


def test_a_mixture_of_two_models_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = build_model("qwen3", seed=27), build_model("qwen2", seed=28)

    def mixed() -> MixedSampler:
        config = SamplingConfig(frozenset({7}), ROWS)
        return MixedSampler(Accelerator(cpu=True), config, teacher, mixture_choice(0.3, 1.0))

    calls = count_forwards(teacher)
    got = roll_out(mixed(), student)
    assert len(calls) < max(map(len, got)) / 2
    with without_buffers(monkeypatch):
        assert got == roll_out(mixed(), student)


def test_few_tokens_are_not_worth_a_capture() -> None:
    model = build_model("qwen3", seed=29)
    calls = count_forwards(model)
    completions: list[Completion] = sampler(frozenset()).generate(
        model, PROMPTS, [8] * 6, [(0, 0, i) for i in range(6)]
    )
    assert len(calls) == 8 == len(completions[0].ids)
