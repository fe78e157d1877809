"""Per-token losses against the float64 loops of `reference.py`, and against the mistakes this field has made."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import reference as ref
from tsdkd import losses, selection

BETAS = (0.0, 1e-3, 0.1, 0.5, 0.9, 1.0)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)

# name -> (library, reference), both (student, teacher) -> one number a position. k = 50 exceeds every vocabulary here.
PAIR_LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[..., float]]] = {
    **{
        f"jsd-{beta}": (partial(losses.generalized_jsd, beta=beta), partial(ref.generalized_jsd, beta=beta))
        for beta in BETAS
    },
    **{
        f"skew-{way}-{skew}": (
            getattr(losses, f"skew_{way}_kl")(skew),
            partial(getattr(ref, f"skew_{way}_kl"), skew=skew),
        )
        for way in ("forward", "reverse")
        for skew in (0.1, 0.9)
    },
    **{
        f"plackett-luce-{k}": (partial(losses.plackett_luce_nll, top_k=k), partial(ref.plackett_luce_nll, top_k=k))
        for k in (1, 2, 4, 50)
    },
    **{
        f"forward-kl-{k}": (partial(losses.topk_forward_kl, top_k=k), partial(ref.topk_forward_kl, top_k=k))
        for k in (1, 4, 50)
    },
    "plackett-luce-default": (losses.plackett_luce_nll, ref.plackett_luce_nll),
    "forward-kl-default": (losses.topk_forward_kl, ref.topk_forward_kl),
    "entropy": (lambda student, teacher: losses.token_entropy(student), lambda student, _: ref.token_entropy(student)),
}
every_pair_loss = pytest.mark.parametrize("name", PAIR_LOSSES)
every_half = pytest.mark.parametrize("dtype", HALVES, ids=str)


def draw(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Logits without ties: distinct multiples of 1/8, exact in every dtype, plus a jitter where the dtype has room."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(shape, generator=generator, dtype=torch.float64).argsort(-1).double()
    grid = (order - shape[-1] // 2) / 8
    return (grid if dtype in HALVES else grid + 0.02 * torch.rand(shape, generator=generator).double()).to(dtype)


def per_position(function: Callable[..., float], *logits: Tensor) -> Tensor:
    """`function` of each position's rows, in float64, from the very numbers that the library was given."""
    rows = [tensor.detach().double().reshape(-1, tensor.shape[-1]).tolist() for tensor in logits]
    values = [function(*position) for position in zip(*rows, strict=True)]
    return torch.tensor(values, dtype=torch.float64).reshape(logits[0].shape[:-1])


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def tolerance_for(dtype: torch.dtype) -> float:
    return 1e-11 if dtype == torch.float64 else 2e-5  # half inputs are computed in float32


def one_hot_logits(vocabulary: int, index: int, height: float) -> Tensor:
    return height * F.one_hot(torch.tensor(index), vocabulary).double()


# Values --------------------------------------------------------------------------------------------------------------


@every_pair_loss
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(23,), (5, 23), (2, 3, 23), (2, 2, 2, 7), (3, 1), (4, 2)], ids=str)
def test_values(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    library, reference = PAIR_LOSSES[name]
    student, teacher = draw(shape, 1, dtype), draw(shape, 2, dtype)
    before = student.clone(), teacher.clone()
    value = library(student, teacher)
    assert value.shape == shape[:-1]
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_near(value, per_position(reference, student, teacher), tolerance_for(dtype))
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1]), "inputs must not change"


@every_pair_loss
def test_values_of_a_larger_vocabulary_and_of_strided_inputs(name: str) -> None:
    library, reference = PAIR_LOSSES[name]
    student, teacher = draw((2, 3001), 3, torch.float32) / 20, draw((2, 3001), 4, torch.float32) / 20
    assert_near(library(student, teacher), per_position(reference, student, teacher), 1e-4)
    student, teacher = draw((4, 5, 9), 5).transpose(0, 1), draw((5, 4, 18), 6)[..., ::2]
    assert_near(library(student, teacher), per_position(reference, student, teacher), 1e-11)


