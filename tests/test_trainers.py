"""Both trainers on real tiny models: what is logged and what is learned equals the papers' equations."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental import gkd as trl_gkd

import reference
from conftest import QUIET, build_model, build_tokenizer, make_rows, policy_scores
from tsdkd import ConfigError, EOPDConfig, EOPDTrainer, TokenizerMismatchError, TSDKDConfig, TSDKDTrainer
from tsdkd.lm_head.dense import DenseHead
from tsdkd.methods import METHODS
from tsdkd.methods.eopd import EOPDObjective
from tsdkd.objective import CompletionBatch
from tsdkd.rollout.hf import sample_completions
from tsdkd.rollout.seeding import prompt_generator

FAMILIES = ["gemma2", "llama", "qwen2", "qwen3"]
ONE_STEP = {**QUIET, "max_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 6, "optim": "sgd"}
ONE_STEP |= {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "learning_rate": 1e-2}


def config(cls, folder, **values):
    return cls(output_dir=str(folder), **{**ONE_STEP, "max_length": 64, "max_new_tokens": 12, **values})


def rows(count: int = 6, **kwargs) -> Dataset:
    return Dataset.from_list(make_rows(count, **kwargs))


def train(cls, config_, student, teacher, data=None, **kwargs):
    if "qwen2-" in str(student):  # transformers loads every qwen2 folder's tokenizer as byte-level BPE
        kwargs |= {"processing_class": build_tokenizer(), "teacher_processing_class": build_tokenizer()}
    trainer = cls(model=student, teacher_model=teacher, args=config_, train_dataset=data or rows(), **kwargs)
    trainer.train()
    return trainer


def first_log(trainer) -> dict[str, float]:
    return next(entry for entry in trainer.state.log_history if "loss" in entry)


def response_logits(model, sequences: list[tuple[list[int], list[int]]], shared: int) -> list[list[list[float]]]:
    """The logits that predict each completion's tokens, each sequence alone and unpadded, in float64."""
    model = model.double().eval()
    result = []
    for prompt, completion in sequences:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
        result.append(logits[len(prompt) - 1 : len(prompt) + len(completion) - 1, :shared].tolist())
    return result


def prompt_ids(text: str) -> list[int]:
    return build_tokenizer()(f"<user> {text} <assistant>")["input_ids"]


def on_policy_sequences(student: str, data: Dataset, shared: int, limit: int = 12, step: int = 0):
    """What the student says at a step, by the public sampler."""
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    prompts = [prompt_ids(row["prompt"]) for row in data]
    generators = [prompt_generator(42, step, i) for i in range(len(prompts))]
    completions = sample_completions(
        model, prompts, [limit] * len(prompts), generators, stop_token_ids={1}, vocab_size=shared
    )
    return [(p, c.ids) for p, c in zip(prompts, completions, strict=True)]


def models(student: str, teacher: str):
    return (AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32) for name in (student, teacher))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "length"])
def test_tsd_kd_logs_the_papers_terms(family, reduction, saved_model, tmp_path):
    student, teacher, data = saved_model(family, 0), saved_model(family, 1), rows()
    trainer = train(TSDKDTrainer, config(TSDKDConfig, tmp_path, indirect_reduction=reduction), student, teacher, data)
    sequences = on_policy_sequences(student, data, 64)
    logits = [response_logits(m, sequences, 64) for m in models(student, teacher)]
    expected = reference.tsd_kd_loss(*logits, indirect_reduction=reduction)
    log = first_log(trainer)
    assert log["loss"] == pytest.approx(expected["loss"], rel=2e-5)
    for term in ("direct", "indirect", "entropy"):
        assert log[f"loss/{term}"] == pytest.approx(expected[term], rel=2e-5)
    openers = [reference.opener_length([reference.token_entropy(r) for r in one]) for one in logits[0]]
    assert log["opener/length"] == pytest.approx(sum(openers) / len(openers))
    assert log["completions/mean_length"] == pytest.approx(sum(len(c) for _, c in sequences) / len(sequences))


