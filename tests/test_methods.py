"""Every method beside TSD-KD and EOPD: values and gradients against float64 loops, and what is sampled."""

import math
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

import reference as ref
from conftest import QUIET, build_model, build_tokenizer, completions_of, flags, make_rows, policy_scores, weights
from crash import run, run_ranks
from tsdkd.cli import main
from tsdkd.errors import DataError
from tsdkd.grading import Grader, is_math_equivalent
from tsdkd.lm_head.dense import DenseHead
from tsdkd.lm_head.fused import FusedHead
from tsdkd.lm_head.projection import Projection
from tsdkd.lm_head.statistics import Head, StatisticsRequest
from tsdkd.methods import METHODS
from tsdkd.methods.minillm import mixture_choice
from tsdkd.methods.speculative_kd import SpeculativeKDOptions, speculative_choice
from tsdkd.objective import CompletionBatch, Objective, PolicyScores
from tsdkd.rollout.captured import CapturedStep
from tsdkd.rollout.hf import sample_completions, sample_with_step
from tsdkd.rollout.seeding import prompt_generator
from tsdkd.rollout.step import DecodingStep

LENGTHS = (5, 2, 7)
VOCABULARY = 23
Rows = list[list[list[float]]]


@dataclass
class Case:
    """One batch: student, teacher and the policy that sampled, and the sampled tokens, as logits of 14 tokens."""

    student: Tensor
    teacher: Tensor
    old: Tensor
    ids: Tensor

    @classmethod
    def draw(cls) -> "Case":
        make = torch.Generator().manual_seed(5)
        shape = (sum(LENGTHS), VOCABULARY)
        student, teacher, noise = (torch.randn(shape, generator=make, dtype=torch.float64) for _ in range(3))
        sharpness = torch.linspace(0.5, 4.0, len(student)).double().unsqueeze(-1)
        ids = torch.randint(VOCABULARY, shape[:1], generator=make)
        return cls(2 * student, sharpness * teacher, 2 * student + 0.3 * noise, ids)

    @property
    def mask(self) -> Tensor:
        return torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(-1)

    @property
    def tokens(self) -> list[list[int]]:
        return [part.tolist() for part in self.ids.split(LENGTHS)]

    def answers(self, objective: Objective) -> PolicyScores:
        """What a trainer would have asked for at the rollout."""
        teacher = DenseHead(self.teacher)(
            StatisticsRequest(entropy=True, top_k=objective.teacher_top_k, ids=self.ids.unsqueeze(-1))
        )
        old = DenseHead(self.old)(StatisticsRequest(ids=self.ids.unsqueeze(-1))).logps[:, 0]
        answers = policy_scores(teacher.entropy, teacher.logps[:, 0], teacher.topk_logps, teacher.topk_ids, old)
        if hasattr(objective, "compute_returns"):
            advantages = objective.compute_returns(old, answers.teacher_per_token_logps, self.mask)
            spread = advantages.var(correction=0)
            answers.advantages = (advantages - advantages.mean()) / (spread + 1e-8).sqrt()
            answers.old_per_token_logps = objective.compute_mixture_logps(old, answers.teacher_per_token_logps)
        return answers

    def loss(self, objective: Objective, head: Head) -> Tensor:
        """Divided as the trainer does."""
        answers = self.answers(objective) if objective.scores_class else None
        output = objective(head, CompletionBatch(self.mask, self.ids, scores=answers))
        for name, term in output.terms.items():
            assert math.isfinite(term), name
        count = {"tokens": len(self.ids), "completions": len(LENGTHS), "micro-batches": 1}[objective.unit]
        return output.loss / count


def by_response(logits: Tensor) -> Rows:
    return [part.tolist() for part in logits.double().split(LENGTHS)]


def token_mean(loss: Callable[..., float], **options: Any) -> Callable[[Rows, Case], float]:
    def reference(student: Rows, case: Case) -> float:
        pairs = zip(chain(*student), case.teacher.tolist(), strict=True)
        return ref.mean([loss(q, p, **options) for q, p in pairs])

    return reference