@every_pair_loss
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)], ids=str)
def test_no_positions(name: str, shape: tuple[int, ...]) -> None:
    student = torch.zeros(shape, requires_grad=True)
    value = PAIR_LOSSES[name][0](student, torch.zeros(shape))
    assert value.shape == shape[:-1]
    value.sum().backward()  # a batch without tokens still needs a graph: DDP waits for every parameter's gradient
    assert student.grad is not None


EXTREMES: dict[str, tuple[Tensor, Tensor]] = {
    "same token": (one_hot_logits(8, 3, 1e4), one_hot_logits(8, 3, 1e4)),
    "other token": (one_hot_logits(8, 3, 1e4), one_hot_logits(8, 5, 1e4)),
    "sure student": (one_hot_logits(8, 3, 1e4), torch.zeros(8, dtype=torch.float64)),
    "sure teacher": (torch.zeros(8, dtype=torch.float64), one_hot_logits(8, 3, 1e4)),
    "both signs": (1e4 * torch.tensor([1.0, -1, 1, -1, 1, -1, 1, -1]), 1e4 * torch.tensor([1.0, 1, -1, -1] * 2)),
    "low": (torch.arange(8.0) - 1e4, -torch.arange(8.0) - 1e4),
    "high": (torch.arange(8.0) * 8 + 1e4, -torch.arange(8.0) * 8 + 1e4),
}


def has_one_answer(name: str, dtype: torch.dtype, case: str) -> bool:
    """Which of two equal logits at the edge of the top k belongs to it is nobody's rule."""
    cuts = name in ("plackett-luce-2", "plackett-luce-4", "forward-kl-4", "forward-kl-1")
    distinct = case in ("low", "high") and dtype not in HALVES  # at 1e4 the half dtypes merge neighbours
    return distinct or not cuts


@pytest.mark.parametrize(
    ("name", "dtype", "case"),
    [one for one in itertools.product(PAIR_LOSSES, DTYPES, EXTREMES) if has_one_answer(*one)],
    ids=str,
)
def test_extreme_logits_are_exact_and_have_finite_gradients(name: str, dtype: torch.dtype, case: str) -> None:
    library, reference = PAIR_LOSSES[name]
    student, teacher = (logits.to(dtype, copy=True) for logits in EXTREMES[case])
    student.requires_grad_()
    value = library(student, teacher)
    assert_near(value, per_position(reference, student, teacher), tolerance_for(dtype))
    value.backward()
    assert student.grad is not None and student.grad.isfinite().all()


@pytest.mark.parametrize("offset", [-1e3, 1e3])
@every_pair_loss
def test_a_constant_added_to_all_logits_changes_nothing(name: str, offset: float) -> None:
    library = PAIR_LOSSES[name][0]
    student, teacher = draw((4, 11), 7), draw((4, 11), 8)
    assert_near(library(student + offset, teacher - offset), library(student, teacher), 1e-10)


# Closed forms, so that the reference itself is not taken on trust ----------------------------------------------------


def test_closed_forms() -> None:
    flat, here, there = torch.zeros(12).double(), one_hot_logits(12, 0, 1e3), one_hot_logits(12, 1, 1e3)
    assert losses.token_entropy(flat).item() == pytest.approx(math.log(12))
    assert losses.token_entropy(here).item() == 0.0
    for beta in (1e-3, 0.1, 0.5, 0.9):  # disjoint supports: JSD is the entropy of the mixture's coin, 0.325 at 0.9
        coin = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        assert losses.generalized_jsd(here, there, beta).item() == pytest.approx(coin)
    assert losses.generalized_jsd(flat, here, 0.0).item() == pytest.approx(math.log(12))  # KL(P || Q), P is sure
    assert losses.generalized_jsd(here, flat, 1.0).item() == pytest.approx(math.log(12))  # KL(Q || P), Q is sure
    assert losses.plackett_luce_nll(flat, flat, 5).item() == pytest.approx(math.log(math.factorial(5)))
    assert losses.topk_forward_kl(flat, flat, 4).item() == pytest.approx(math.log(12 / 4))


