"""The trainers on the fused head: the same step as from whole logits, and a refusal where it can't be."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig, LlamaForCausalLM

from conftest import QUIET, build_model, build_tokenizer, make_rows
from tsdkd import EOPDConfig, EOPDTrainer, ModelError, TSDKDConfig, TSDKDTrainer

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "initializer_range": 0.2,
}
METHODS = {
    "tsd-kd": (TSDKDTrainer, TSDKDConfig, {}),
    "tsd-kd, sum": (TSDKDTrainer, TSDKDConfig, {"indirect_reduction": "sum", "adaptive_opener": True, "beta": 0.5}),
    "gkd": (TSDKDTrainer, TSDKDConfig, {"gate": False, "alpha": 0.0, "entropy_weight": 0.0, "beta": 0.0}),
    "eopd": (EOPDTrainer, EOPDConfig, {"rollout_batch_size": 6}),
    "eopd, two steps": (EOPDTrainer, EOPDConfig, {"rollout_batch_size": 12, "max_steps": 2}),
}


def scaled_model(name: str) -> torch.nn.Module:
    """Families that scale their logits."""
    config = {
        "cohere": lambda: CohereConfig(**SMALL, logit_scale=0.25),
        "granite": lambda: GraniteConfig(**SMALL, logits_scaling=4.0, attention_multiplier=0.25),
    }[name]()
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def student_of(family: str) -> torch.nn.Module:
    return scaled_model(family) if family in ("cohere", "granite") else build_model(family, 0)


def train(method: str, folder, student=None, teacher=None, peft_config=None, **values):
    """One SGD step; the trained parameters, flat, and the trainer."""
    trainer_class, config_class, own = METHODS[method]
    step = {"max_steps": 1, "per_device_train_batch_size": 6, "optim": "sgd", "learning_rate": 0.1}
    step |= {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "max_length": 64, "max_new_tokens": 12}
    torch.manual_seed(0)  # LoRA's own initialisation
    trainer = trainer_class(
        model=student or build_model("llama", 0),
        teacher_model=teacher or build_model("qwen3", 1, rows=70, hidden=48),
        args=config_class(output_dir=str(folder), **{**QUIET, **step, **own, **values}),
        train_dataset=Dataset.from_list(make_rows(12)),
        processing_class=build_tokenizer(),
        peft_config=peft_config,
    )
    trainer.train()
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad]), trainer


def assert_same_step(method: str, folder, make_student, tolerance: float = 2e-5, **values) -> None:
    """The difference of the two steps, relative to the step."""
    start = torch.cat([p.detach().flatten() for p in make_student().parameters()])
    fused, _ = train(method, folder, make_student(), **values)
    whole, _ = train(method, folder, make_student(), fused_head=False, **values)
    assert (fused - start).norm() > 1e-3
    assert (fused - whole).norm() <= tolerance * (fused - start).norm()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "cohere", "granite"])
def test_a_step_is_that_of_whole_logits(method, family, tmp_path):
    assert_same_step(method, tmp_path, lambda: student_of(family))


@pytest.mark.parametrize("family", ["gemma2", "cohere"])
def test_the_teachers_cap_and_scale_count_too(family, tmp_path):
    make_teacher = {"gemma2": lambda: build_model("gemma2", 1), "cohere": lambda: scaled_model("cohere")}[family]
    for method in ("tsd-kd", "eopd"):
        assert_same_step(method, tmp_path, lambda: build_model("llama", 0), teacher=make_teacher())


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.7},
        {"gradient_checkpointing": True},
        {"head_chunk_gib": 1e-9},
        {"log_term_gradients": 1},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
        {"lmbda": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["tsd-kd", "eopd"])
def test_with_the_options_of_a_run(method, values, tmp_path):
    if "head_chunk_gib" in values:
        small, _ = train(method, tmp_path, **values)
        default, _ = train(method, tmp_path)
        torch.testing.assert_close(small, default, rtol=1e-5, atol=1e-6)
    else:
        assert_same_step(method, tmp_path, lambda: build_model("qwen3", 0), **values)


@pytest.mark.parametrize("method", ["tsd-kd", "eopd"])
def test_autocast_is_as_exact_as_with_whole_logits(method, tmp_path):
    exact, _ = train(method, tmp_path, lmbda=0.0)
    steps = [train(method, tmp_path, bf16=True, lmbda=0.0, fused_head=fused)[0] for fused in (True, False)]
    errors = [float((step - exact).norm()) for step in steps]
    start = torch.cat([p.detach().flatten() for p in build_model("llama", 0).parameters()])
    assert 0 < errors[0] <= 1.1 * errors[1]
    assert errors[0] <= 0.2 * float((exact - start).norm())


@pytest.mark.parametrize("method", ["tsd-kd", "eopd"])
@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_lora(method, saved, tmp_path):
    peft = pytest.importorskip("peft")
    results = []
    for fused in (True, False):
        adapter = peft.LoraConfig(
            r=4, target_modules=["q_proj"], modules_to_save=saved, task_type="CAUSAL_LM", init_lora_weights=False
        )
        results.append(train(method, tmp_path, peft_config=adapter, fused_head=fused))
    (fused, trainer), (whole, _) = results
    torch.testing.assert_close(fused, whole, rtol=1e-5, atol=1e-5)
    if saved:
        layer = trainer.model.get_output_embeddings()
        assert not torch.equal(layer.modules_to_save["default"].weight, layer.original_module.weight)


def test_an_adapter_on_the_output_layer_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="lm_head"):
        train("tsd-kd", tmp_path, peft_config=adapter)


class Doubled(LlamaForCausalLM):
    """A model that does to its logits what no configuration tells."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("method", ["tsd-kd", "eopd"])
def test_logits_that_are_not_the_output_layers_are_refused(method, role, tmp_path):
    """Trained on silently, they would be another distribution than the one that samples."""
    plain = build_model("llama", 0)
    doubled = Doubled(plain.config)
    doubled.load_state_dict(plain.state_dict())
    with pytest.raises(ModelError, match="Doubled"):
        train(method, tmp_path, **{role: doubled})
    train(method, tmp_path, **{role: doubled}, fused_head=False)
