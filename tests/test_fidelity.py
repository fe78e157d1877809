"""docs/fidelity.md, point by point: where the authors' releases leave their papers, and that we don't."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

import reference
from conftest import QUIET, build_model, build_tokenizer, completions_of, flags, make_rows, policy_scores
from tsdkd.compare.config import comparison_names, read_comparison
from tsdkd.config.options import enum_value
from tsdkd.lm_head.dense import DenseHead
from tsdkd.methods import (
    EOPDConfig,
    KDConfig,
    TSDKDConfig,
    TSDKDReleasedConfig,
    TSDKDReleasedTrainer,
    TSDKDTrainer,
    find_method,
)
from tsdkd.methods.eopd import EOPDObjective
from tsdkd.methods.tsd_kd import TSDKDObjective
from tsdkd.methods.tsd_kd_released import TSDKDReleasedObjective
from tsdkd.objective import CompletionBatch
from tsdkd.run.arguments import parse_args_and_config, parse_arguments, resolve_run_values
from tsdkd.run.presets import preset_names
from tsdkd.run.train import train

VOCABULARY = 30


def draw(lengths: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of student and teacher `[B, T, V]`, of growing sharpness along a response, and the mask of its tokens."""
    make = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths), VOCABULARY)
    student, teacher = (torch.randn(shape, generator=make, dtype=torch.float64) for _ in range(2))
    sharpness = torch.linspace(0.5, 4.0, shape[1], dtype=torch.float64)[:, None]
    return student * sharpness, teacher * 2, torch.arange(shape[1]) < torch.tensor(lengths)[:, None]