# Gradients -----------------------------------------------------------------------------------------------------------


@every_pair_loss
@pytest.mark.parametrize("shape", [(7,), (2, 3, 7)], ids=str)
def test_gradients(name: str, shape: tuple[int, ...]) -> None:
    library, reference = PAIR_LOSSES[name]
    student, teacher = draw(shape, 9).requires_grad_(), draw(shape, 10).requires_grad_()
    weights = torch.linspace(-1.0, 2.0, math.prod(shape[:-1]), dtype=torch.float64).reshape(shape[:-1])
    (weights * library(student, teacher)).sum().backward()
    expected = [
        [float(weight) * slope for slope in ref.central_difference(partial(swapped, reference, fixed), row)]
        for weight, row, fixed in zip(
            weights.reshape(-1), student.reshape(-1, 7).tolist(), teacher.reshape(-1, 7).tolist(), strict=True
        )
    ]
    assert student.grad is not None
    assert_near(student.grad, torch.tensor(expected, dtype=torch.float64).reshape(shape), 1e-8)
    assert teacher.grad is None, "the teacher must never receive a gradient"


def swapped(function: Callable[..., float], teacher: list[float], student: list[float]) -> float:
    return function(student, teacher)


@every_pair_loss
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_gradients_in_lower_precision(name: str, dtype: torch.dtype) -> None:
    library = PAIR_LOSSES[name][0]
    student, teacher = draw((3, 9), 11, dtype).requires_grad_(), draw((3, 9), 12, dtype)
    exact = student.detach().double().requires_grad_()
    library(student, teacher).sum().backward()
    library(exact, teacher.double()).sum().backward()
    assert student.grad is not None and exact.grad is not None and student.grad.dtype == dtype
    assert_near(student.grad, exact.grad, {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype])


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 1.0])
def test_gradcheck(beta: float) -> None:
    inputs = (draw((2, 5), 13).requires_grad_(), draw((2, 5), 14))
    assert torch.autograd.gradcheck(lambda s, t: losses.generalized_jsd(s, t, beta), inputs)
    assert torch.autograd.gradcheck(lambda s, t: losses.plackett_luce_nll(s, t, 3), inputs)
    assert torch.autograd.gradcheck(lambda s, t: losses.topk_forward_kl(s, t, 3), inputs)


# Vocabularies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher_vocabulary", [1, 7, 9])  # 1 would broadcast without a word
@pytest.mark.parametrize("loss", [partial(losses.generalized_jsd, beta=0.9), losses.plackett_luce_nll,
                                  losses.topk_forward_kl])  # fmt: skip
def test_different_vocabularies_are_refused(loss: Callable[..., Tensor], teacher_vocabulary: int) -> None:
    with pytest.raises(ValueError):
        loss(torch.zeros(2, 8), torch.zeros(2, teacher_vocabulary))


# Entropy -------------------------------------------------------------------------------------------------------------


@every_half
def test_half_precision_entropy_keeps_its_digits(dtype: torch.dtype) -> None:
    logits = (draw((151936,), 15, torch.float32) / 10000).to(dtype)  # the size of Qwen's vocabulary, nearly uniform
    exact = torch.distributions.Categorical(logits=logits.double()).entropy()
    logp = logits.log_softmax(-1)
    naive = -(logp.exp() * logp).sum(-1)
    assert not abs(naive.double() - exact) < 1e-3  # 0.03 off in bfloat16, NaN in float16
    assert_near(losses.token_entropy(logits), exact, 1e-5)


