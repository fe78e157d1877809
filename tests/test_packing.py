"""Packed micro-batches take the steps of padded ones, and are refused where a model doesn't keep sequences apart."""

import copy
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoConfig,
    LlamaForCausalLM,
    MambaConfig,
    PretrainedConfig,
)

from conftest import QUIET, WORDS, build_model, build_tokenizer, flags, weights, write_jsonl
from crash import run_ranks
from tsdkd.cli import main
from tsdkd.data import Rows, divide, num_positions, one_per_row, pack_rows, pack_sequences, split_to_count
from tsdkd.errors import ConfigError, ModelError
from tsdkd.methods import METHODS

STEP = {**QUIET, "max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4, "max_length": 100}
STEP |= {"gradient_accumulation_steps": 2, "optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
STEP |= {"learning_rate": 0.1, "max_new_tokens": 60, "train_sampling_strategy": "sequential", "log_term_gradients": 0}
OWN: dict[str, dict[str, Any]] = {
    "minillm": {"rollout_batch_size": 8, "num_iterations": 2},
    "distillm": {"on_policy_share": 0.0},
    **{name: {"rollout_batch_size": 16} for name in METHODS if "opd" in name},
}
PACKING = [name for name in METHODS if name not in ("grpo", "tsd-kd-released")]


def uneven_rows(count: int = 16, seed: int = 0) -> Dataset:
    """Prompts and completions whose lengths differ by a factor of ten; some completions are a stop token alone."""
    rng = random.Random(seed)
    lengths = [(rng.randint(2, 30), rng.choice([0, 3, 6, 30, 60])) for _ in range(count)]
    texts = [tuple(" ".join(rng.choices(WORDS, k=n)) for n in pair) for pair in lengths]
    return Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in texts])


def make_trainer(method: str, folder: Path, models: Any = None, data: Dataset | None = None, **values: Any) -> Any:
    """A trainer in float64, so that a difference is one of the mathematics."""
    config = METHODS[method].config_class
    values = {**STEP, **OWN.get(method, {}), **({"lmbda": 0.0} if config.has_lmbda else {}), **values}
    student, teacher = models or (build_model("qwen3", 0), build_model("llama", 1, rows=70, hidden=48))
    return METHODS[method](
        model=student.double(),
        teacher_model=teacher.double(),
        args=config(output_dir=str(folder), **values),
        train_dataset=data or uneven_rows(),
        processing_class=build_tokenizer(),
        teacher_processing_class=build_tokenizer(),
    )


def parameters(model: Any) -> Tensor:
    return torch.cat([p.detach().flatten().double() for p in model.parameters()])


def train(method: str, folder: Path, **values: Any) -> tuple[Tensor, list[dict[str, float]]]:
    """The update, and the log lines of the steps."""
    trainer = make_trainer(method, folder, **values)
    before = parameters(trainer.model)
    trainer.train()
    return parameters(trainer.model) - before, [entry for entry in trainer.state.log_history if "loss" in entry]


def assert_same(found: tuple[Tensor, list[dict[str, float]]], expected: tuple[Tensor, list[dict[str, float]]]) -> None:
    assert expected[0].norm() > 1e-4
    assert (found[0] - expected[0]).norm() <= 1e-6 * expected[0].norm()
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            if name.startswith(("loss", "opener", "entropy", "policy")):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-9), name