@pytest.mark.parametrize(
    "options",
    [
        {"gate": False},
        {"alpha": 0.0},
        {"entropy_weight": 0.0},
        {"gate": False, "alpha": 0.0, "entropy_weight": 0.0},
        {"beta": 0.0, "gate_temperature": 0.5, "entropy_ratio": 0.3, "opener_ratio": 0.4},
        {"beta": 1.0, "alpha": 2.0, "indirect_top_k": 3},
    ],
    ids=str,
)
def test_ablations_and_options(options, saved_model, tmp_path):
    student, teacher, data = saved_model("qwen3", 0), saved_model("qwen3", 1), rows()
    trainer = train(TSDKDTrainer, config(TSDKDConfig, tmp_path, **options), student, teacher, data)
    logits = [response_logits(m, on_policy_sequences(student, data, 64), 64) for m in models(student, teacher)]
    names = {"indirect_top_k": "top_k"}
    expected = reference.tsd_kd_loss(*logits, **{names.get(k, k): v for k, v in options.items()})
    assert first_log(trainer)["loss"] == pytest.approx(expected["loss"], rel=2e-5)


def test_adaptive_opener_follows_the_last_five_responses(saved_model, tmp_path):
    student, teacher, data = saved_model("qwen3", 0), saved_model("qwen3", 1), rows(6)
    options = {"adaptive_opener": True, "train_sampling_strategy": "sequential"}
    trainer = train(TSDKDTrainer, config(TSDKDConfig, tmp_path, **options), student, teacher, data)
    logits = [response_logits(m, on_policy_sequences(student, data, 64), 64) for m in models(student, teacher)]
    window, ratios = [], []
    for pair in zip(*logits, strict=True):
        window.append(reference.difficulty(*([reference.token_entropy(r) for r in one] for one in pair)))
        ratios.append(reference.adaptive_opener_ratio(reference.mean(window[-5:])))
    assert first_log(trainer)["loss"] == pytest.approx(
        reference.tsd_kd_loss(*logits, opener_ratio=ratios)["loss"], rel=2e-5
    )


@pytest.mark.parametrize(
    "family, options",
    [
        *((family, {}) for family in FAMILIES),
        ("qwen3", {"forward_kl_top_k": 5, "entropy_threshold": 1.5}),
    ],
    ids=str,
)
def test_eopd_logs_the_papers_terms(family, options, saved_model, tmp_path):
    student, teacher, data = saved_model(family, 0), saved_model(family, 1), rows()
    args = config(EOPDConfig, tmp_path, rollout_batch_size=6, **options)
    trainer = train(EOPDTrainer, args, student, teacher, data)
    sequences = on_policy_sequences(student, data, 64)
    logits = [response_logits(m, sequences, 64) for m in models(student, teacher)]
    tokens = [completion for _, completion in sequences]
    old = [
        [reference.log_softmax(row)[token] for row, token in zip(one, ids, strict=True)]
        for one, ids in zip(logits[0], tokens, strict=True)
    ]
    names = {"forward_kl_top_k": "top_k"}
    expected = reference.eopd_loss(*logits, tokens, old, **{names.get(k, k): v for k, v in options.items()})
    log = first_log(trainer)
    assert log["loss"] == pytest.approx(expected["loss"], rel=5e-5)
    assert log["loss/reverse_kl"] == pytest.approx(expected["opd"], rel=5e-5)
    assert log["policy/ratio"] == pytest.approx(1.0, abs=1e-6)


def test_one_rollout_serves_several_steps(saved_model, tmp_path):
    """Algorithm 1: the ratio is 1 in the first mini-batch and leaves it afterwards; then it starts again."""
    args = config(EOPDConfig, tmp_path, rollout_batch_size=24, learning_rate=0.5, max_steps=8)
    trainer = train(EOPDTrainer, args, saved_model("qwen3", 0), saved_model("qwen3", 1), rows(48))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    at_one = [log["policy/ratio"] == pytest.approx(1.0, abs=1e-6) for log in logs]
    assert at_one == [True, False, False, False, True, False, False, False]
    assert ["speed/rollout_tokens_per_second" in log for log in logs] == at_one
    assert ["speed/teacher_tokens_per_second" in log for log in logs] == at_one