def test_entropy_of_a_sure_student_is_zero_not_nan() -> None:
    logits = one_hot_logits(6, 2, 1e4).requires_grad_()
    probability = logits.softmax(-1)
    naive = -(probability * probability.log()).sum()
    assert naive.isnan()
    losses.token_entropy(logits).backward()
    assert losses.token_entropy(logits).item() == 0.0
    assert logits.grad is not None and (logits.grad == 0).all()


# JSD -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", BETAS)
def test_jsd_is_a_divergence_and_mirrors(beta: float) -> None:
    student, teacher = draw((6, 9), 16), draw((6, 9), 17)
    value = losses.generalized_jsd(student, teacher, beta)
    assert (value > 0).all()
    assert_near(losses.generalized_jsd(teacher, student, 1.0 - beta), value, 1e-12)
    assert_near(losses.generalized_jsd(student, student, beta), torch.zeros(6), 1e-12)


@pytest.mark.parametrize(("end", "beta", "scale"), [(0.0, 1e-6, 1e-6), (1.0, 1.0 - 1e-6, 1e-6)])
def test_jsd_at_its_ends_is_the_limit_of_the_gradient(end: float, beta: float, scale: float) -> None:
    student, teacher = draw((6, 9), 18).requires_grad_(), draw((6, 9), 19)
    (at_end,) = torch.autograd.grad(losses.generalized_jsd(student, teacher, end).sum(), student)
    (nearby,) = torch.autograd.grad(losses.generalized_jsd(student, teacher, beta).sum(), student)
    assert_near(nearby / scale, at_end, 1e-4)

    p, q = teacher.softmax(-1), student.softmax(-1)  # the naive version puts the end into Eq. 1: zero, no gradient
    m = end * p + (1 - end) * q
    naive = (end * p * (p / m).log() + (1 - end) * q * (q / m).log()).sum()
    assert torch.autograd.grad(naive, student)[0].abs().max() < 1e-12 < at_end.abs().max()


def test_jsd_weights_are_not_exchanged() -> None:
    student, teacher = 6 * draw((6, 9), 20), draw((6, 9), 21)
    value = losses.generalized_jsd(student, teacher, 0.9)
    assert (value - losses.generalized_jsd(student, teacher, 0.1)).abs().max() > 0.02
    assert (value - losses.generalized_jsd(teacher, student, 0.9)).abs().max() > 0.02


# Plackett-Luce -------------------------------------------------------------------------------------------------------


def prefix_nll(student: Tensor, teacher: Tensor, top_k: int) -> Tensor:
    """The reversed ranking: the denominator holds the items already placed, so the best item goes last."""
    candidates, ids = student.topk(min(top_k, student.shape[-1]), -1)
    scores = candidates.gather(-1, teacher.gather(-1, ids).argsort(-1, descending=True))
    return (scores.logcumsumexp(-1) - scores).sum(-1)


def test_plackett_luce_prefers_the_teachers_order_and_not_its_reverse() -> None:
    student, teacher = torch.tensor([3.0, 2.0, 1.0, 0.0]), torch.tensor([0.4, 0.3, 0.2, 0.1])
    assert losses.plackett_luce_nll(student, teacher) < losses.plackett_luce_nll(student, -teacher)
    assert prefix_nll(student, teacher, 4) > prefix_nll(student, -teacher, 4)
    assert losses.plackett_luce_nll(student, teacher) != prefix_nll(student, teacher, 4)


@pytest.mark.parametrize(("loss", "learns_the_order"), [(losses.plackett_luce_nll, True), (prefix_nll, False)])
def test_plackett_luce_teaches_the_order(loss: Callable[..., Tensor], learns_the_order: bool) -> None:
    teacher = torch.tensor([0.1, 0.7, 0.3, 0.9, 0.5]).double()
    student = draw((5,), 22).requires_grad_()
    for _ in range(100):
        (slope,) = torch.autograd.grad(loss(student, teacher, 5), student)
        student = (student - slope).detach().requires_grad_()
    assert torch.equal(student.argsort(), (teacher if learns_the_order else -teacher).argsort())