# Layouts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7, 64])
@pytest.mark.parametrize("longest", [1, 20, 200])
def test_rows_hold_each_sequence_once_and_stay_narrow(count: int, longest: int) -> None:
    rng = random.Random(count)
    lengths = [rng.randint(max(1, longest // 10), longest) for _ in range(count)]
    rows = pack_rows(lengths)
    assert sorted(i for row in rows for i in row) == list(range(count))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 1.5 * max(lengths)
    assert num_positions(rows, lengths) <= count * max(lengths)
    limited = pack_rows(lengths, max_width=max(lengths))
    assert max(sum(lengths[i] for i in row) for row in limited) == max(lengths)


def test_a_large_batch_has_less_than_3_percent_padding() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(20, 200) for _ in range(64)]
    assert sum(lengths) >= 0.97 * num_positions(pack_rows(lengths), lengths)


def test_equal_lengths_are_not_packed() -> None:
    assert pack_rows([7] * 5) == [[0], [1], [2], [3], [4]]


def test_rows_are_not_packed_where_attention_costs_more_than_padding() -> None:
    lengths = [4096, 2000]
    assert pack_rows(lengths, linear_cost=6 * 512.0) == [[0], [1]]
    assert pack_rows(lengths, linear_cost=6 * 8192.0) == [[0, 1]]


def test_the_inputs_of_a_layout() -> None:
    """Positions restart with each sequence; flash attention gets their bounds, padding included."""
    packed = pack_sequences([[5, 6, 7], [8], [9, 10]], [[0, 1], [2]])
    assert packed["input_ids"].tolist() == [[5, 6, 7, 8], [9, 10, 0, 0]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 0], [0, 1, 0, 1]]
    assert packed["starts"].tolist() == [0, 3, 4]
    assert packed["cu_seq_lens"].tolist() == [0, 3, 4, 6, 8]
    assert packed["cu_seq_lens"].dtype == torch.int32
    assert packed["max_length"] == 3


def no_packing(lengths: Sequence[int], max_width: int | None = None) -> Rows:
    return one_per_row(range(len(lengths)))


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("lay_out", [pack_rows, no_packing])
@pytest.mark.parametrize("budget", [1, 150, 400, 10_000])
def test_micro_batches_stay_within_the_budget(budget: int, lay_out: Any, in_order: bool) -> None:
    rng = random.Random(budget)
    lengths = [rng.randint(20, 200) for _ in range(23)]
    parts = divide(lengths, budget, partial(lay_out, max_width=budget), in_order)
    for count in (len(parts), min(len(parts) + 3, 23), 23):
        parts = split_to_count(parts, lengths, count)
        order = [sorted(i for row in rows for i in row) for rows in parts]
        assert sorted(i for part in order for i in part) == list(range(23))
        too_large = [part for part, rows in zip(order, parts, strict=True) if num_positions(rows, lengths) > budget]
        assert all(len(part) == 1 for part in too_large)
        assert not in_order or [i for part in order for i in part] == list(range(23))
        assert len(parts) == count


def test_cut_by_length_leaves_little_padding_even_without_packing() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(20, 200) for _ in range(64)]

    def share(in_order: bool) -> float:
        parts = divide(lengths, 1600, no_packing, in_order)
        return 1 - sum(lengths) / sum(num_positions(rows, lengths) for rows in parts)

    assert share(in_order=False) < 0.15 < 0.3 < share(in_order=True)


# Steps ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "dense"])
@pytest.mark.parametrize("method", PACKING)
def test_steps_are_those_of_padded_micro_batches(method: str, fused: bool, tmp_path: Path) -> None:
    padded = train(method, tmp_path, padding_free=False, fused_head=fused)
    packed = train(method, tmp_path, padding_free=True, fused_head=fused, max_tokens_per_micro_batch=250)
    assert_same(packed, padded)
    share = 1.0 if method in ("minillm", "speculative-kd") or "opd" in method else 0.5  # sampled: of similar lengths
    assert packed[1][0]["padding"] < share * padded[1][0]["padding"]


@pytest.mark.parametrize("budget", [None, 1, 77, 300, 10_000])
@pytest.mark.parametrize(
    ("method", "options"),
    [("tsd-kd", {}), ("tsd-kd", {"adaptive_opener": True}), ("eopd", {}), ("minillm", {}), ("distillm", {})],
    ids=str,
)
def test_any_budget_gives_the_same_steps(method: str, options: dict[str, Any], budget: int, tmp_path: Path) -> None:
    """Also where the order of the completions matters, and with a rollout for several steps."""
    padded = train(method, tmp_path, padding_free=False, **options)
    packed = train(method, tmp_path, max_tokens_per_micro_batch=budget, **options)
    assert_same(packed, padded)


@pytest.mark.parametrize("count", [1, 9])
def test_an_incomplete_window(count: int, tmp_path: Path) -> None:
    """One row alone; and an epoch whose last step has a single batch."""
    options = {"data": uneven_rows(count), "max_steps": 4}
    padded = train("tsd-kd", tmp_path, padding_free=False, **options)
    assert_same(train("tsd-kd", tmp_path, max_tokens_per_micro_batch=100, **options), padded)