@pytest.mark.parametrize("student_rows, teacher_rows", [(64, 80), (80, 64)])
@pytest.mark.parametrize("trainer_class, config_class", [(TSDKDTrainer, TSDKDConfig), (EOPDTrainer, EOPDConfig)])
def test_padded_vocabularies_are_compared_over_the_shared_ids(
    student_rows, teacher_rows, trainer_class, config_class, saved_model, tmp_path
):
    """One tokenizer, 64 and 80 rows."""
    student, teacher, data = saved_model("qwen2", 0, student_rows), saved_model("qwen3", 1, teacher_rows), rows()
    extra = {"rollout_batch_size": 6} if config_class is EOPDConfig else {}
    trainer = train(trainer_class, config(config_class, tmp_path, **extra), student, teacher, data)
    sequences = on_policy_sequences(student, data, 64)
    assert all(token < 64 for _, completion in sequences for token in completion)
    logits = [response_logits(m, sequences, 64) for m in models(student, teacher)]
    if config_class is TSDKDConfig:
        expected = reference.tsd_kd_loss(*logits)["loss"]
    else:
        tokens = [completion for _, completion in sequences]
        old = [
            [reference.log_softmax(r)[t] for r, t in zip(one, ids, strict=True)]
            for one, ids in zip(logits[0], tokens, strict=True)
        ]
        expected = reference.eopd_loss(*logits, tokens, old)["loss"]
    assert first_log(trainer)["loss"] == pytest.approx(expected, rel=5e-5)
    trainer.save_model()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert saved.config.vocab_size == student_rows == saved.get_output_embeddings().weight.shape[0]


def test_eos_is_supervised_even_when_it_is_the_pad_token(saved_model, tmp_path):
    """Off-policy, so that every completion surely ends in EOS."""
    data = rows()
    losses = {}
    for pad in ("<pad>", "<eos>"):
        student, teacher = (saved_model("qwen3", seed, pad_token=pad) for seed in (0, 1))
        trainer = train(TSDKDTrainer, config(TSDKDConfig, tmp_path, lmbda=0.0), student, teacher, data)
        losses[pad] = first_log(trainer)["loss"]
        tokenizer = build_tokenizer()
        sequences = [(prompt_ids(r["prompt"]), [*tokenizer(r["completion"])["input_ids"], 1][:12]) for r in data]
        logits = [response_logits(m, sequences, 64) for m in models(student, teacher)]
        assert losses[pad] == pytest.approx(reference.tsd_kd_loss(*logits)["loss"], rel=2e-5)
    assert losses["<pad>"] == losses["<eos>"]


def test_off_policy_never_generates(saved_model, tmp_path):
    trainer = train(
        TSDKDTrainer, config(TSDKDConfig, tmp_path, lmbda=0.0), saved_model("qwen3", 0), saved_model("qwen3", 1)
    )
    assert not any("rollout" in key or "eos" in key for key in first_log(trainer))


def test_lmbda_mixes_by_a_coin(saved_model, tmp_path):
    args = config(TSDKDConfig, tmp_path, lmbda=0.5, max_steps=12, per_device_train_batch_size=2, learning_rate=1e-9)
    trainer = train(TSDKDTrainer, args, saved_model("qwen3", 0), saved_model("qwen3", 1), rows(24))
    generated = ["completions/eos_share" in log for log in trainer.state.log_history if "loss" in log]
    assert 2 <= sum(generated) <= 10