def test_plackett_luce_is_a_distribution_over_rankings() -> None:
    student = draw((4,), 23)
    rankings = torch.tensor(list(itertools.permutations(range(4)))).double()
    probability = (-losses.plackett_luce_nll(student.expand(24, 4), rankings, 4)).exp()
    assert probability.sum().item() == pytest.approx(1.0)


def test_plackett_luce_gathers_the_order_and_not_the_ranks() -> None:
    """argsort of argsort is the inverse permutation: equal to the order for two items, not for three."""
    student, teacher = torch.tensor([2.0, 1.0, 0.0]).double(), torch.tensor([2.0, 3.0, 1.0]).double()
    cycle = torch.tensor([1.0, 3.0, 2.0]).double()
    for target in (teacher, cycle):
        expected = ref.plackett_luce_nll(student.tolist(), target.tolist())
        assert losses.plackett_luce_nll(student, target).item() == pytest.approx(expected, abs=1e-12)
    scores = student[cycle.argsort(descending=True).argsort()]
    naive = sum((scores[j:].logsumexp(0) - scores[j]).item() for j in range(3))
    assert abs(naive - ref.plackett_luce_nll(student.tolist(), cycle.tolist())) > 0.1


def test_plackett_luce_candidates_are_the_students() -> None:
    student, teacher = torch.tensor([5.0, 4.0, 0.0, -1.0]).double(), torch.tensor([0.0, 1.0, 9.0, 8.0]).double()
    value = losses.plackett_luce_nll(student, teacher, 2)  # ids 0 and 1, the teacher prefers 1
    assert value.item() == pytest.approx(math.log(1.0 + math.e))
    of_teacher = math.log(1.0 + math.exp(-1.0))  # ids 2 and 3 would give this
    assert abs(value.item() - of_teacher) > 0.5