def test_a_window_that_a_later_iteration_repeats_in_part(tmp_path: Path) -> None:
    """MiniLLM's second pass over two windows has rows for one and a half."""
    options = {"data": uneven_rows(28), "rollout_batch_size": 16, "max_steps": 4, "per_device_train_batch_size": 4}
    padded = train("minillm", tmp_path, padding_free=False, **options)
    assert_same(train("minillm", tmp_path, **options), padded)


def test_the_budget_is_kept(tmp_path: Path) -> None:
    sizes = []
    trainer = make_trainer("tsd-kd", tmp_path, max_tokens_per_micro_batch=200)
    trainer.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    trainer.train()
    assert max(rows * width for rows, width in sizes) <= 200
    assert len(sizes) > 4


@pytest.mark.parametrize(("family", "attention"), [("gemma2", "eager"), ("llama", "eager"), ("qwen2", "sdpa")])
def test_families_and_attention(family: str, attention: str, tmp_path: Path) -> None:
    """Gemma 2 has layers with a sliding window."""

    def run(padding_free: bool) -> Any:
        models = (build_model(family, 0), build_model(family, 1))
        for model in models:
            model.set_attn_implementation(attention)
        return train("tsd-kd", tmp_path, models=models, padding_free=padding_free)

    assert_same(run(True), run(False))


def attend_within_segments(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
    """What flash attention computes from the bounds of sequences; `[B, heads, S, D]` -> `[B, S, heads, D]`."""
    assert mask is None
    groups = module.num_key_value_groups
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    shape = query.shape
    bounds = options["cu_seq_lens_q"].tolist() if "cu_seq_lens_q" in options else None
    if bounds is None:
        bounds = list(range(0, shape[0] * shape[2] + 1, shape[2]))
    else:
        assert options["cu_seq_lens_q"] is options["cu_seq_lens_k"]
        assert options["max_length_q"] == options["max_length_k"] == max(b - a for a, b in pairwise(bounds))
        SEGMENTS.append((shape[0], shape[2], bounds[-1]))
    flat = [states.transpose(1, 2).flatten(0, 1) for states in (query, key, value)]
    parts = [
        nn.functional.scaled_dot_product_attention(*(x[a:b].transpose(0, 1) for x in flat), is_causal=True)
        for a, b in pairwise(bounds)
    ]
    joined = torch.cat([part.transpose(0, 1) for part in parts])
    return joined.view(shape[0], shape[2], shape[1], shape[3]), None


SEGMENTS: list[tuple[int, int, int]] = []


def test_flash_attention_gets_one_row_and_the_bounds_of_its_sequences(tmp_path: Path) -> None:
    AttentionInterface.register("flash_on_cpu", attend_within_segments)
    AttentionMaskInterface.register("flash_on_cpu", lambda *args, **kwargs: None)
    SEGMENTS.clear()

    def run(attention: str, **values: Any) -> Any:
        models = (build_model("llama", 0), build_model("qwen3", 1))
        for model in models:
            model.config._attn_implementation = attention
        return train("tsd-kd", tmp_path, models=models, **values)

    packed = run("flash_on_cpu", max_tokens_per_micro_batch=200)
    assert_same(packed, run("sdpa", padding_free=False))
    assert packed[1][0]["padding"] == 0
    assert all(rows == 1 and width == end <= 200 for rows, width, end in SEGMENTS)
    assert len(set(SEGMENTS)) > 2


def test_gradient_checkpointing(tmp_path: Path) -> None:
    options = {"gradient_checkpointing": True}
    assert_same(*(train("tsd-kd", tmp_path, padding_free=p, **options) for p in (True, False)))


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "dense"])
@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_in_bfloat16_is_not_taken_for_a_leak(weights_dtype: Any, fused: bool, tmp_path: Path) -> None:
    """Under autocast, the hidden states of float32 weights are float32, but as exact as bfloat16."""
    config = build_model("qwen3", 0).config
    config.num_hidden_layers, config.layer_types = 24, ["full_attention"] * 24
    models = [AutoModelForCausalLM.from_config(config, dtype=weights_dtype) for _ in range(2)]
    args = METHODS["gkd"].config_class(
        str(tmp_path), **{**STEP, "lmbda": 0.0, "bf16": True, "padding_free": True, "fused_head": fused}
    )
    trainer = METHODS["gkd"](*models, args, train_dataset=uneven_rows(), processing_class=build_tokenizer())
    trainer.train()
    assert trainer.state.log_history[0]["padding"] < 0.15


