"""Which tokens a method acts on, against the loops of `reference.py`, and against the mistakes this field has made."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import reference as ref
from tsdkd import selection

RATIOS = (1e-6, 0.05, 0.1, 0.15, 0.2, 0.5, 0.9, 1.0)


def draw_entropies(shape: Sequence[int], seed: int) -> Tensor:
    """Multiples of 1/256, whose sums float32 holds exactly, so that a disagreement is a mistake and not rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 1500, tuple(shape), generator=generator) / 256


def draw_masks(length: int, seed: int) -> Tensor:
    """Responses as trainers meet them: whole, padded left or right, with holes, one token, none."""
    holes = torch.rand(length, generator=torch.Generator().manual_seed(seed)) < 0.4
    t = torch.arange(length)
    masks = [t >= 0, t < length // 2, t >= length // 3, (t > 2) & (t < 9), holes, t == 5, t == length - 1, t < 0]
    return torch.stack(masks)


def valid_rows(entropies: Tensor, mask: Tensor) -> list[list[float]]:
    return [row[keep].double().tolist() for row, keep in zip(entropies, mask, strict=True)]


def at(mask: Tensor, picks: list[list[int]]) -> Tensor:
    """The mask whose row i holds the `picks[i]`-th valid tokens of that row."""
    expected = torch.zeros_like(mask)
    for i, chosen in enumerate(picks):
        expected[i, mask[i].nonzero().flatten()[chosen]] = True
    return expected


def expected_opener(entropies: Tensor, mask: Tensor, ratios: list[float]) -> Tensor:
    rows = zip(valid_rows(entropies, mask), ratios, strict=True)
    return at(mask, [list(range(ref.opener_length(row, ratio))) for row, ratio in rows])


def expected_top(entropies: Tensor, mask: Tensor, ratio: float) -> Tensor:
    return at(mask, [ref.top_entropy_positions(row, ratio) if row else [] for row in valid_rows(entropies, mask)])


def whole(entropies: Tensor) -> Tensor:
    return torch.ones(entropies.shape, dtype=torch.bool)


# Opener --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opener(ratio: float, seed: int, dtype: torch.dtype) -> None:
    mask = draw_masks(41, seed)
    entropies = draw_entropies(mask.shape, seed).to(dtype)
    opener = selection.opener_mask(entropies, mask, ratio)
    assert opener.dtype == torch.bool
    assert torch.equal(opener, expected_opener(entropies, mask, [ratio] * len(mask)))
    assert torch.equal(opener.any(-1), mask.any(-1)), "every response with tokens has an opener"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opener_with_a_ratio_for_each_response(dtype: torch.dtype) -> None:
    mask = draw_masks(60, 7)
    entropies = draw_entropies(mask.shape, 7)
    ratios = [0.05, 0.1, 0.15, 0.2, 0.05, 0.1, 0.15, 0.2]
    opener = selection.opener_mask(entropies, mask, torch.tensor(ratios, dtype=dtype))
    assert torch.equal(opener, expected_opener(entropies, mask, ratios))


def test_opener_default_is_a_tenth() -> None:
    entropies = draw_entropies((4, 50), 8)
    mask = whole(entropies)
    assert torch.equal(selection.opener_mask(entropies, mask), selection.opener_mask(entropies, mask, 0.1))


@pytest.mark.parametrize("entropy", [1.0, 0.97, 2.3])
@pytest.mark.parametrize(
    ("numerator", "denominator"), [(1, 20), (1, 10), (3, 20), (1, 5), (7, 100), (14, 50), (11, 20)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_opener_reaches_its_share_exactly(
    entropy: float, numerator: int, denominator: int, dtype: torch.dtype, as_tensor: bool
) -> None:
    """Equal entropies meet the bound at a whole number of tokens; rounding must not add one more.

    0.28 * 25 is 7.000000000000001, float32's 0.1 is a little more than a tenth, and sums of doubles round.
    """
    lengths = list(range(denominator, 401, denominator))
    mask = torch.arange(400) < torch.tensor(lengths)[:, None]
    entropies = torch.full(mask.shape, entropy, dtype=dtype)
    ratio = numerator / denominator
    opener = selection.opener_mask(entropies, mask, torch.full((len(lengths),), ratio) if as_tensor else ratio)
    assert opener.sum(-1).tolist() == [numerator * length // denominator for length in lengths]


def test_a_bare_product_overshoots_the_share() -> None:
    """The reason for the test above and for the one of the ceiling below."""
    assert 0.28 * 25 > 7.0
    assert torch.tensor(0.1).item() * 30 > 3.0


def test_opener_is_the_smallest_that_reaches_the_share() -> None:
    entropies = torch.tensor([[0.5, 1.0, 2.0, 4.0, 12.5]])  # a tenth is 2: the cumulative sums are 0.5, 1.5, 3.5
    opener = selection.opener_mask(entropies, whole(entropies), 0.1)
    assert opener.tolist() == [[True, True, True, False, False]]
    one_short = entropies.cumsum(-1) <= 0.1 * entropies.sum(-1, keepdim=True)
    assert not torch.equal(opener, one_short)


def test_opener_is_cut_in_each_response_and_not_in_the_flattened_batch() -> None:
    entropies = draw_entropies((6, 40), 9) * torch.tensor([[16.0], [1], [1], [1], [1], [1]])
    mask = whole(entropies)
    opener = selection.opener_mask(entropies, mask, 0.1)
    flat = entropies.flatten().cumsum(0)
    naive = (flat < 0.1 * flat[-1]).reshape(6, 40)
    assert not naive[1:].any(), "the flattened cut spends it all on the first response"
    assert opener.any(-1).all() and torch.equal(opener, expected_opener(entropies, mask, [0.1] * 6))
    for i in range(6):  # what else is in the batch can't matter
        assert torch.equal(selection.opener_mask(entropies[i : i + 1], mask[i : i + 1], 0.1), opener[i : i + 1])


def test_opener_counts_neither_padding_nor_prompt() -> None:
    entropies = torch.ones(1, 100)
    entropies[0, :40], entropies[0, 60:] = 5.0, 5.0
    mask = torch.zeros(1, 100, dtype=torch.bool)
    mask[0, 40:60] = True
    opener = selection.opener_mask(entropies, mask, 0.1)
    assert opener.nonzero()[:, 1].tolist() == [40, 41]
    naive = mask & (entropies.cumsum(-1) <= 0.1 * entropies.sum())
    assert not naive.any()


def test_opener_of_zero_total_entropy_is_the_first_token() -> None:
    mask = draw_masks(30, 10)
    entropies = torch.zeros(mask.shape)
    opener = selection.opener_mask(entropies, mask, 0.1)
    assert torch.equal(opener, at(mask, [[0] if row.any() else [] for row in mask]))
    share = entropies.cumsum(-1) / entropies.sum(-1, keepdim=True)
    assert share.isnan().all(), "the naive share is 0 / 0"
    half_zero = torch.tensor([[0.0, 0.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0]])
    assert selection.opener_mask(half_zero, whole(half_zero), 0.1).sum(-1).tolist() == [3, 1, 1]


def test_opener_of_half_precision_entropies() -> None:
    entropies = torch.ones(1, 2000, dtype=torch.bfloat16)
    assert selection.opener_mask(entropies, whole(entropies), 0.5).sum() == 1000
    naive = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(2000):
        naive = naive + entropies[0, 0]
    assert naive == 256, "a bfloat16 sum of ones stops growing at 256"


def test_opener_of_a_long_response() -> None:
    entropies = draw_entropies((2, 8192), 11)
    mask = whole(entropies)
    assert torch.equal(selection.opener_mask(entropies, mask, 0.1), expected_opener(entropies, mask, [0.1, 0.1]))


# Top entropy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_top_entropy(ratio: float, seed: int, dtype: torch.dtype) -> None:
    mask = draw_masks(41, seed)
    entropies = draw_entropies(mask.shape, seed).to(dtype)
    top = selection.top_entropy_mask(entropies, mask, ratio)
    assert top.dtype == torch.bool
    assert torch.equal(top, expected_top(entropies, mask, ratio))


def test_top_entropy_default_is_a_tenth() -> None:
    entropies = draw_entropies((4, 50), 12)
    mask = whole(entropies)
    assert torch.equal(selection.top_entropy_mask(entropies, mask), selection.top_entropy_mask(entropies, mask, 0.1))


@pytest.mark.parametrize(
    ("numerator", "denominator"), [(1, 10), (1, 20), (3, 20), (1, 5), (7, 100), (14, 50), (11, 20), (1, 1)]
)
def test_top_entropy_takes_exactly_the_ceiling(numerator: int, denominator: int) -> None:
    ratio = numerator / denominator
    mask = torch.arange(300) <= torch.arange(300)[:, None]  # responses of 1 to 300 tokens
    entropies = draw_entropies((300, 300), 13)
    lengths = torch.arange(1, 301)
    ceiling = (lengths * numerator + denominator - 1) // denominator
    assert torch.equal(selection.top_entropy_mask(entropies, mask, ratio).sum(-1), ceiling)
    naive = torch.tensor([math.ceil(ratio * length) for length in range(1, 301)])
    assert torch.equal(naive, ceiling) == (ratio in (0.05, 0.1, 0.15, 0.2, 1.0)), "0.28 * 25 is 7.000000000000001"


def test_top_entropy_is_the_top_tenth_and_not_the_top_nine_tenths() -> None:
    entropies = draw_entropies((1, 200), 14) + torch.arange(200) * 2**-12  # no ties
    top = selection.top_entropy_mask(entropies, whole(entropies), 0.1)
    naive = entropies >= torch.quantile(entropies, 0.1)
    assert top.sum() == 20 and naive.sum() == 180
    assert entropies[top].min() > entropies[~top].max()


@pytest.mark.parametrize("length", [1, 7, 30, 64, 333])
def test_top_entropy_ties_go_to_the_earliest(length: int) -> None:
    entropies = torch.full((3, length), 0.75)
    entropies[1] = 0.0
    entropies[2, length // 2 :] = 1.5
    mask = whole(entropies)
    top = selection.top_entropy_mask(entropies, mask, 0.3)
    assert torch.equal(top, expected_top(entropies, mask, 0.3))
    threshold = entropies.topk(math.ceil(0.3 * length), -1).values[:, -1:]
    if length > 1:
        assert (entropies >= threshold).sum() > top.sum(), "a threshold keeps every tie"


def test_top_entropy_ignores_high_entropies_outside_the_response() -> None:
    entropies = torch.full((2, 30), 9.0)
    mask = torch.zeros(2, 30, dtype=torch.bool)
    mask[0, 5:25], mask[1, 3] = True, True
    entropies[mask] = 0.0
    entropies[0, 17] = 0.5
    top = selection.top_entropy_mask(entropies, mask, 0.1)
    assert top.nonzero().tolist() == [[0, 5], [0, 17], [1, 3]]


def test_top_entropy_beyond_the_size_limit_of_quantile() -> None:
    entropies = torch.zeros(1, 16_777_217)
    entropies[0, -5:] = 1.0
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(entropies, 0.9)
    top = selection.top_entropy_mask(entropies, whole(entropies), 1e-6)
    assert top.sum() == 17 and top[0, -5:].all() and top[0, :12].all()


# Both ----------------------------------------------------------------------------------------------------------------

Select = Callable[[Tensor, Tensor, float], Tensor]
SELECTIONS = pytest.mark.parametrize("select", [selection.opener_mask, selection.top_entropy_mask])


@SELECTIONS
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_whatever_stands_at_masked_positions_does_not_count(select: Select, garbage: float) -> None:
    mask = draw_masks(41, 15)
    entropies = draw_entropies(mask.shape, 15)
    assert torch.equal(select(entropies.masked_fill(~mask, garbage), mask, 0.1), select(entropies, mask, 0.1))


@SELECTIONS
@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (2, 0), (0, 4)], ids=str)
def test_nothing_is_selected_where_nothing_is_valid(select: Select, shape: tuple[int, int]) -> None:
    selected = select(torch.rand(shape), torch.zeros(shape, dtype=torch.bool), 0.1)
    assert selected.shape == shape and selected.dtype == torch.bool and not selected.any()


@SELECTIONS
@pytest.mark.parametrize("entropy", [0.0, 0.3, 11.9])
@pytest.mark.parametrize("ratio", RATIOS)
def test_one_token_response_selects_it(select: Select, entropy: float, ratio: float) -> None:
    mask = torch.tensor([[False, False, True, False]])
    assert torch.equal(select(torch.full((1, 4), entropy), mask, ratio), mask)


@SELECTIONS
def test_selection_has_no_gradient_and_leaves_its_inputs_alone(select: Select) -> None:
    mask = draw_masks(20, 16)
    entropies = draw_entropies(mask.shape, 16).requires_grad_()
    before = entropies.detach().clone(), mask.clone()
    assert not select(entropies, mask, 0.1).requires_grad
    assert torch.equal(entropies, before[0]) and torch.equal(mask, before[1])


# Gate ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("shape", [(), (7,), (3, 7), (2, 0)], ids=str)
def test_gate(temperature: float, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(17)
    student, teacher = (3 * torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    gate = selection.entropy_gap_gate(student, teacher, temperature)
    pairs = zip(student.reshape(-1).tolist(), teacher.reshape(-1).tolist(), strict=True)
    expected = [ref.entropy_gap_gate(a, b, temperature) for a, b in pairs]
    torch.testing.assert_close(gate, torch.tensor(expected, dtype=torch.float64).reshape(shape), rtol=1e-12, atol=0)
    assert ((gate > 0) & (gate < 1)).all()


def test_gate_is_large_where_the_student_is_the_less_sure() -> None:
    student, teacher = torch.tensor([2.0, 1.0, 0.1]), torch.tensor([0.1, 1.0, 2.0])
    assert selection.entropy_gap_gate(student, teacher).tolist() == pytest.approx([0.869892, 0.5, 0.130108], abs=1e-6)


def test_gate_passes_no_gradient() -> None:
    student, teacher = (torch.rand(4, requires_grad=True) for _ in range(2))
    assert torch.sigmoid(student - teacher).requires_grad, "the naive gate would let the student close it"
    assert not selection.entropy_gap_gate(student, teacher).requires_grad


def test_gate_of_enormous_gaps_is_finite() -> None:
    gap = torch.tensor([1e4, -1e4])
    assert selection.entropy_gap_gate(gap, -gap, 0.01).tolist() == [1.0, 0.0]


# Adaptive c ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("moving_average", "ratio"),
    [
        (0.0, 0.05),
        (0.1, 0.05),
        (0.25, 0.10),
        (0.4, 0.10),
        (0.5, 0.15),
        (0.6, 0.15),
        (0.75, 0.20),
        (0.9, 0.20),
        (1, 0.20),
    ],
)
def test_adaptive_ratio(moving_average: float, ratio: float) -> None:
    assert selection.adaptive_opener_ratio(moving_average) == ratio == ref.adaptive_opener_ratio(moving_average)


@pytest.mark.parametrize(("edge", "below"), [(0.25, 0.05), (0.5, 0.10), (0.75, 0.15)])
def test_adaptive_ratio_intervals_are_closed_on_the_left(edge: float, below: float) -> None:
    assert selection.adaptive_opener_ratio(math.nextafter(edge, 0.0)) == below
    assert selection.adaptive_opener_ratio(edge) > below


def test_adaptive_ratio_of_equally_sure_models_is_fifteen_percent() -> None:
    assert selection.adaptive_opener_ratio(ref.difficulty([1.0, 2.0], [2.0, 1.0])) == 0.15