def test_plackett_luce_gradient_stays_within_the_candidates() -> None:
    student, teacher = draw((5, 20), 24).requires_grad_(), draw((5, 20), 25)
    losses.plackett_luce_nll(student, teacher, 6).sum().backward()
    outside = torch.ones(5, 20).scatter(-1, student.topk(6, -1).indices, 0.0).bool()
    assert student.grad is not None and (student.grad[outside] == 0).all() and (student.grad[~outside] != 0).all()
    assert_near(student.grad.sum(-1), torch.zeros(5), 1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plackett_luce_ties_keep_the_students_order(dtype: torch.dtype) -> None:
    student = draw((64, 40), 26, dtype)
    best_first = student.double().sort(-1, descending=True).values
    for top_k in (10, 40):  # long rows: an unstable sort keeps short ones in order by luck
        scores = best_first[:, :top_k]
        expected = (scores.flip(-1).logcumsumexp(-1).flip(-1) - scores).sum(-1)
        assert_near(losses.plackett_luce_nll(student, torch.zeros_like(student), top_k), expected, 2e-5)
    coarse = draw((64, 40), 27).mul(0.5).round().to(dtype)  # some ties
    expected = per_position(partial(ref.plackett_luce_nll, top_k=40), student, coarse)
    assert_near(losses.plackett_luce_nll(student, coarse, 40), expected, 2e-5)


def test_plackett_luce_k_beyond_the_vocabulary_and_k_of_one() -> None:
    student, teacher = draw((3, 6), 28).requires_grad_(), draw((3, 6), 29)
    assert torch.equal(losses.plackett_luce_nll(student, teacher, 100), losses.plackett_luce_nll(student, teacher, 6))
    single = losses.plackett_luce_nll(student, teacher, 1)
    assert torch.equal(single, torch.zeros(3).double())
    single.sum().backward()
    assert student.grad is not None and (student.grad == 0).all()


# Clipped reverse KL --------------------------------------------------------------------------------------------------

OLD = -1.5
CLIP_CASES = [  # (log-ratio, advantage, gradient with respect to log Q in units of -r A)
    (0.00, 0.7, 1.0),
    (0.00, -0.7, 1.0),
    (0.10, 0.7, 1.0),
    (0.10, -0.7, 1.0),
    (0.50, 0.7, 0.0),  # good token, already pushed up enough: clipped
    (0.50, -0.7, 1.0),  # bad token that was pushed up: must still come down
    (-0.50, 0.7, 1.0),
    (-0.50, -0.7, 0.0),
    (-5.00, 3.0, 1.0),
    (5.00, -3.0, 1.0),
    (0.30, 0.0, 0.0),
]


@pytest.mark.parametrize(("log_ratio", "advantage", "slope"), CLIP_CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_clipped_reverse_kl(log_ratio: float, advantage: float, slope: float, dtype: torch.dtype) -> None:
    values = (OLD + log_ratio, OLD, OLD + advantage)
    logps, old_logps, teacher_logps = (torch.tensor(v, dtype=dtype, requires_grad=True) for v in values)
    value = losses.clipped_reverse_kl(logps, old_logps, teacher_logps)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert value.dtype == dtype
    assert value.item() == pytest.approx(ref.clipped_reverse_kl(*values), rel=tolerance, abs=tolerance)
    value.backward()
    assert logps.grad is not None and old_logps.grad is None and teacher_logps.grad is None
    expected = -slope * math.exp(log_ratio) * advantage
    assert logps.grad.item() == pytest.approx(expected, rel=tolerance, abs=tolerance)
    (difference,) = ref.central_difference(lambda x: ref.clipped_reverse_kl(x[0], *values[1:]), values[:1])
    assert expected == pytest.approx(difference, abs=1e-7)


@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (2, 0), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.2, 0.5])
def test_clipped_reverse_kl_shapes_and_epsilons(shape: tuple[int, ...], epsilon: float) -> None:
    generator = torch.Generator().manual_seed(30)
    logps, old, teacher = (-3 * torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    value = losses.clipped_reverse_kl(logps, old, teacher, epsilon)
    rows = zip(logps.reshape(-1).tolist(), old.reshape(-1).tolist(), teacher.reshape(-1).tolist(), strict=True)
    expected = torch.tensor([ref.clipped_reverse_kl(*row, epsilon) for row in rows], dtype=torch.float64)
    assert_near(value, expected.reshape(shape), 1e-12)


@every_half
def test_clipped_reverse_kl_of_half_inputs_is_float32(dtype: torch.dtype) -> None:
    old = torch.linspace(-4.0, -0.5, 20).to(dtype)
    logps, teacher = old + torch.linspace(-0.1, 0.1, 20).to(dtype), (old.float().sin() - 1.0).to(dtype)
    value = losses.clipped_reverse_kl(logps, old, teacher)
    rows = zip(logps.tolist(), old.tolist(), teacher.tolist(), strict=True)
    assert value.dtype == torch.float32
    assert_near(value, torch.tensor([ref.clipped_reverse_kl(*row) for row in rows]), 1e-6)
    ratio, advantage = (logps - old).exp(), teacher - old
    naive = torch.maximum(-ratio * advantage, -ratio.clamp(0.8, 1.2) * advantage)
    assert (naive - value).abs().max() > 1e-4


def test_clipped_reverse_kl_first_step_is_the_policy_gradient() -> None:
    """At r = 1 the loss is -A, and its gradient -A: the sampled estimate of the reverse KL's, with nothing clipped."""
    logps = (-3 * torch.rand(50, generator=torch.Generator().manual_seed(31))).double().requires_grad_()
    teacher = torch.linspace(-5.0, 0.0, 50, dtype=torch.float64)
    losses.clipped_reverse_kl(logps, logps.detach(), teacher).sum().backward()
    assert logps.grad is not None
    assert_near(logps.grad, (logps - teacher).detach(), 1e-12)


@pytest.mark.parametrize("advantage", [0.7, -0.7])
def test_clipped_reverse_kl_is_neither_the_minimum_nor_the_bare_clip(advantage: float) -> None:
    log_ratio = torch.tensor([-0.5, 0.5]).double()
    value = losses.clipped_reverse_kl(OLD + log_ratio, torch.full((2,), OLD), torch.full((2,), OLD + advantage))
    ratio = log_ratio.exp()
    unclipped, clipped = -ratio * advantage, -ratio.clamp(0.8, 1.2) * advantage
    assert (value - torch.minimum(unclipped, clipped)).abs().max() > 0.05
    assert (value - clipped).abs().max() > 0.05
    assert (value - unclipped).abs().max() > 0.05


# Top-k forward KL ----------------------------------------------------------------------------------------------------


def test_topk_forward_kl_renormalises_the_teacher_alone() -> None:
    student, teacher = draw((5, 20), 32), draw((5, 20), 33)
    value = losses.topk_forward_kl(student, teacher, 4)
    ids = teacher.topk(4, -1).indices
    p, log_q = teacher.softmax(-1).gather(-1, ids), student.log_softmax(-1).gather(-1, ids)
    renormalised = p / p.sum(-1, keepdim=True)
    own = student.topk(4, -1)
    own_p = teacher.gather(-1, own.indices).softmax(-1)
    of_student = (own_p * (own_p.log() - student.log_softmax(-1).gather(-1, own.indices))).sum(-1)
    naive = {
        "student renormalised too": (renormalised * (renormalised.log() - log_q.log_softmax(-1))).sum(-1),
        "teacher not renormalised": (p * (p.log() - log_q)).sum(-1),
        "the student's ids": of_student,
    }
    for name, wrong in naive.items():
        assert (value - wrong).abs().max() > 1e-2, name
    assert_near(value, (renormalised * (renormalised.log() - log_q)).sum(-1), 1e-12)


def test_topk_forward_kl_gradient_pulls_mass_out_of_the_tail() -> None:
    """The gradient is Q - p~ over the whole vocabulary; a student renormalised on S would leave its tail alone."""
    student, teacher = draw((5, 20), 34).requires_grad_(), draw((5, 20), 35)
    losses.topk_forward_kl(student, teacher, 4).sum().backward()
    top = teacher.topk(4, -1)
    target = torch.zeros(5, 20).double().scatter(-1, top.indices, top.values.softmax(-1))
    assert student.grad is not None
    assert_near(student.grad, student.detach().softmax(-1) - target, 1e-12)


def test_topk_forward_kl_of_everything_is_the_forward_kl() -> None:
    student, teacher = draw((5, 20), 36), draw((5, 20), 37)
    full = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    assert_near(losses.topk_forward_kl(student, teacher, 20), full, 1e-12)
    assert_near(losses.topk_forward_kl(student, teacher, 1000), full, 1e-12)
    assert_near(losses.generalized_jsd(student, teacher, 0.0), full, 1e-12)


# The objectives, put together from the library's pieces --------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "length"])
@pytest.mark.parametrize("gate", [True, False])
def test_equation_13_and_its_gradient(reduction: str, gate: bool) -> None:
    lengths = [6, 1, 0, 4]
    student, teacher = draw((4, 6, 5), 38).requires_grad_(), draw((4, 6, 5), 39)
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    entropy, teacher_entropy = losses.token_entropy(student), losses.token_entropy(teacher)
    opener = selection.opener_mask(entropy, mask, 0.3)
    weights = selection.entropy_gap_gate(entropy, teacher_entropy, 0.7) if gate else torch.ones(4, 6)
    of_length = mask.sum(-1).clamp(min=1)
    by = {"mean": opener.sum(-1).clamp(min=1), "sum": torch.ones(4), "length": of_length}[reduction]
    top = selection.top_entropy_mask(entropy, mask, 0.4)
    per_response = (
        0.1 * (losses.plackett_luce_nll(student, teacher, 3) * opener).sum(-1) / by
        + (weights * losses.generalized_jsd(student, teacher, 0.9) * mask).sum(-1) / of_length
        + 0.5 * (entropy * top).sum(-1) / top.sum(-1).clamp(min=1)
    )
    loss = per_response.sum() / 3  # three responses have tokens
    loss.backward()

    reference = partial(
        ref.tsd_kd_loss,
        alpha=0.1,
        beta=0.9,
        top_k=3,
        opener_ratio=0.3,
        gate=gate,
        gate_temperature=0.7,
        entropy_weight=0.5,
        entropy_ratio=0.4,
        indirect_reduction=reduction,
    )
    fixed = student.tolist()
    expected = reference(fixed, teacher.tolist(), lengths)
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-12)

    def probe(flat: list[float]) -> float:
        moved = torch.tensor(flat, dtype=torch.float64).reshape(4, 6, 5).tolist()
        return reference(moved, teacher.tolist(), lengths, constant_logits=fixed)["loss"]

    slopes = ref.central_difference(probe, student.reshape(-1).tolist())
    assert student.grad is not None
    assert_near(student.grad, torch.tensor(slopes, dtype=torch.float64).reshape(4, 6, 5), 1e-8)