def test_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def run(padding_free: bool) -> Any:
        adapters = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        torch.manual_seed(0)
        student = peft.get_peft_model(build_model("qwen3", 0), adapters)
        models = (student, build_model("llama", 1, rows=70, hidden=48))
        return train("tsd-kd", tmp_path, models=models, padding_free=padding_free)

    assert_same(run(True), run(False))


def test_evaluation(tmp_path: Path) -> None:
    found = []
    for padding_free in (True, False):
        trainer = make_trainer("tsd-kd", tmp_path, padding_free=padding_free)
        found.append(trainer.evaluate(uneven_rows(8, seed=1)))
    for name in ("eval_loss", "eval_loss/direct", "eval_loss/indirect", "eval_opener/length"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-6)


# Models that don't keep sequences apart ------------------------------------------------------------------------------


class IgnoresPositions(LlamaForCausalLM):
    """A backbone that drops what it doesn't know, as some remote code does."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        forward = self.model.forward
        self.model.forward = lambda input_ids, position_ids=None, **others: forward(input_ids, **others)


class HasNoPositions(LlamaForCausalLM):
    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.model.register_forward_pre_hook(self._refuse, with_kwargs=True)

    @staticmethod
    def _refuse(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("position_ids") is not None:
            raise TypeError("forward() got an unexpected keyword argument 'position_ids'")


class Caches(LlamaForCausalLM):
    """With a cache, transformers doesn't look at positions to separate sequences."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        forward = self.model.forward
        self.model.forward = lambda input_ids, use_cache, **others: forward(input_ids, use_cache=True, **others)


def mamba() -> Any:
    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8, initializer_range=0.2)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


LEAKY = {
    "ignored positions": lambda: IgnoresPositions(build_model("llama", 0).config),
    "no positions": lambda: HasNoPositions(build_model("llama", 0).config),
    "a cache": lambda: Caches(build_model("llama", 0).config),
    "recurrent": mamba,
}


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("kind", LEAKY)
def test_a_model_that_mixes_sequences_falls_back(kind: str, role: str, tmp_path: Path, caplog: Any) -> None:
    def models() -> tuple[Any, Any]:
        torch.manual_seed(0)
        leaky, good = LEAKY[kind](), build_model("qwen3", 0)
        return (leaky, good) if role == "student" else (good, leaky)

    name = type(models()[role == "teacher"]).__name__
    padded = train("gkd", tmp_path, models=models(), padding_free=False)
    fallback = train("gkd", tmp_path, models=models())
    assert_same(fallback, padded)
    assert len([record for record in caplog.records if name in record.getMessage()]) == 1
    with pytest.raises(ModelError, match=rf"padding_free.*{name}"):
        train("gkd", tmp_path, models=models(), padding_free=True)


def test_learned_absolute_positions_are_packed(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=128, initializer_range=0.2)

    def run(padding_free: bool) -> Any:
        torch.manual_seed(0)
        return train(
            "gkd",
            tmp_path,
            models=(AutoModelForCausalLM.from_config(config), build_model("qwen3", 1)),
            padding_free=padding_free,
            disable_dropout=True,
        )

    assert_same(run(True), run(False))