def term_gradients(objective: Any, student: Tensor, teacher: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Of each term by the student's logits `[B, T, V]`. The released loss also sees what is masked."""
    released = isinstance(objective, TSDKDReleasedObjective)
    logits = student.clone().requires_grad_()
    asked = torch.ones_like(mask) if released else mask
    head = DenseHead(logits[asked], teacher[asked])
    output = objective(head, completions_of(asked, loss_mask=mask if released else None))
    return {
        name: torch.autograd.grad(term, logits, retain_graph=True)[0]
        for name, term in output.terms.items()
        if term.requires_grad
    }


def touched(gradient: Tensor) -> Tensor:
    """`[B, T]`, the tokens with a gradient."""
    return (gradient != 0).any(-1)


def both(lengths: tuple[int, ...], **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    student, teacher, mask = draw(lengths)
    ours = term_gradients(TSDKDObjective(**options), student, teacher, mask)
    return ours, term_gradients(TSDKDReleasedObjective(), student, teacher, mask), mask


def test_ranking() -> None:
    """Descent raises the teacher's favourite among the student's candidates; the release lowers it."""
    student, teacher, _ = draw((12,))
    ours, theirs, _ = both((12,))
    candidates = student.topk(10, -1).indices
    favourites = candidates.gather(-1, teacher.gather(-1, candidates).argmax(-1, True))
    ours_push, theirs_push = (-g["indirect"].gather(-1, favourites).squeeze(-1) for g in (ours, theirs))
    assert (ours_push[touched(ours["indirect"])] > 0).all()
    assert (theirs_push[touched(theirs["indirect"])] < 0).all()


def test_share_of_the_entropy_term() -> None:
    """A tenth of the tokens, not all but a tenth."""
    ours, theirs, _ = both((20,))
    assert touched(ours["entropy"]).sum() == 2
    assert touched(theirs["entropy"]).sum() == 18


def test_padding_in_the_entropy_term() -> None:
    ours, theirs, mask = both((20, 6))
    assert not touched(ours["entropy"])[~mask].any()
    assert touched(theirs["entropy"])[~mask].any()


def test_opener_of_each_response() -> None:
    """The release counts one opener over the flattened batch, and takes that column of every row, a token short."""
    student, _, _ = draw((40, 40))
    entropies = [[reference.token_entropy(row) for row in response] for response in student.tolist()]
    ours, theirs, _ = both((40, 40))
    openers = [reference.opener_length(values) for values in entropies]
    column = reference.opener_length([value for values in entropies for value in values]) - 1
    assert touched(ours["indirect"]).sum(-1).tolist() == openers
    assert touched(theirs["indirect"]).sum(-1).tolist() == [column, column] != openers


@pytest.mark.parametrize("reduction", ["mean", "sum", "length"])
def test_reduction_of_the_ranking(reduction: str) -> None:
    """Eq. 5's sum is an option; the default is the release's mean, the scale that alpha = 0.1 belongs to."""
    mean, _, _ = both((40,))
    other, _, _ = both((40,), indirect_reduction=reduction)
    opener = touched(mean["indirect"]).sum()
    factor = {"mean": 1.0, "sum": opener, "length": opener / 40}[reduction]
    torch.testing.assert_close(other["indirect"], factor * mean["indirect"])


def test_mean_over_responses() -> None:
    """Eq. 11: a short response weighs as much as a long one; in the release a token weighs as much as a token."""
    ours, theirs, _ = both((20, 5), gate=False)
    student, teacher, mask = draw((20, 5))
    alone = [
        term_gradients(TSDKDObjective(gate=False), student[i : i + 1, :n], teacher[i : i + 1, :n], mask[i : i + 1, :n])
        for i, n in enumerate((20, 5))
    ]
    for i, n in enumerate((20, 5)):
        torch.testing.assert_close(ours["direct"][i, :n], alone[i]["direct"][0])
    norms = [theirs["direct"][i, :5].norm() / ours["direct"][i, :5].norm() for i in (0, 1)]
    assert norms[1] < norms[0] / 2


def made(config: Any, trainer: Any, folder: Any) -> Any:
    options = {**QUIET, "max_steps": 1, "per_device_train_batch_size": 6, "max_new_tokens": 20, "lmbda": 0.0}
    return trainer(
        model=build_model("qwen3", 0),
        teacher_model=build_model("qwen3", 1, rows=80),
        args=config(output_dir=str(folder), **options),
        train_dataset=Dataset.from_list(make_rows(6)),
        processing_class=build_tokenizer(pad_token="<eos>"),
    )


def test_end_of_sequence_is_trained_on(tmp_path: Any) -> None:
    """With pad = eos the release masks it; here lengths decide."""
    shares = {}
    for name, config, kind in (
        ("ours", TSDKDConfig, TSDKDTrainer),
        ("theirs", TSDKDReleasedConfig, TSDKDReleasedTrainer),
    ):
        trainer = made(config, kind, tmp_path / name)
        ((batch,),) = trainer._roll_out(trainer.model, [[next(iter(trainer.get_train_dataloader()))]], 0, "train")
        responses = trainer._completion_batch(batch, "train")
        ends = batch["input_ids"][:, 1:][responses.loss_mask] == 1
        shares[name] = int(ends.sum())
    assert shares == {"ours": 6, "theirs": 0}


def test_the_student_keeps_its_vocabulary(tmp_path: Any) -> None:
    """The release grows it to the teacher's padded size."""
    trainer = made(TSDKDConfig, TSDKDTrainer, tmp_path)
    assert trainer.pair.vocab_sizes == (64, 80) and trainer.pair.shared_vocab_size == 64
    assert trainer.model.get_output_embeddings().weight.shape[0] == 64


def test_completions_may_be_as_long_as_the_paper_says() -> None:
    """TRL's default, which the release leaves as it is, cuts them at 128 tokens."""
    assert TSDKDConfig("out", use_cpu=True, bf16=False).max_new_tokens == 1024
    assert EOPDConfig("out", use_cpu=True, bf16=False).max_new_tokens == 4096


def trained(folder: Any, saved_model: Any, rows_file: str, **options: Any) -> Any:
    """Two steps at the paper's learning rate by `tsdkd train`, and how many updates of each weight were kept."""
    values = {**QUIET, "max_steps": 2, "max_new_tokens": 8, "per_device_train_batch_size": 4, **options}
    pair = {"model_name_or_path": saved_model("qwen3", 0), "teacher_model_name_or_path": saved_model("qwen3", 1)}
    schedule = {"learning_rate": 5e-6, "lr_scheduler_type": "constant"}
    return train(parse_arguments(None, flags(**pair, dataset_name=rows_file, output_dir=folder, **schedule, **values)))


@pytest.mark.parametrize("bf16", [False, True])
def test_the_students_weights_may_be_bfloat16(bf16: bool, saved_model: Any, rows_file: str, tmp_path: Any) -> None:
    """`dtype: bfloat16` is the release's choice: moments too, no float32 copy; a step below half an ulp is lost."""
    start = {name: p.detach() for name, p in build_model("qwen3", 0).named_parameters()}
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        trainer = trained(tmp_path / name, saved_model, rows_file, bf16=bf16, dtype=name)
        assert {p.dtype for p in trainer.model.parameters()} == {dtype}
        moments = [s[key] for s in trainer.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
        assert moments and {moment.dtype for moment in moments} == {dtype}
        # at 2**-8 half an ulp is 2**-16, 1.5e-5: three steps of 5e-6
        large = [(p != start[n].to(dtype))[start[n].abs() > 2**-8] for n, p in trainer.model.named_parameters()]
        moved[dtype] = float(torch.cat(large).float().mean())
        assert all((p != start[n].to(dtype)).any() for n, p in trainer.model.named_parameters() if "q_proj" in n)
    assert moved[torch.float32] > 0.95 and moved[torch.bfloat16] == 0


@pytest.mark.parametrize(("rate", "share", "length"), [(5e-6, 0.078, 0.21), (1e-7, 0.0015, 0.031)])
def test_what_is_left_of_an_update_in_bfloat16(rate: float, share: float, length: float) -> None:
    """The figures of docs/fidelity.md: 600 steps of AdamW on weights of sigma 0.02, each with its own gradient and as
    much noise; how many weights changed, and how far they all got, against float32."""
    make = torch.Generator().manual_seed(0)
    start, drift = 0.02 * torch.randn(50_000, generator=make), torch.randn(50_000, generator=make)
    parameters = [torch.nn.Parameter(start.to(dtype, copy=True)) for dtype in (torch.float32, torch.bfloat16)]
    optimizers = [torch.optim.AdamW([p], lr=rate, weight_decay=0.0, fused=True) for p in parameters]
    for _ in range(600):
        gradient = drift + torch.randn(50_000, generator=make)
        for parameter, optimizer in zip(parameters, optimizers, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
            optimizer.step()
    whole, rounded = (p.detach().float() - start.to(p.dtype).float() for p in parameters)
    assert float((whole != 0).float().mean()) > 0.99
    assert float((rounded != 0).float().mean()) == pytest.approx(share, rel=0.1)
    assert float(rounded.norm() / whole.norm()) == pytest.approx(length, rel=0.1)


@pytest.mark.parametrize("above", [False, True])
def test_trigger_is_strict(above: bool) -> None:
    """Eq. 9: H > tau; at exactly tau forward KL doesn't act."""
    make = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(1, VOCABULARY, generator=make, dtype=torch.float64) for _ in range(2))
    logps = teacher.log_softmax(-1)
    entropy = -(logps.exp() * logps).sum(-1)
    scores = policy_scores(entropy, logps[:, 0], *logps.topk(16), student.log_softmax(-1)[:, 0])
    objective = EOPDObjective(entropy_threshold=float(entropy) - (1e-9 if above else 0.0))
    output = objective(DenseHead(student), CompletionBatch(torch.ones(1, 1).bool(), torch.tensor([0]), scores=scores))
    assert (float(output.terms["forward_kl"]) != 0) == above


# The papers' tables of hyperparameters ------------------------------------------------------------------------------

TSD_KD_TABLE_10 = {"batch": 128, "lr_scheduler_type": "cosine", "temperature": 1.0, "max_length": 1024}
TSD_KD_TABLE_10 |= {"num_train_epochs": 3, "optim": "adamw", "warmup_steps": 0.1, "alpha": 0.1}
TSD_KD_TABLE_10 |= {"indirect_top_k": 10, "opener_ratio": 0.1, "entropy_ratio": 0.1}
EOPD_TABLE_8 = {"learning_rate": 3e-6, "lr_scheduler_type": "cosine", "optim": "adamw", "rollout_batch_size": 128}
EOPD_TABLE_8 |= {
    "batch": 32,
    "temperature": 1.0,
    "max_new_tokens": 4096,
    "forward_kl_top_k": 16,
    "num_train_epochs": 3,
}


@pytest.mark.parametrize(
    "preset, table",
    [
        *(
            (f"qwen25_14b_to_1p5b{kind}.yaml", TSD_KD_TABLE_10 | {"learning_rate": 5e-6})
            for kind in ("", "_adaptive", "_lora", "_offpolicy")
        ),
        ("gemma2_9b_to_2b.yaml", TSD_KD_TABLE_10 | {"learning_rate": 1e-7}),
        ("qwen3_8b_to_1p7b.yaml", TSD_KD_TABLE_10),
        ("eopd_qwen3_8b_to_0p6b_base.yaml", EOPD_TABLE_8 | {"top_p": 1.0}),
        ("eopd_qwen3_8b_to_1p7b_base.yaml", EOPD_TABLE_8 | {"top_p": 1.0}),
        ("eopd_qwen3_8b_to_4b_base.yaml", EOPD_TABLE_8 | {"top_p": 1.0, "num_train_epochs": 2}),  # DAPO
        ("eopd_llama31_8b_to_llama32_3b.yaml", EOPD_TABLE_8 | {"top_p": 0.8}),
    ],
)
def test_hyperparameters_are_the_papers(preset: str, table: dict[str, Any]) -> None:
    """TSD-KD's Table 10, EOPD's Table 8, on the 8 GPUs that the presets are written for."""
    parsed = parse_args_and_config(preset, ["--use_cpu", "true", "--bf16", "false"]).training_args
    found = {name: getattr(parsed, name) for name in table if name not in ("batch", "optim")}
    found |= {"batch": 8 * parsed.per_device_train_batch_size * parsed.gradient_accumulation_steps}
    found |= {"optim": enum_value(parsed.optim).split("_")[0]}
    assert {name: enum_value(value) for name, value in found.items()} == table


@pytest.mark.parametrize("name", ["demo_table3.yaml", "qwen25_table3.yaml"])
def test_rows_of_table_3(name: str) -> None:
    """Gate, L_Indirect, L_EM, as OpenReview's version of the paper marks them: only the first row has no gate."""
    comparison = read_comparison(name)
    tasks = [task for task in comparison.tasks if task.seed == comparison.seeds[0]]
    values = [resolve_run_values(comparison.config, comparison.train_flags(task))[1] for task in tasks]
    rows = [(v["gate"], v["alpha"] > 0, v["entropy_weight"] > 0) for v in values]
    assert rows == [(False,) * 3, (True, False, False), (True, True, False), (True, False, True), (True,) * 3]


RELEASED = "TSD-KD-Qwen2.5-14B-Instruct-Gen"


@pytest.mark.parametrize("name", [*preset_names(), *comparison_names()])
def test_data_of_off_policy_runs_are_the_teachers(name: str) -> None:
    """UltraInteract's own completions are of other models: no shipped run trains on them, a comparison's wait for the
    teacher's."""
    if name in preset_names():
        runs = [resolve_run_values(name, [])]
    else:
        comparison = read_comparison(name)
        tasks = [task for task in comparison.tasks if task.seed == comparison.seeds[0]]
        runs = [resolve_run_values(comparison.config, comparison.train_flags(task)) for task in tasks]
    for method, values, _, _ in runs:
        if find_method(method).config_class.always_needs_completions or values["lmbda"] < 1:
            assert Path(values["dataset_name"]).name in ("teacher_completions.jsonl", RELEASED)


def test_hyperparameters_of_kd() -> None:
    """EOPD's Table 7, on 8 GPUs with the 4 rows a step of the presets."""
    runs = read_comparison("eopd_table2.yaml").runs
    assert isinstance(runs, dict)
    values = {key: value for key, value in runs["KD"].items() if key != "method"}
    config = KDConfig(output_dir="none", use_cpu=True, bf16=False, **values)
    assert (config.learning_rate, config.cross_entropy_weight, config.forward_kl_weight) == (1e-5, 0.5, 0.5)
    assert (config.max_length, config.forward_kl_top_k, config.num_train_epochs) == (4096, 16, 3)
    assert 8 * 4 * config.gradient_accumulation_steps == 128
    assert enum_value(config.lr_scheduler_type) == "cosine" and enum_value(config.optim).startswith("adamw")