@pytest.mark.parametrize("placement", ["entropy", "all", "none"])
@pytest.mark.parametrize(("bonus", "shaping"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.1)])
def test_eopd_token_mean_and_its_gradient(placement: str, bonus: float, shaping: float) -> None:
    lengths = [4, 0, 2]
    student, old, teacher = (
        draw((3, 4, 5), 40).requires_grad_(),
        draw((3, 4, 5), 41),
        draw((3, 4, 5), 42) * torch.tensor([2.0, 16.0, 4.0, 1.0])[:, None],
    )
    tokens = torch.randint(5, (3, 4), generator=torch.Generator().manual_seed(43))
    logps, old_logps, teacher_logps = (
        logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1) for logits in (student, old, teacher)
    )
    entropy, teacher_entropy = losses.token_entropy(student), losses.token_entropy(teacher)
    advantage = teacher_logps - old_logps
    shaped = torch.minimum(shaping * entropy.detach(), advantage.abs() / 2)
    placed = {"entropy": teacher_entropy > 0.8, "all": torch.ones(3, 4), "none": torch.zeros(3, 4)}[placement]
    per_token = (
        losses.clipped_reverse_kl(logps, old_logps, teacher_logps + shaped)
        + placed * losses.topk_forward_kl(student, teacher, 3)
        - bonus * entropy
    )
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    assert (teacher_entropy > 0.8)[mask].unique().numel() == 2, "the trigger must be on for some tokens, off for some"
    loss = per_token[mask].sum() / 6
    loss.backward()

    reference = partial(ref.eopd_loss, top_k=3, placement=placement, entropy_bonus=bonus, advantage_shaping=shaping)
    fixed = student.tolist()

    def probe(flat: list[float]) -> float:
        moved = torch.tensor(flat, dtype=torch.float64).reshape(3, 4, 5).tolist()
        arguments = (teacher.tolist(), tokens.tolist(), old_logps.tolist(), lengths)
        return reference(moved, *arguments, constant_logits=fixed)["loss"]

    flat = student.reshape(-1).tolist()
    assert loss.item() == pytest.approx(probe(flat), abs=1e-12)
    assert student.grad is not None
    slopes = torch.tensor(ref.central_difference(probe, flat), dtype=torch.float64)
    assert_near(student.grad, slopes.reshape(3, 4, 5), 1e-8)