def gkd(beta: float) -> Callable[[Rows, Case], float]:
    options = {"alpha": 0.0, "gate": False, "entropy_weight": 0.0, "beta": beta}
    return lambda student, case: ref.tsd_kd_loss(student, by_response(case.teacher), **options)["loss"]


def policy(**options: Any) -> Callable[[Rows, Case], float]:
    def reference(student: Rows, case: Case) -> float:
        old = [
            [ref.log_softmax(row)[token] for row, token in zip(rows, ids, strict=True)]
            for rows, ids in zip(by_response(case.old), case.tokens, strict=True)
        ]
        teacher, constant = by_response(case.teacher), by_response(case.student)
        return ref.eopd_loss(student, teacher, case.tokens, old, constant_logits=constant, **options)["loss"]

    return reference


def random_places() -> list[list[bool]]:
    return [part.tolist() for part in (torch.linspace(0.0, 0.99, sum(LENGTHS)) < 0.3).split(LENGTHS)]


def sequence_kd(student: Rows, case: Case) -> float:
    return ref.mean([-ref.log_softmax(row)[i] for row, i in zip(chain(*student), case.ids.tolist(), strict=True)])


# method, its options, the loop
OBJECTIVES: dict[str, tuple[str, dict[str, Any], Callable[[Rows, Case], float]]] = {
    "gkd": ("gkd", {}, gkd(0.9)),
    "gkd, forward": ("gkd", {"beta": 0.0}, gkd(0.0)),
    "supervised-kd": ("supervised-kd", {}, token_mean(ref.generalized_jsd, beta=0.0)),
    "speculative-kd": ("speculative-kd", {}, gkd(0.0)),
    "distillm": ("distillm", {}, token_mean(ref.skew_reverse_kl)),
    "distillm, forward": ("distillm", {"skew_kl": "forward", "skew": 0.2}, token_mean(ref.skew_forward_kl, skew=0.2)),
    "seq-kd": ("seq-kd", {}, sequence_kd),
    "kd": ("kd", {}, lambda q, case: ref.kd_loss(q, by_response(case.teacher), case.tokens)),
    "kd, weights": (
        "kd",
        {"cross_entropy_weight": 0.2, "forward_kl_weight": 3.0, "forward_kl_top_k": 4},
        lambda q, case: ref.kd_loss(q, by_response(case.teacher), case.tokens, 0.2, 3.0, 4),
    ),
    "opd": ("opd", {}, policy(placement="none")),
    "opd, clip": ("opd", {"epsilon": 0.05}, policy(placement="none", clip_epsilon=0.05)),
    "eopd": ("eopd", {"entropy_threshold": 2.0}, policy(entropy_threshold=2.0)),
    "eopd-full": ("eopd-full", {"forward_kl_top_k": 5}, policy(placement="all", top_k=5)),
    "eopd-random": ("eopd-random", {"forward_kl_random_ratio": 0.3}, policy(placement=random_places())),
    "opd-entropy-bonus": ("opd-entropy-bonus", {"entropy_bonus": 0.3}, policy(placement="none", entropy_bonus=0.3)),
    "opd-advantage-shaping": ("opd-advantage-shaping", {}, policy(placement="none", advantage_shaping=0.1)),
    "minillm": (
        "minillm",
        {},
        lambda q, case: ref.minillm_loss(q, by_response(case.teacher), case.tokens, by_response(case.old)),
    ),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_values_and_gradients(name: str) -> None:
    """From whole logits and from hidden states, in float64."""
    method, options, loop = OBJECTIVES[name]
    case, objective = Case.draw(), METHODS[method].objective_class(**options)

    def probe(flat: list[float]) -> float:
        return loop(by_response(torch.tensor(flat, dtype=torch.float64).reshape(case.student.shape)), case)

    flat = case.student.flatten().tolist()
    slopes = torch.tensor(ref.central_difference(probe, flat), dtype=torch.float64).reshape(case.student.shape)
    logits = case.student.clone().requires_grad_()
    loss = case.loss(objective, DenseHead(logits, case.teacher))
    loss.backward()
    assert loss.item() == pytest.approx(probe(flat), rel=1e-12)
    torch.testing.assert_close(logits.grad, slopes, rtol=2e-6, atol=1e-8)

    # hidden states that are the logits: the head's weight is the identity
    hidden, identity = case.student.clone().requires_grad_(), Projection(torch.eye(VOCABULARY, dtype=torch.float64))
    loss = case.loss(objective, FusedHead(hidden, identity, case.teacher, identity, chunk_gib=3e-7))
    loss.backward()
    assert loss.item() == pytest.approx(probe(flat), rel=1e-12)
    torch.testing.assert_close(hidden.grad, slopes, rtol=2e-6, atol=1e-8)


def test_the_released_loss_has_the_values_of_the_released_code() -> None:
    """Padding included: `trained` marks the labels that are valid."""
    make = torch.Generator().manual_seed(7)
    for batch, length, size, expected in ((1, 24, 40, 4.629148), (4, 30, 60, 4.744506)):
        student = torch.randn(batch, length, size, generator=make) * 2
        teacher = torch.randn(batch, length, size, generator=make) * 2 + student * 0.5
        lengths = torch.tensor([length, *torch.randint(5, length, (batch - 1,), generator=make).tolist()])
        trained = torch.arange(length) < lengths.unsqueeze(-1)
        logits = student.flatten(0, 1).requires_grad_()
        identity = Projection(torch.eye(size))
        heads = DenseHead(logits, teacher.flatten(0, 1)), FusedHead(logits, identity, teacher.flatten(0, 1), identity)
        gradients = []
        for head in heads:
            responses = completions_of(torch.ones_like(trained), loss_mask=trained)
            output = METHODS["tsd-kd-released"].objective_class()(head, responses)
            assert output.loss.item() == pytest.approx(expected, abs=2e-6)
            gradients += torch.autograd.grad(output.loss, logits)
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


# What is sampled -----------------------------------------------------------------------------------------------------

PROMPTS = [[4, 5, 6], [7], [8, 9, 10, 11, 12], [13, 14]]


def together(choose: Any, prompts: list[list[int]] = PROMPTS, limit: int = 12, step: int = 0) -> list[list[int]]:
    models = [build_model("qwen3", 0), build_model("llama", 1)]
    generators = [[prompt_generator(0, step, i, stream) for stream in (0, 4)] for i in range(len(prompts))]
    limits = [limit] * len(prompts)
    step = CapturedStep(DecodingStep(models, choose, vocab_size=64))
    completions = sample_with_step(step, prompts, limits, generators, stop_token_ids={1})
    return [c.ids for c in completions]


def speculative(**options: Any) -> Any:
    return speculative_choice(SpeculativeKDOptions(**options))


def test_interleaved_sampling_that_accepts_everything_is_the_students_own() -> None:
    """K = V: the same tokens, from the same random numbers."""
    found = together(speculative(accept_top_k=64, draft_temperature=0.7, draft_top_p=0.8))
    generators = [prompt_generator(0, 0, i) for i in range(len(PROMPTS))]
    options = {"stop_token_ids": {1}, "vocab_size": 64, "temperature": 0.7, "top_p": 0.8}
    own = sample_completions(build_model("qwen3", 0), PROMPTS, [12] * len(PROMPTS), generators, **options)
    assert found == [c.ids for c in own]


def test_interleaved_sampling_that_accepts_only_the_best_is_the_teachers_greedy_choice() -> None:
    found = together(speculative(accept_top_k=1, correction_top_p=1e-9))
    greedy = sample_completions(
        build_model("llama", 1), PROMPTS, [12] * len(PROMPTS), None, stop_token_ids={1}, vocab_size=64
    )
    assert found == [c.ids for c in greedy]


def first_token_shares(choose: Any, draws: int = 4000) -> dict[int, float]:
    counts = Counter(ids[0] for ids in together(choose, [[4, 5, 6]] * draws, limit=1))
    return {token: count / draws for token, count in counts.items()}


def next_probs(model: Any, temperature: float = 1.0) -> list[float]:
    with torch.no_grad():
        logits = model(torch.tensor([[4, 5, 6]])).logits[0, -1].double()
    return (logits / temperature).softmax(-1).tolist()


def test_interleaved_sampling_replaces_what_the_teacher_finds_unlikely() -> None:
    """The student's mass outside the teacher's top 8 goes to the teacher's distribution."""
    shares = first_token_shares(
        speculative(
            accept_top_k=8,
            draft_temperature=1.0,
            draft_top_p=1.0,
            correction_temperature=0.5,
            correction_top_p=1.0,
        )
    )
    student, teacher = next_probs(build_model("qwen3", 0)), next_probs(build_model("llama", 1))
    best = sorted(range(64), key=lambda v: -teacher[v])[:8]
    rejected = 1.0 - sum(student[v] for v in best)
    corrected = next_probs(build_model("llama", 1), 0.5)
    assert 0.05 < rejected < 0.95
    for v in range(64):
        expected = (student[v] if v in best else 0.0) + rejected * corrected[v]
        assert shares.get(v, 0.0) == pytest.approx(expected, abs=5 * math.sqrt(expected / 4000) + 1e-3)


def test_the_mixture_is_sampled_from() -> None:
    student, teacher = next_probs(build_model("qwen3", 0)), next_probs(build_model("llama", 1))
    shares = first_token_shares(mixture_choice(0.3, 1.0))
    for v in range(64):
        expected = 0.3 * teacher[v] + 0.7 * student[v]
        assert shares.get(v, 0.0) == pytest.approx(expected, abs=5 * math.sqrt(expected / 4000) + 1e-3)


# Trainers ------------------------------------------------------------------------------------------------------------

STEP = {**QUIET, "max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 6, "optim": "sgd"}
STEP |= {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "learning_rate": 0.1, "max_length": 64}
STEP |= {"max_new_tokens": 12}
DISTILLING = [name for name in METHODS if name != "grpo"]
OWN: dict[str, dict[str, Any]] = {
    "minillm": {"rollout_batch_size": 12, "num_iterations": 2, "max_steps": 4},
    "distillm": {"on_policy_share": 0.9, "replay_capacity": 6, "max_steps": 6},
    "speculative-kd": {"max_length": 16},  # completions of different limits
    **{name: {"rollout_batch_size": 12} for name in METHODS if "opd" in name},
}


def train(method: str, folder: Any, rows: int = 24, models: tuple[Any, Any] | None = None, **values: Any) -> Any:
    config = METHODS[method].config_class(output_dir=str(folder), **{**STEP, **OWN.get(method, {}), **values})
    student, teacher = models or (build_model("llama", 0), build_model("qwen3", 1, rows=70, hidden=48))
    trainer = METHODS[config.method](
        model=student,
        teacher_model=teacher,
        args=config,
        train_dataset=Dataset.from_list(make_rows(rows)),
        eval_dataset=Dataset.from_list(make_rows(6, seed=1)) if config.eval_strategy != "no" else None,
        processing_class=build_tokenizer(),
        teacher_processing_class=build_tokenizer(),
    )
    trainer.train()
    return trainer


def flat(trainer: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("method", DISTILLING)
def test_trains_the_same_from_hidden_states_and_whole_logits(method: str, tmp_path: Any) -> None:
    start = torch.cat([p.detach().flatten() for p in build_model("llama", 0).parameters()])
    fused, whole = (flat(train(method, tmp_path, fused_head=fused)) for fused in (True, False))
    assert (fused - start).norm() > 1e-3
    assert (fused - whole).norm() <= 1e-4 * (fused - start).norm()


@pytest.mark.parametrize("method", [m for m in DISTILLING if m != "tsd-kd-released"])
def test_any_split_into_micro_batches_gives_the_same_step(method: str, tmp_path: Any) -> None:
    """Also of what is whitened, replayed, sampled with the teacher or placed at random."""
    start = torch.cat([p.detach().flatten() for p in build_model("llama", 0).parameters()])
    options = {"train_sampling_strategy": "sequential"}
    one = flat(train(method, tmp_path, **options))
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    three = flat(train(method, tmp_path, **options, **split))
    assert (one - three).norm() <= 1e-4 * (one - start).norm()


@pytest.mark.parametrize("method", ["minillm", "distillm", "speculative-kd", "kd", "seq-kd", "eopd-random"])
def test_two_processes_give_the_same_step(method: str, saved_model: Any, rows_file: str, tmp_path: Path) -> None:
    """Whitening and placement are of the global batch. What is replayed is each process's own: none is, here."""
    values = {"model_name_or_path": saved_model("llama", 0), "teacher_model_name_or_path": saved_model("qwen3", 1)}
    values |= {**STEP, **OWN.get(method, {}), "dataset_name": rows_file, "method": method}
    values |= {"train_sampling_strategy": "sequential", "max_steps": 4, "logging_steps": 10, "learning_rate": 0.05}
    values |= {"replay_capacity": 1000} if method == "distillm" else {}
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(["train", *flags(**values, output_dir=one)], one)[0] == 0
    children = run_ranks(["train", *flags(**{**values, "per_device_train_batch_size": 3}, output_dir=two)], two)
    assert [child.wait() for child in children] == [0, 0], children[0].output[-2000:]
    start = weights(saved_model("llama", 0))
    assert (weights(one) - weights(two)).norm() <= 1e-4 * (weights(one) - start).norm()


@pytest.mark.parametrize("method", ["minillm", "distillm", "speculative-kd", "kd", "gkd"])
def test_resumes_bitwise(method: str, saved_model: Any, rows_file: str, tmp_path: Path) -> None:
    """In the middle of a rollout's epochs; with a replay buffer that has to be there."""
    values = {"model_name_or_path": saved_model("llama", 0), "teacher_model_name_or_path": saved_model("qwen3", 1)}
    values |= {**STEP, **OWN.get(method, {}), "dataset_name": rows_file, "method": method, "max_steps": 6}
    values |= {"save_strategy": "steps", "save_steps": 3, "logging_steps": 10, "learning_rate": 0.05, "resume": "true"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["train", *flags(**values, output_dir=whole)]) == 0
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoint-6")
    (parts / "model.safetensors").unlink()
    assert main(["train", *flags(**values, output_dir=parts)]) == 0
    assert (weights(whole) == weights(parts)).all()


def test_the_released_loss_pads_and_leaves_out_eos(tmp_path: Any) -> None:
    """Its micro-batch is a rectangle; another split is another loss, which is its flaw."""
    logs = [
        [entry["loss"] for entry in train("tsd-kd-released", tmp_path, **split).state.log_history if "loss" in entry]
        for split in ({}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3})
    ]
    assert logs[0][0] != pytest.approx(logs[1][0], rel=1e-3)


def test_minillm_trains_on_a_rollout_several_times(tmp_path: Any) -> None:
    """Two mini-batches, twice each, then the next rollout."""
    trainer = train("minillm", tmp_path, rows=48, max_steps=8)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    rolled_out = ["speed/rollout_tokens_per_second" in log for log in logs]
    assert rolled_out == [True, False, False, False, True, False, False, False]


def test_minillm_steps_as_often_as_there_are_windows(tmp_path: Any) -> None:
    """An epoch ends within a rollout: 10 windows of 4 micro-batches, 8 from the first rollout, 2 from the second."""
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "rollout_batch_size": 8}
    trainer = train("minillm", tmp_path, rows=40, num_iterations=4, max_steps=-1, num_train_epochs=1, **split)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert ["speed/rollout_tokens_per_second" in log for log in logs] == [True, *7 * [False], True, False]
    assert trainer.state.global_step == trainer.state.max_steps == 10


def test_distillm_replays_and_asks_for_more_when_the_validation_loss_rises(tmp_path: Any) -> None:
    """Ascent instead of descent, so that the loss rises at every evaluation."""
    evaluated = {
        "eval_strategy": "steps",
        "eval_steps": 4,
        "max_steps": 40,
        "learning_rate": 0.5,
        "on_policy_share": 0.0,
    }
    options = {
        "loss_tolerance": 0.0,
        "on_policy_share_step": 0.4,
        "replay_capacity": 8,
        "per_device_train_batch_size": 4,
    }
    student = build_model("llama", 0)
    for p in student.parameters():
        p.register_hook(torch.neg)
    trainer = train("distillm", tmp_path, rows=24, models=(student, build_model("qwen3", 1)), **evaluated, **options)
    shares = [log["replay/on_policy_share"] for log in trainer.state.log_history if "replay/on_policy_share" in log]
    assert shares[0] == 0.0 and shares == sorted(shares) and shares[-1] == 1.0
    fresh = ["completions/eos_share" in log for log in trainer.state.log_history if "loss" in log]
    assert not any(fresh[:4]) and 2 <= sum(fresh) < 30
    assert len(trainer.replay_buffer) == 8


@pytest.mark.parametrize("on_start", [False, True])
def test_distillm_compares_with_the_loss_before_training(on_start: bool, tmp_path: Any) -> None:
    """With `eval_on_start` the first of two evaluations in training can be a rise already."""
    student = build_model("llama", 0)
    for p in student.parameters():
        p.register_hook(torch.neg)
    options = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 3, "learning_rate": 0.5, "on_policy_share": 0.0}
    models = (student, build_model("qwen3", 1))
    trainer = train("distillm", tmp_path, models=models, loss_tolerance=0.0, eval_on_start=on_start, **options)
    assert trainer.on_policy_share == (0.2 if on_start else 0.1)