@pytest.mark.parametrize("trainer_class, config_class", [(TSDKDTrainer, TSDKDConfig), (EOPDTrainer, EOPDConfig)])
def test_the_data_sets_completions_change_nothing_on_policy(trainer_class, config_class, saved_model, tmp_path):
    """Bitwise."""
    weights = []
    prompts = [{"prompt": row["prompt"]} for row in make_rows(12)]
    texts = (["w1"] * 12, ["w2 w3 w4 w5 w6 w7"] * 12, None)
    for completions in texts:
        data = Dataset.from_list(prompts)
        data = data if completions is None else data.add_column("completion", completions)
        extra = {"rollout_batch_size": 12} if config_class is EOPDConfig else {}
        args = config(config_class, tmp_path, max_steps=2, learning_rate=0.1, optim="adamw_torch", **extra)
        trainer = train(trainer_class, args, saved_model("qwen3", 0), saved_model("qwen3", 1), data)
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("trainer_class, config_class", [(TSDKDTrainer, TSDKDConfig), (EOPDTrainer, EOPDConfig)])
def test_gradients_equal_the_objectives_own(trainer_class, config_class, saved_model, tmp_path):
    """The SGD step is -lr times the gradient of the logged loss (no hidden factor): checked along its direction."""
    student, teacher, data = saved_model("llama", 0), saved_model("llama", 1), rows()
    rate = 1.0
    extra = (
        {"rollout_batch_size": 6}
        if config_class is EOPDConfig
        else {"gate": False, "alpha": 0.0, "entropy_weight": 0.0}
    )
    trainer = train(trainer_class, config(config_class, tmp_path, learning_rate=rate, **extra), student, teacher, data)
    before = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    gradient = [
        (b - a).detach().double() / rate for a, b in zip(trainer.model.parameters(), before.parameters(), strict=True)
    ]
    sequences = on_policy_sequences(student, data, 64)
    teacher_logits = response_logits(AutoModelForCausalLM.from_pretrained(teacher), sequences, 64)
    tokens = [completion for _, completion in sequences]
    start = response_logits(before, sequences, 64)
    old = [
        [reference.log_softmax(r)[t] for r, t in zip(one, ids, strict=True)]
        for one, ids in zip(start, tokens, strict=True)
    ]

    def loss_at(distance: float) -> float:
        model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float64)
        with torch.no_grad():
            for parameter, direction in zip(model.parameters(), gradient, strict=True):
                parameter += distance * direction
        logits = response_logits(model, sequences, 64)
        if config_class is EOPDConfig:
            return reference.eopd_loss(logits, teacher_logits, tokens, old)["loss"]
        return reference.tsd_kd_loss(logits, teacher_logits, gate=False, alpha=0.0, entropy_weight=0.0)["loss"]

    slope = (loss_at(1e-4) - loss_at(-1e-4)) / 2e-4
    assert slope == pytest.approx(sum(float((g * g).sum()) for g in gradient), rel=2e-3)


@pytest.mark.parametrize("trainer_class, config_class", [(TSDKDTrainer, TSDKDConfig), (EOPDTrainer, EOPDConfig)])
def test_lora(trainer_class, config_class, saved_model, tmp_path):
    peft = pytest.importorskip("peft")
    extra = {"rollout_batch_size": 6} if config_class is EOPDConfig else {}
    args = config(config_class, tmp_path, max_steps=2, learning_rate=1.0, gradient_checkpointing=True, **extra)
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = train(trainer_class, args, saved_model("qwen3", 0), saved_model("qwen3", 1), peft_config=adapter)
    base = dict(AutoModelForCausalLM.from_pretrained(saved_model("qwen3", 0)).named_parameters())
    state = trainer.model.get_base_model().state_dict()
    assert torch.equal(state["model.layers.0.mlp.up_proj.weight"], base["model.layers.0.mlp.up_proj.weight"])
    moved = [p for n, p in trainer.model.named_parameters() if "lora_B" in n]
    assert moved and all(p.abs().max() > 0 for p in moved)
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_loaded_models_work_as_paths_do(saved_model, tmp_path):
    student, teacher = saved_model("qwen3", 0), saved_model("qwen3", 1)
    by_path = train(TSDKDTrainer, config(TSDKDConfig, tmp_path / "a"), student, teacher)
    in_memory = train(
        TSDKDTrainer,
        config(TSDKDConfig, tmp_path / "b"),
        build_model("qwen3", 0),
        build_model("qwen3", 1),
        processing_class=build_tokenizer(),
    )
    assert first_log(by_path)["loss"] == first_log(in_memory)["loss"]