@pytest.mark.parametrize("family, scale", [("minimax", 1.0), ("xglm", 2.0)])
def test_bfloat16_hides_no_leak(family: str, scale: float, tmp_path: Path, caplog: Any) -> None:
    """Linear attention, and positions that don't restart. Such models leak less than 12 %, which rounding may be."""
    size: dict[str, Any] = {"vocab_size": 64, "max_position_embeddings": 256}
    if family == "minimax":
        size |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
        size |= {"num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
    else:
        size |= {"d_model": 64, "ffn_dim": 128, "num_layers": 4, "attention_heads": 4}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](eos_token_id=1, **size), dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.mul_(scale if parameter.ndim > 1 else 1.0)
    trainer = make_trainer("supervised-kd", tmp_path, models=(model, build_model("qwen3", 1)), bf16=True, max_steps=1)
    trainer.model.float()
    trainer.train()
    assert type(model).__name__ in caplog.text and "packing isn't possible" in caplog.text


def test_rows_are_not_wider_than_the_context(tmp_path: Path) -> None:
    """GPT-Neo has a mask of that size."""
    size = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64, "window_size": 16}
    layers = {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 100}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPTNeoConfig(vocab_size=64, eos_token_id=1, **size, **layers))
    models = [(copy.deepcopy(model), build_model("qwen3", 1)) for _ in range(2)]
    options = {"data": uneven_rows(64), "gradient_accumulation_steps": 4, "disable_dropout": True}
    packed = train("supervised-kd", tmp_path, models=models[0], padding_free=True, **options)
    assert_same(packed, train("supervised-kd", tmp_path, models=models[1], padding_free=False, **options))


