"""The controls of TSD-KD's claims: the same number of tokens, other ones; another ranking. Against float64 loops."""

import math

import pytest
import torch
from torch import Tensor

import reference as ref
from conftest import completions_of
from tsdkd.lm_head.dense import DenseHead
from tsdkd.lm_head.fused import FusedHead
from tsdkd.lm_head.projection import Projection
from tsdkd.methods.tsd_kd import TSDKDObjective
from tsdkd.objective import CompletionBatch, ObjectiveOutput
from tsdkd.reproduce.controls import TSDKDControlObjective

LENGTHS, VOCABULARY = (9, 4, 30), 23
MASK = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(-1)


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


STUDENT, TEACHER = (draw((sum(LENGTHS), VOCABULARY), seed) for seed in (1, 2))
IDS = torch.multinomial(STUDENT.softmax(-1), 1, generator=torch.Generator().manual_seed(3))[:, 0]


def completions(ids: Tensor = IDS) -> CompletionBatch:
    return completions_of(MASK, ids=ids)


def evaluate(objective: TSDKDObjective, ids: Tensor = IDS) -> ObjectiveOutput:
    return objective(DenseHead(STUDENT, TEACHER), completions(ids))


def rows(x: Tensor) -> list[list[list[float]]]:
    return [part.tolist() for part in x.split(LENGTHS)]


def test_the_defaults_are_tsd_kd() -> None:
    found, expected = evaluate(TSDKDControlObjective()), evaluate(TSDKDObjective())
    assert {n: x.item() for n, x in found.terms.items()} == {n: x.item() for n, x in expected.terms.items()}


def test_the_last_tokens_are_ranked() -> None:
    found = evaluate(TSDKDControlObjective(ranked_tokens="last")).terms["indirect"].item()
    expected = 0.0
    for student, teacher in zip(rows(STUDENT), rows(TEACHER), strict=True):
        count = ref.opener_length([ref.token_entropy(row) for row in student])
        last = list(zip(student, teacher, strict=True))[-count:]
        expected += math.fsum(ref.plackett_luce_nll(*pair) for pair in last) / count
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("option", "select"), [("ranked_tokens", "select_for_ranking"), ("entropy_tokens", "select_for_entropy")]
)
def test_random_tokens_are_as_many_and_depend_on_the_completions_alone(option: str, select: str) -> None:
    def selected(objective: TSDKDObjective, ids: Tensor = IDS) -> Tensor:
        batch = completions(ids)
        statistics = DenseHead(STUDENT, TEACHER)(objective.request(batch))
        entropy = batch.scatter(statistics.entropy)
        between = (statistics,) if select == "select_for_ranking" else ()
        return getattr(objective, select)(entropy, *between, batch)

    control = TSDKDControlObjective(**{option: "random"})
    own, random = selected(TSDKDObjective()), selected(control)
    assert random.sum(-1).tolist() == own.sum(-1).tolist()
    assert not (random & ~MASK).any() and not torch.equal(random, own)
    assert torch.equal(random, selected(TSDKDControlObjective(**{option: "random"})))
    others = [torch.randint(VOCABULARY, IDS.shape, generator=torch.Generator().manual_seed(i)) for i in range(500)]
    share = torch.stack([selected(control, ids) for ids in others]).double().mean(0)[MASK]
    expected = torch.repeat_interleave(own.sum(-1) / torch.tensor(LENGTHS), torch.tensor(LENGTHS))
    assert (share - expected).abs().max() < 0.1  # no token is left out, and none is preferred; five sigma


def test_the_reversed_ranking_is_the_likelihood_of_the_reversed_order() -> None:
    found = evaluate(TSDKDControlObjective(ranking="reversed")).terms["indirect"].item()
    expected = 0.0
    for student, teacher in zip(rows(STUDENT), rows(TEACHER), strict=True):
        count = ref.opener_length([ref.token_entropy(row) for row in student])
        for row, of_teacher in zip(student[:count], teacher[:count], strict=True):
            worst_first = [row[v] for v in reversed(ref.teacher_ranking(row, of_teacher, 10))]
            expected += math.fsum(ref.logsumexp(worst_first[j:]) - worst_first[j] for j in range(10)) / count
    assert found == pytest.approx(expected, rel=1e-12)


def test_improbable_tokens_have_an_advantage_of_minus_one() -> None:
    """Values, and gradients on both heads; the default is a tenth."""
    objective = TSDKDControlObjective(ranking="improbable", improbable_below=0.05)
    expected = 0.0
    for student, ids in zip(rows(STUDENT), IDS.split(LENGTHS), strict=True):
        logps = [row[i] - ref.logsumexp(row) for row, i in zip(student, ids.tolist(), strict=True)]
        assert any(logp < math.log(0.05) for logp in logps) and any(logp > math.log(0.05) for logp in logps)
        expected += math.fsum(logp for logp in logps if logp < math.log(0.05)) / len(logps)
    identity, gradients = Projection(torch.eye(VOCABULARY, dtype=torch.float64)), []
    for fused in (False, True):
        student = STUDENT.clone().requires_grad_()
        head = FusedHead(student, identity, TEACHER, identity) if fused else DenseHead(student, TEACHER)
        term = objective(head, completions()).terms["indirect"]
        assert term.item() == pytest.approx(expected, rel=1e-12)
        gradients.append(torch.autograd.grad(term, student)[0])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    is_improbable = STUDENT.log_softmax(-1)[torch.arange(len(IDS)), IDS] < math.log(0.05)
    assert torch.equal(gradients[0].abs().sum(-1) > 0, is_improbable)