def test_different_tokenizers_are_refused(saved_model, tmp_path):
    words = [f"w{i}" for i in range(56)]
    words[7], words[8] = words[8], words[7]
    with pytest.raises(TokenizerMismatchError, match=r"11.*w7.*w8"):
        TSDKDTrainer(
            model=saved_model("qwen3", 0),
            teacher_model=saved_model("qwen3", 1),
            args=config(TSDKDConfig, tmp_path),
            train_dataset=rows(),
            teacher_processing_class=build_tokenizer(words),
        )


def test_evaluation_gives_the_same_terms_and_accuracy(saved_model, tmp_path):
    args = config(TSDKDConfig, tmp_path, per_device_eval_batch_size=4)
    trainer = TSDKDTrainer(
        model=saved_model("qwen3", 0),
        teacher_model=saved_model("qwen3", 1),
        args=args,
        train_dataset=rows(),
        eval_dataset=rows(10, seed=5),
    )
    first, second = trainer.evaluate(), trainer.evaluate()
    assert {f"eval_{k}" for k in ("loss", "accuracy", "loss/direct", "gate", "opener/length")} <= first.keys()
    slow = {k for k in first if "second" in k or "runtime" in k or "time" in k}
    assert {k: v for k, v in first.items() if k not in slow} == {k: v for k, v in second.items() if k not in slow}
    one_by_one = TSDKDTrainer(
        model=saved_model("qwen3", 0),
        teacher_model=saved_model("qwen3", 1),
        args=config(TSDKDConfig, tmp_path, per_device_eval_batch_size=1),
        train_dataset=rows(),
    ).evaluate(rows(10, seed=5))
    assert one_by_one["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-5)


def test_the_saved_student_is_a_plain_model(saved_model, tmp_path):
    args = config(TSDKDConfig, tmp_path, chat_template_source="teacher")
    trainer = train(TSDKDTrainer, args, saved_model("gemma2", 0), saved_model("gemma2", 1))
    trainer.save_model()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    trained = trainer.model.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert tokenizer.chat_template == build_tokenizer().chat_template
    assert model.generation_config.eos_token_id in (1, [1])
    card = (Path(tmp_path) / "README.md").read_text()
    for text in ("TSD-KD", saved_model("gemma2", 1), "Kim and Baek 2026", "Explain in Your Own Words"):
        assert text in card
    assert "2603.07079" not in card  # EOPD's


def test_gradient_checkpointing_and_term_gradients(saved_model, tmp_path):
    logs = {}
    for checkpointing in (True, False):
        args = config(TSDKDConfig, tmp_path, gradient_checkpointing=checkpointing, log_term_gradients=1)
        logs[checkpointing] = first_log(train(TSDKDTrainer, args, saved_model("qwen3", 0), saved_model("qwen3", 1)))
    for name in ("loss", "grad_norm", "grad_norm/direct", "grad_norm/indirect", "grad_norm/entropy"):
        assert logs[True][name] == pytest.approx(logs[False][name], rel=1e-4)
        assert logs[True][name] > 0


def test_temperature_divides_the_logits_of_the_loss(saved_model, tmp_path):
    student, teacher, data = saved_model("qwen3", 0), saved_model("qwen3", 1), rows()
    args = config(TSDKDConfig, tmp_path, temperature=2.0, lmbda=0.0)
    trainer = train(TSDKDTrainer, args, student, teacher, data)
    tokenizer = build_tokenizer()
    sequences = [(prompt_ids(r["prompt"]), [*tokenizer(r["completion"])["input_ids"], 1][:12]) for r in data]
    logits = [
        [[[z / 2.0 for z in row] for row in one] for one in response_logits(m, sequences, 64)]
        for m in models(student, teacher)
    ]
    assert first_log(trainer)["loss"] == pytest.approx(reference.tsd_kd_loss(*logits)["loss"], rel=2e-5)


def test_an_empty_completion_trains_nothing_and_breaks_nothing(saved_model, tmp_path):
    """No EOS to append, no text: a row of zero tokens beside a row of some."""
    student, teacher = (build_model("qwen3", seed) for seed in (0, 1))
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    data = Dataset.from_list([{"prompt": "w1 w2", "completion": ""}, {"prompt": "w3", "completion": "w4 w5 w6"}])
    logs = []
    for subset in (data, data.select([1])):
        args = config(TSDKDConfig, tmp_path, lmbda=0.0, per_device_train_batch_size=2)
        logs.append(first_log(train(TSDKDTrainer, args, student, teacher, subset, processing_class=tokenizer)))
        student = build_model("qwen3", 0)
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-6)
    assert logs[0]["grad_norm"] == pytest.approx(logs[1]["grad_norm"], rel=1e-5)