@pytest.mark.parametrize("change", ["ids", "mask"])
def test_a_trainer_that_changes_packed_inputs_is_refused(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ChangesInputs(METHODS["supervised-kd"]):
        def _postprocess_micro_batch(self, model: Any, batch: Any, step: int, mode: str) -> None:
            if change == "ids":
                batch["input_ids"] = batch["input_ids"].clone()
            else:
                batch["attention_mask"] = torch.ones_like(batch["input_ids"])

    monkeypatch.setitem(METHODS, "supervised-kd", ChangesInputs)
    with pytest.raises(ModelError, match=r"ChangesInputs changes input_ids.*micro_batching = \"fixed\""):
        train("supervised-kd", tmp_path)


@pytest.mark.parametrize("field, value", [("padding_free", True), ("max_tokens_per_micro_batch", 100)])
def test_noise_that_depends_on_the_width_keeps_the_micro_batches(field: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{field}: the noise of neftune_noise_alpha"):
        make_trainer("supervised-kd", tmp_path, neftune_noise_alpha=5.0, **{field: value})
    assert make_trainer("supervised-kd", tmp_path, neftune_noise_alpha=5.0).planner.is_fixed


def test_a_failed_constructor_leaves_the_arguments(tmp_path: Path) -> None:
    args = METHODS["gkd"].config_class(output_dir=str(tmp_path), **{**STEP, "padding_free": True})
    with pytest.raises((TypeError, ValueError, AttributeError)):
        METHODS["gkd"](
            model=build_model("qwen3", 0),
            teacher_model=build_model("qwen3", 1),
            args=args,
            train_dataset=uneven_rows(),
            processing_class=build_tokenizer(),
            peft_config="not a configuration",
        )
    assert args.padding_free is True


@pytest.mark.parametrize("option", [{"padding_free": True}, {"max_tokens_per_micro_batch": 100}], ids=str)
@pytest.mark.parametrize("method", ["grpo", "tsd-kd-released"])
def test_methods_without_packing_refuse_it(method: str, option: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=next(iter(option))):
        METHODS[method].config_class(output_dir=str(tmp_path), use_cpu=True, **option)


def test_an_objective_that_needs_fixed_micro_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a method of one's own may."""

    @dataclass
    class FixedObjective(METHODS["gkd"].objective_class):
        micro_batching = "fixed"

    padded = train("gkd", tmp_path, padding_free=False)
    monkeypatch.setitem(METHODS, "gkd", type("Fixed", (METHODS["gkd"],), {"objective_class": FixedObjective}))
    assert torch.equal(train("gkd", tmp_path)[0], padded[0])
    with pytest.raises(ConfigError, match="padding_free"):
        train("gkd", tmp_path, padding_free=True)


def test_a_budget_without_packing_is_refused(tmp_path: Path) -> None:
    values = {"padding_free": False, "max_tokens_per_micro_batch": 100}
    with pytest.raises(ConfigError, match="max_tokens_per_micro_batch"):
        METHODS["gkd"].config_class(output_dir=str(tmp_path), use_cpu=True, **values)


# Several processes, and runs that are resumed ------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["tsd-kd", "eopd"])
def test_two_processes(method: str, saved_model: Any, tmp_path: Path) -> None:
    """They need different numbers of micro-batches, but run the same."""
    rows = write_jsonl(tmp_path / "rows.jsonl", list(uneven_rows(32)))
    values = {"model_name_or_path": saved_model("llama", 0), "teacher_model_name_or_path": saved_model("qwen3", 1)}
    values |= {**STEP, **OWN.get(method, {}), "dataset_name": rows, "method": method, "max_steps": 4}
    values |= {"lmbda": 0} if method == "tsd-kd" else {}
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["train", *flags(**values, padding_free=False, output_dir=one)]) == 0
    values |= {"per_device_train_batch_size": 2, "max_tokens_per_micro_batch": 100}
    children = run_ranks(["train", *flags(**values, output_dir=two)], two)
    assert [child.wait() for child in children] == [0, 0], children[0].output[-2000:]
    start = weights(saved_model("llama", 0))
    assert (weights(one) - weights(two)).norm() <= 1e-5 * (weights(one) - start).norm()


def test_two_processes_with_different_numbers_of_rows(saved_model: Any, tmp_path: Path) -> None:
    """Their micro-batches stay as they are."""
    rows = write_jsonl(tmp_path / "rows.jsonl", list(uneven_rows(11)))
    values = {"model_name_or_path": saved_model("llama", 0), "teacher_model_name_or_path": saved_model("qwen3", 1)}
    values |= {**STEP, "dataset_name": rows, "method": "gkd", "lmbda": 0, "gradient_accumulation_steps": 1}
    values |= {"accelerator_config": '{"even_batches": false}', "output_dir": tmp_path / "run"}
    children = run_ranks(["train", *flags(**values)], tmp_path / "run")
    assert [child.wait() for child in children] == [0, 0], children[0].output[-2000:]


def test_two_processes_with_a_fixed_order(saved_model: Any, tmp_path: Path) -> None:
    """They keep their sequences, whose numbers of tokens differ, but run the same number of micro-batches."""
    rows = write_jsonl(tmp_path / "rows.jsonl", list(uneven_rows(32)))
    values = {"model_name_or_path": saved_model("llama", 0), "teacher_model_name_or_path": saved_model("qwen3", 1)}
    values |= {**STEP, "dataset_name": rows, "method": "tsd-kd", "max_steps": 4, "lmbda": 0, "adaptive_opener": True}
    found = []
    for options in ({"padding_free": False}, {"max_tokens_per_micro_batch": 100}):
        folder = tmp_path / f"out{len(found)}"
        children = run_ranks(["train", *flags(**values, **options, output_dir=folder)], folder)
        assert [child.wait() for child in children] == [0, 0], children[0].output[-2000:]
        found.append(weights(folder))
    start = weights(saved_model("llama", 0))
    assert (found[0] - found[1]).norm() <= 1e-5 * (found[0] - start).norm()


@pytest.mark.parametrize("method", ["tsd-kd", "eopd", "minillm"])
def test_resumes_bitwise(method: str, saved_model: Any, tmp_path: Path) -> None:
    """In the middle of an epoch; for EOPD and MiniLLM, of a rollout."""
    rows = write_jsonl(tmp_path / "rows.jsonl", list(uneven_rows(48)))
    values = {"model_name_or_path": saved_model("llama", 0), "teacher_model_name_or_path": saved_model("qwen3", 1)}
    values |= {**STEP, **OWN.get(method, {}), "dataset_name": rows, "method": method, "max_steps": 4}
    values |= {"save_strategy": "steps", "save_steps": 1, "resume": "true", "optim": "adamw_torch"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["train", *flags(**values, output_dir=whole)]) == 0
    shutil.copytree(whole, parts)
    for step in (2, 3, 4):
        shutil.rmtree(parts / f"checkpoint-{step}")
    (parts / "model.safetensors").unlink()
    assert main(["train", *flags(**values, output_dir=parts)]) == 0
    assert torch.equal(weights(whole), weights(parts))
