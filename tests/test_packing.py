"""Packed micro-batches take the steps of padded ones, and are refused where a model doesn't keep sequences apart."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaForCausalLM, MambaConfig, PretrainedConfig

from conftest import QUIET, WORDS, build_model, build_tokenizer
from tsdkd.data import num_positions, pack_rows, pack_sequences
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


def test_the_inputs_of_a_layout() -> None:
    """Positions restart with each sequence; flash attention gets their bounds, padding included."""
    packed = pack_sequences([[5, 6, 7], [8], [9, 10]], [[0, 1], [2]])
    assert packed["input_ids"].tolist() == [[5, 6, 7, 8], [9, 10, 0, 0]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 0], [0, 1, 0, 1]]
    assert packed["starts"].tolist() == [0, 3, 4]
    assert packed["cu_seq_lens"].tolist() == [0, 3, 4, 6, 8]
    assert packed["cu_seq_lens"].dtype == torch.int32
    assert packed["max_length"] == 3


# Steps ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "dense"])
@pytest.mark.parametrize("method", PACKING)
def test_steps_are_those_of_padded_micro_batches(method: str, fused: bool, tmp_path: Path) -> None:
    padded = train(method, tmp_path, padding_free=False, fused_head=fused)
    packed = train(method, tmp_path, padding_free=True, fused_head=fused)
    assert_same(packed, padded)
    share = 1.0 if method in ("minillm", "speculative-kd") or "opd" in method else 0.5  # sampled: of similar lengths
    assert packed[1][0]["padding"] < share * padded[1][0]["padding"]


@pytest.mark.parametrize(("family", "attention"), [("gemma2", "eager"), ("llama", "eager"), ("qwen2", "sdpa")])
def test_families_and_attention(family: str, attention: str, tmp_path: Path) -> None:
    """Gemma 2 has layers with a sliding window."""

    def run(padding_free: bool) -> Any:
        models = (build_model(family, 0), build_model(family, 1))
        for model in models:
            model.set_attn_implementation(attention)
        return train("tsd-kd", tmp_path, models=models, padding_free=padding_free)

    assert_same(run(True), run(False))


def test_gradient_checkpointing(tmp_path: Path) -> None:
    options = {"gradient_checkpointing": True}
    assert_same(*(train("tsd-kd", tmp_path, padding_free=p, **options) for p in (True, False)))


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


@pytest.mark.parametrize("method", ["grpo", "tsd-kd-released"])
def test_methods_without_packing_refuse_it(method: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="padding_free"):
        METHODS[method].config_class(output_dir=str(tmp_path), use_cpu=True, padding_free=True)