def test_importance_weights_act_on_the_sampled_term_alone():
    """What an engine sampled from another distribution: the loss and its gradient, against the float64 loop."""
    make = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(7, 20, generator=make, dtype=torch.float64) * 2 for _ in range(2))
    sampled = torch.randint(0, 20, (7,), generator=make)
    old = (student + torch.randn(7, 20, generator=make, dtype=torch.float64) * 0.3).log_softmax(-1)[range(7), sampled]
    weights = torch.rand(7, generator=make, dtype=torch.float64) * 3
    teacher_logps = teacher.log_softmax(-1)
    top = teacher_logps.topk(16)
    entropy = -(teacher_logps.exp() * teacher_logps).sum(-1)
    at_sampled = teacher_logps[range(7), sampled]
    scores = policy_scores(entropy, at_sampled, top.values, top.indices, old, importance_sampling_ratio=weights)
    logits = student.clone().requires_grad_()
    output = EOPDObjective()(DenseHead(logits), CompletionBatch(torch.ones(1, 7).bool(), sampled, scores=scores))
    output.loss.backward()

    def expected(flat: list[float]) -> float:
        rows = [flat[i * 20 : (i + 1) * 20] for i in range(7)]
        given = ([teacher.tolist()], [sampled.tolist()], [old.tolist()])
        return reference.eopd_loss([rows], *given, importance=[weights.tolist()])["loss"] * 7

    assert float(output.loss.detach()) == pytest.approx(expected(student.flatten().tolist()), rel=1e-9)
    numeric = reference.central_difference(expected, student.flatten().tolist())
    torch.testing.assert_close(logits.grad.flatten(), torch.tensor(numeric, dtype=torch.float64), rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")  # TRL's own
def test_a_trainer_refuses_another_methods_configuration(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=r"args: TSDKDTrainer takes a TSDKDConfig, found a EOPDConfig"):
        TSDKDTrainer("student", "teacher", EOPDConfig(str(tmp_path), **QUIET), train_dataset=None)
    with pytest.raises(ConfigError, match=r"args: GKDTrainer takes a GKDConfig, found a trl\."):
        METHODS["gkd"]("student", "teacher", trl_gkd.GKDConfig(str(tmp_path), **QUIET), train_dataset=None)
    with pytest.raises(ConfigError, match=r"args: GRPOTrainer takes a GRPOConfig, found a TSDKDConfig"):
        METHODS["grpo"]("student", args=TSDKDConfig(str(tmp_path), **QUIET), train_dataset=None)


def test_the_methods_do_not_import_vllm() -> None:
    """It takes seconds, and where it is broken, no method must be."""
    code = "import sys, tsdkd.methods; sys.exit('trl.generation.vllm_generation' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.filterwarnings("error")
def test_a_script_needs_no_settings_for_a_cpu(tmp_path):
    """TRL's default, bfloat16, is refused by transformers there; and the demo's models have names."""
    args = TSDKDConfig(str(tmp_path), max_steps=1, max_completion_length=4, logging_steps=1, report_to="none")
    rows = Dataset.from_list([{"prompt": "27,7 x+5 y~3 x#4 y-2 x+9 y#0 y+1 x~4 -> y+3"}])
    trainer = TSDKDTrainer("tsdkd://demo/student", "tsdkd://demo/teacher", args, train_dataset=rows)
    trainer.train()
    assert args.bf16 is False and first_log(trainer)["loss"] > 0