def test_sequence_kd_loads_no_teacher(saved_model: Any, tmp_path: Any) -> None:
    trainer = train("seq-kd", tmp_path, models=(saved_model("qwen3", 0), saved_model("qwen3", 1)))
    assert not hasattr(trainer, "teacher_model")


def test_grpo_trains_and_resumes_bitwise(demo_rows: str, tmp_path: Any) -> None:
    """On the demo, with two mini-batches a rollout, stopped between them."""
    pytest.importorskip("math_verify")
    values = {"per_device_train_batch_size": 16, "num_generations": 4, "rollout_batch_size": 8, "max_steps": 6}
    values |= {"save_strategy": "steps", "save_steps": 3, "resume": "true", "report_to": "none"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    command = ["train", "--config", "demo.yaml", "--method", "grpo", *flags(**values, dataset_name=demo_rows)]
    for folder in (whole, parts):
        assert main([*command, "--output_dir", str(folder)]) == 0
    shutil.rmtree(parts / "checkpoint-6")
    (parts / "model.safetensors").unlink()
    assert main([*command, "--output_dir", str(parts)]) == 0
    assert (weights(whole) == weights(parts)).all()
    assert not (weights(whole) == weights(whole / "checkpoint-3")).all()


def grpo_rows(tmp_path: Any, rows: list[dict[str, Any]], **options: Any) -> Any:
    """What GRPO would train on."""
    pytest.importorskip("math_verify")
    options = {**STEP, "max_length": None, "rollout_batch_size": 6, **options}
    config = METHODS["grpo"].config_class(output_dir=str(tmp_path), **options)
    student, tokenizer = build_model("llama", 0), build_tokenizer()
    trainer = METHODS[config.method](
        student, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    return trainer.train_dataset


def test_grpo_finds_the_answer_in_a_solution(tmp_path: Any) -> None:
    r"""Its last `\boxed{}`, as in MATH, or the whole, as in DAPO-Math-17k-Processed."""
    solutions = [r"\boxed{2}, no, \boxed{\frac{1}{2}}", "34", " -7\n", r"\frac{3}{4}", "0.5", r"$2\sqrt{3}$", "(1, 2)"]
    rows = grpo_rows(tmp_path, [{"prompt": "half of one", "solution": text} for text in solutions])
    assert rows["answer"] == [r"\frac{1}{2}", "34", "-7", r"\frac{3}{4}", "0.5", r"$2\sqrt{3}$", "(1, 2)"]


@pytest.mark.parametrize(
    "solution",
    [
        "Two and three are 5.",  # math-verify finds 5 in it
        "2 + 3 = 5",
        r"2 + 3 \Rightarrow 5",
        "3\n5",
        r"\text{so } 5",
        "",
        None,
    ],
)
def test_grpo_takes_no_worked_solution_for_an_answer(solution: Any, tmp_path: Any) -> None:
    """Its last number needn't be one."""
    rows = [{"prompt": "half of one", "solution": r"\boxed{1}"}] * 7 + [{"prompt": "two", "solution": solution}]
    with pytest.raises(DataError, match="row 7: no answer"):
        grpo_rows(tmp_path, rows)


def test_grpo_grades_by_the_grader(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers needn't be mathematics then, and are in the column that the configuration names."""
    (tmp_path / "grades_by_word.py").write_text("def grade(completion, answer):\n    return answer in completion\n")
    monkeypatch.chdir(tmp_path)
    options = {**STEP, "max_length": None, "rollout_batch_size": 6, "answer_column": "gold"}
    config = METHODS["grpo"].config_class(output_dir="out", grader="grades_by_word:grade", **options)
    rows = [{"prompt": "w1 w2", "gold": "Paris"}] * 8
    trainer = METHODS["grpo"](
        build_model("llama", 0),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=build_tokenizer(),
    )
    assert trainer.train_dataset["answer"] == ["Paris"] * 8
    (reward,) = trainer.reward_funcs
    assert reward(completions=["in Paris", "in Rome"], answer=["Paris", "Paris"], index=[0, 1]) == [1.0, 0.0]


def test_grpo_needs_answers(tmp_path: Any) -> None:
    rows = [{"prompt": "w1", "gold": "1"}] * 8
    with pytest.raises(
        DataError, match=r"answer_column: train_dataset has no column 'answer' or 'solution'; .*'gold'"
    ):
        grpo_rows(tmp_path, rows)


def test_grpo_puts_the_suffix_after_the_question(tmp_path: Any) -> None:
    rows = [{"prompt": prompt, "answer": "1"} for prompt in ("half", "two")] * 4
    prompts = grpo_rows(tmp_path, rows, prompt_suffix="reason")["prompt"]
    assert [p[0]["content"] for p in prompts] == ["half\nreason", "two\nreason"] * 4


def test_grpo_rewards_right_answers() -> None:
    pytest.importorskip("math_verify")
    from tsdkd.methods.grpo_trainer import make_accuracy_reward

    accuracy_reward = make_accuracy_reward(Grader(is_math_equivalent))
    texts = ["so 4 + 3 = 7 . answer 7", r"thus \boxed{\frac{1}{2}}", "answer 8", ""]
    assert accuracy_reward(texts, ["7", "0.5", "7", "7"]) == [1.0, 1.0, 0.0, 0.0]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    assert accuracy_reward(chats, ["7", r"\frac{1}{2}", "7", "7"]) == [1.0, 1.0, 0.0, 0.0]


def test_methods_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in METHODS)
