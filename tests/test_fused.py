"""The fused head against whole logits, against loops written from the papers, and within its memory and its cost."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import reference as ref
from conftest import completions_of, policy_scores
from tsdkd import losses, selection
from tsdkd.lm_head.dense import DenseHead
from tsdkd.lm_head.fused import FusedHead
from tsdkd.lm_head.projection import Projection
from tsdkd.lm_head.statistics import Head, PerTokenLoss, StatisticsRequest, TokenStatistics
from tsdkd.methods.eopd import EOPDObjective
from tsdkd.methods.tsd_kd import TSDKDObjective
from tsdkd.objective import CompletionBatch, PolicyScores

BACKEND = "torch"  # test_triton.py runs these tests with another one
CHUNKS = (1, 7, 20, None)  # tokens, None: all
SMALL_CHUNK = 1
SAME = {torch.float32: (1e-6, 1e-5), torch.float64: (1e-12, 1e-12)}  # values, gradients
Row, Rows, Numbers = list[float], list[list[float]], dict[str, Tensor]

every_precision = pytest.mark.parametrize("dtype", SAME, ids=str)
every_own_mode = pytest.mark.parametrize("loss_in_forward", [True, False], ids=["forward", "backward"])


# Models --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """Last hidden states `[N, H]` and a head, every tensor a leaf."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def leaves(self) -> Numbers:
        every = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {name: leaf for name, leaf in every.items() if leaf is not None}

    def copy(self, dtype: torch.dtype | None = None, gradients: bool = True) -> Model:
        leaves = {n: x.detach().clone().to(dtype or x.dtype) for n, x in self.leaves.items()}
        return replace(self, **{n: x.requires_grad_(gradients) for n, x in leaves.items()})

    def projection(self) -> Projection:
        return Projection(self.weight, self.bias, self.scale, self.softcap)

    def logits(self, vocab_size: int, temperature: float) -> Tensor:
        """Whole logits, by autograd."""
        logits = F.linear(self.hidden, self.weight, self.bias)[:, :vocab_size] * self.scale
        return (logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)) / temperature

    def numbers(self) -> list[float]:
        return torch.cat([x.detach().double().flatten() for x in self.leaves.values()]).tolist()

    def logits_loop(self, numbers: list[float], vocab_size: int, temperature: float) -> Rows:
        """The same logits in plain Python, from the leaves' numbers one after the other."""
        it, (count, width) = iter(numbers), self.hidden.shape
        hidden, weight = ([[next(it) for _ in range(width)] for _ in range(n)] for n in (count, len(self.weight)))
        bias = [0.0 if self.bias is None else next(it) for _ in weight]

        def logit(h: Row, v: int) -> float:
            x = self.scale * (sum(a * b for a, b in zip(h, weight[v], strict=True)) + bias[v])
            return (x if self.softcap is None else self.softcap * math.tanh(x / self.softcap)) / temperature

        return [[logit(h, v) for v in range(vocab_size)] for h in hidden]


@dataclass(frozen=True)
class Pair:
    """A student and a teacher at the same N positions."""

    student: Model
    teacher: Model
    vocab_size: int
    temperature: float = 1.0

    @property
    def count(self) -> int:
        return len(self.student.hidden)

    def copy(self, dtype: torch.dtype | None = None) -> Pair:
        return replace(self, student=self.student.copy(dtype), teacher=self.teacher.copy(dtype))

    def at(self, rows: slice) -> Pair:
        """Some of the positions, with the same heads: the gradients add up in them."""
        models = [replace(m, hidden=m.hidden[rows]) for m in (self.student, self.teacher)]
        return replace(self, student=models[0], teacher=models[1])

    def whole(self, teacher: bool = True) -> DenseHead:
        size = self.vocab_size, self.temperature
        return DenseHead(self.student.logits(*size), self.teacher.logits(*size) if teacher else None)

    def fused(self, teacher: bool = True, **options: Any) -> FusedHead:
        other = (self.teacher.hidden, self.teacher.projection()) if teacher else ()
        options = {"vocab_size": self.vocab_size, "temperature": self.temperature, "backend": BACKEND, **options}
        if "chunk" in options:  # in tokens
            tokens, itemsize = (
                options.pop("chunk") or self.count,
                options.pop("itemsize", self.student.hidden.itemsize),
            )
            options["chunk_gib"] = (tokens + 0.5) * self.vocab_size * itemsize * (2 if teacher else 1) / 2**30
        return FusedHead(self.student.hidden, self.student.projection(), *other, **options)

    def ids(self, count: int) -> Tensor:
        """Tokens to ask about, the first and the last of them the same."""
        ids = torch.randint(self.vocab_size, (self.count, count), generator=torch.Generator().manual_seed(self.count))
        ids[:, -1] = ids[:, 0]
        return ids.to(self.student.hidden.device)


PLAIN: dict[str, Any] = {}
CAPPED = {"bias": True, "softcap": 5.0, "scale": 1.5}


def draw(
    count: int = 9,
    vocab_size: int = 37,
    widths: tuple[int, int] = (5, 8),
    padding: tuple[int, int] = (0, 0),
    student: dict[str, Any] = CAPPED,
    teacher: dict[str, Any] = CAPPED,
    temperature: float = 1.0,
    spread: float = 2.0,
) -> Pair:
    """Random models whose logits have the standard deviation `spread`; padding rows would win every softmax."""
    generator = torch.Generator().manual_seed(vocab_size)

    def model(width: int, pad: int, bias: bool = False, **options: Any) -> Model:
        hidden = torch.randn(count, width, generator=generator)
        weight = torch.randn(vocab_size + pad, width, generator=generator) * spread / width**0.5
        weight[vocab_size:] *= 100
        biases = torch.randn(vocab_size + pad, generator=generator) if bias else None
        return Model(hidden, weight, biases, **options).copy()

    models = [model(*each, **options) for *each, options in zip(widths, padding, (student, teacher), strict=True)]
    return Pair(models[0], models[1], vocab_size, temperature)


# Losses --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Term:
    """A loss of each token: of the statistics, and as a loop of rows of logits (student, teacher) and of ids."""

    library: Callable[[TokenStatistics], Tensor]
    loop: Callable[[Row, Row, list[int]], float]
    ids: int = 0
    request: dict[str, Any] = field(default_factory=dict)

    def ask(self, pair: Pair) -> StatisticsRequest:
        return StatisticsRequest(**self.request, ids=pair.ids(self.ids) if self.ids else None)


def divergence(kind: losses.Divergence, loop: Callable[[Row, Row], float]) -> Term:
    return Term(lambda s: s.divergence, lambda q, p, _: loop(q, p), request={"divergence": kind})


def jsd(beta: float) -> Term:
    return divergence(losses.jsd(beta), lambda q, p: ref.generalized_jsd(q, p, beta))


def skewed(skew: float) -> dict[str, Term]:
    return {
        f"skew-forward-{skew}": divergence(losses.skew_forward_kl(skew), lambda q, p: ref.skew_forward_kl(q, p, skew)),
        f"skew-reverse-{skew}": divergence(losses.skew_reverse_kl(skew), lambda q, p: ref.skew_reverse_kl(q, p, skew)),
    }


def plackett_luce(k: int) -> Term:
    def library(s: TokenStatistics) -> Tensor:
        return losses.plackett_luce_nll(s.topk_logits, s.teacher_topk_logits, k)

    return Term(library, lambda q, p, _: ref.plackett_luce_nll(q, p, k), request={"top_k": k})


def logps_loop(q: Row, _: Row, ids: list[int]) -> float:
    return sum(factor * ref.log_softmax(q)[i] for factor, i in zip((1.0, -2.0, 0.5), ids, strict=True))


def gated_loop(q: Row, p: Row, _: list[int]) -> float:
    return ref.sigmoid(ref.token_entropy(q) - ref.token_entropy(p)) * ref.generalized_jsd(q, p, 0.9)


def product_loop(q: Row, p: Row, ids: list[int]) -> float:
    mass = sum(math.exp(ref.log_softmax(q)[i]) for i in ids)
    return mass * ref.token_entropy(q) - ref.generalized_jsd(q, p, 0.5) ** 2 + 0.1 * max(q)


GATED = {"entropy": True, "teacher_entropy": True, "divergence": losses.jsd(0.9)}
PRODUCT = {"entropy": True, "divergence": losses.jsd(0.5), "top_k": 3}
TERMS = {
    **{f"jsd-{beta}": jsd(beta) for beta in (0.0, 0.1, 0.5, 0.9, 1.0)},
    **skewed(0.1),
    **{f"plackett-luce-{k}": plackett_luce(k) for k in (4, 50)},
    "entropy": Term(lambda s: s.entropy, lambda q, *_: ref.token_entropy(q), request={"entropy": True}),
    "logps": Term(lambda s: (s.logps * s.logps.new_tensor([1.0, -2.0, 0.5])).sum(-1), logps_loop, ids=3),
    "policy": Term(
        lambda s: losses.clipped_policy_loss(
            s.logps[:, 0], s.logps.new_full(s.logps.shape[:1], -3.0), s.logps.new_tensor(0.75)
        ),
        lambda q, _, ids: ref.clipped_surrogate(math.exp(ref.log_softmax(q)[ids[0]] + 3.0), 0.75, 0.2),
        ids=1,
    ),
    "gated": Term(lambda s: (s.entropy - s.teacher_entropy).sigmoid() * s.divergence, gated_loop, request=GATED),
    "product": Term(
        lambda s: s.logps.exp().sum(-1) * s.entropy - s.divergence.square() + 0.1 * s.topk_logits[:, 0],
        product_loop,
        ids=2,
        request=PRODUCT,
    ),
}
every_term = pytest.mark.parametrize("name", TERMS)


def factors(count: int) -> Tensor:
    """A weight for each token, of both signs, every third zero as where a selection leaves a token out."""
    return (torch.linspace(-1.0, 2.0, count).double() + 0.1).where(torch.arange(count) % 3 != 1, 0.0)


def loss_of(pair: Pair, name: str, head: Head, weight: float | None = None) -> tuple[TokenStatistics, Tensor]:
    """The head's answer and the term's loss; with a `weight` as an own-token loss."""
    term, at = TERMS[name], factors(pair.count)

    def weighted(s: TokenStatistics, which: slice) -> Numbers:
        values = term.library(s)
        return {"term": at[which].to(values) * values}

    own = None if weight is None else PerTokenLoss({"term": weight}, weighted)
    answer = head(term.ask(pair), own)
    return answer, weighted(answer, slice(None))["term"].sum() if own is None else answer.loss


def gradients_of(pair: Pair) -> Numbers:
    """By name; the teacher must not have any."""
    assert all(leaf.grad is None for leaf in pair.teacher.leaves.values())
    return {f"gradient of {n}": x.grad for n, x in pair.student.leaves.items() if x.grad is not None}


def run(
    pair: Pair,
    name: str,
    fused: bool,
    scale: float = 1.0,
    weight: float | None = None,
    autocast: torch.dtype | None = None,
    **options: Any,
) -> Numbers:
    """Statistics, loss and gradients by name, from copies of the pair."""
    pair = pair.copy()
    with contextlib.nullcontext() if autocast is None else torch.autocast("cpu", autocast):
        answer, loss = loss_of(pair, name, pair.fused(**options) if fused else pair.whole(), weight)
    (loss * scale).backward()
    found = {n: x.detach() for n, x in vars(answer).items() if isinstance(x, Tensor)}
    return {**found, "loss": loss.detach(), **gradients_of(pair)}


def run_exactly(pair: Pair, name: str, weight: float | None = None) -> Numbers:
    """From whole logits in float64, since over a large vocabulary those in float32 have errors of their own."""
    found, dtype = run(pair.copy(torch.float64), name, fused=False, weight=weight), pair.student.hidden.dtype
    return {n: x.to(dtype) if x.is_floating_point() else x for n, x in found.items()}


def assert_same(actual: Numbers, expected: Numbers, values: float, gradients: float, least: float = 1e-2) -> None:
    """Largest difference over largest magnitude, or over one for values and `least` for gradients if that is more."""
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert actual[name].shape == x.shape and actual[name].dtype == x.dtype, name
        if x.numel() == 0:
            continue
        tolerance, floor = (gradients, least) if name.startswith("gradient") else (values, 1.0)
        error = (actual[name].double() - x.double()).abs().max().item()
        assert error <= tolerance * max(floor, x.abs().max().item()), (name, error)


# The same numbers ----------------------------------------------------------------------------------------------------

SIZES = [  # N, V, (H, H'), padding rows of the two heads
    (1, 1, (1, 1), (0, 0)),
    (4, 1, (2, 5), (4, 0)),
    (5, 2, (3, 3), (0, 7)),
    (0, 37, (5, 8), (3, 0)),
    (1, 37, (5, 8), (3, 0)),
    (2, 1031, (7, 4), (0, 13)),
    (60, 400, (16, 12), (64, 1)),
]


@every_term
@every_precision
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_whole_logits(name: str, dtype: torch.dtype, size: tuple) -> None:
    pair = draw(*size, teacher={"bias": True}).copy(dtype)
    expected = run_exactly(pair, name)
    for chunk in (1, None):
        actual = run(pair, name, fused=True, chunk=chunk)
        # with one token there is nothing to learn: the gradient is a difference of equal numbers
        assert_same(actual, expected, *SAME[dtype], least=0.1 if pair.vocab_size == 1 else 1e-2)
        for leaf in ("weight", "bias"):
            assert (actual[f"gradient of {leaf}"][pair.vocab_size :] == 0).all()


@pytest.mark.parametrize("name", ["jsd-0.0", "jsd-1.0", "gated", "logps"])
def test_equals_whole_logits_over_many_tiles(name: str) -> None:
    """Rows and columns are read tile by tile, in both passes; none of the tiles is a full one here."""
    pair = draw(200, 9001, (4, 3))
    assert_same(run(pair, name, fused=True), run_exactly(pair, name), *SAME[torch.float32])


@every_term
def test_equals_loops_and_finite_differences(name: str) -> None:
    """Nothing is shared with the library here: logits, losses and gradients are plain Python."""
    student, teacher = {"bias": True, "softcap": 3.0, "scale": 0.7}, {"softcap": 4.0, "scale": 1.3}
    pair = draw(3, 6, (2, 3), (1, 2), student, teacher, temperature=1.7).copy(torch.float64)
    size, ids = (pair.vocab_size, pair.temperature), pair.ids(max(1, TERMS[name].ids)).tolist()
    of_teacher = pair.teacher.logits_loop(pair.teacher.numbers(), *size)

    def loss(numbers: list[float]) -> float:
        rows = zip(pair.student.logits_loop(numbers, *size), of_teacher, ids, factors(3).tolist(), strict=True)
        return math.fsum(weight * TERMS[name].loop(q, p, i) for q, p, i, weight in rows)

    found = run(pair, name, fused=True)
    gradient = torch.cat([found[f"gradient of {n}"].flatten() for n in pair.student.leaves])
    expected = torch.tensor(ref.central_difference(loss, pair.student.numbers()), dtype=torch.float64)
    assert found["loss"].item() == pytest.approx(loss(pair.student.numbers()), rel=1e-12, abs=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-8)


HEADS = [
    (PLAIN, PLAIN, 1.0),
    (PLAIN, PLAIN, 0.5),
    ({"softcap": 1.5}, PLAIN, 2.0),
    (PLAIN, {"softcap": 1.5}, 0.5),
    ({"scale": 0.25}, {"scale": 3.0}, 1.0),
    ({"bias": True}, {"softcap": 2.0, "bias": True}, 2.0),
    (CAPPED, {"softcap": 3.0, "scale": 0.5}, 0.7),
]


@every_term
@pytest.mark.parametrize(("student", "teacher", "temperature"), HEADS, ids=str)
def test_what_a_model_does_to_its_logits(name: str, student: dict, teacher: dict, temperature: float) -> None:
    pair = draw(5, 23, student=student, teacher=teacher, temperature=temperature)
    assert_same(run(pair, name, fused=True), run(pair, name, fused=False), *SAME[torch.float32])


STEPS = torch.arange(8.0) / 8
PEAKS = 1e4 * torch.eye(8)
EXTREMES = {
    "same token": (PEAKS[3] + STEPS, PEAKS[3] - STEPS),
    "other token": (PEAKS[3] + STEPS, PEAKS[5] - STEPS),
    "sure student": (PEAKS[3] + STEPS, STEPS),
    "sure teacher": (STEPS, PEAKS[3] - STEPS),
    "far apart": (1e4 * (STEPS * 2 - 1), -1e4 * (STEPS * 2 - 1)),
    "low": (8 * STEPS - 1e4, -8 * STEPS - 1e4),
    "high": (64 * STEPS + 1e4, -64 * STEPS + 1e4),
    "equal": (8 * STEPS, 8 * STEPS),
}


@every_term
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extreme_logits(name: str, extreme: str) -> None:
    """The heads are identities, so that the hidden states are the logits, exactly."""
    pair = Pair(*(Model(z.expand(4, 8), torch.eye(8), torch.zeros(8)) for z in EXTREMES[extreme]), 8)
    actual = run(pair, name, fused=True)
    assert all(x.isfinite().all() for x in actual.values())
    del actual["gradient of weight"]  # that of the logits times 1e4
    for dtype in SAME:
        found = run(pair.copy(dtype), name, fused=False)
        expected = {n: found[n].to(x.dtype) for n, x in actual.items()}
        # a small gradient is a difference of terms as large as the loss: 1e-7 of it is what float32 can tell
        assert_same(actual, expected, *SAME[torch.float32], least=max(0.1, 0.01 * expected["loss"].abs().item()))
    if extreme == "equal" and "jsd" in actual:
        assert actual["jsd"].abs().max() <= 1e-6


@every_term
@pytest.mark.parametrize("loss_in_forward", [None, True, False], ids=["no own loss", "forward", "backward"])
def test_chunks_are_invisible(name: str, loss_in_forward: bool | None) -> None:
    pair, weight = draw(41, 1000), None if loss_in_forward is None else 0.3
    expected = run_exactly(pair, name, weight)
    for chunk in CHUNKS:
        options = {"chunk": chunk, "loss_in_forward": loss_in_forward is not False}
        assert_same(run(pair, name, True, weight=weight, **options), expected, *SAME[torch.float32])


# Own-token losses ----------------------------------------------------------------------------------------------------

OWN = {"direct": 1.0, "ranking": 0.1, "policy": -0.3}


def own_token_loss(pair: Pair, names: tuple[str, ...] = tuple(OWN)) -> tuple[StatisticsRequest, PerTokenLoss]:
    """Every kind of statistic, of tokens that are weighted by where they are."""

    def terms(s: TokenStatistics, which: slice) -> Numbers:
        gate = selection.entropy_gap_gate(s.entropy, s.teacher_entropy)
        ranking = losses.plackett_luce_nll(s.topk_logits, s.teacher_topk_logits, 4)
        every = {"direct": gate * s.divergence, "ranking": ranking, "policy": s.logps.exp().sum(-1) * s.entropy}
        return {name: factors(pair.count)[which].to(every[name]) * every[name] for name in names}

    request = StatisticsRequest(
        entropy=True, teacher_entropy=True, divergence=losses.jsd(0.9), top_k=4, ids=pair.ids(3)
    )
    return request, PerTokenLoss({name: OWN[name] for name in names}, terms)


def run_own(pair: Pair, head: Head, names: tuple[str, ...] = tuple(OWN)) -> Numbers:
    """Own-token losses together with terms of selected tokens only, each with another factor."""
    answer = head(*own_token_loss(pair, names))
    ranking = losses.plackett_luce_nll(answer.topk_logits[:2], answer.teacher_topk_logits[:2], 4)
    uncertain = answer.entropy[answer.entropy.detach().topk(2).indices]
    (3.0 * answer.loss + 0.5 * uncertain.sum() + ranking.sum() / 7).backward()
    terms = {f"term {name}": x.detach() for name, x in answer.loss_terms.items()}
    return {**terms, "loss": answer.loss.detach(), **gradients_of(pair)}


@every_precision
@every_own_mode
@pytest.mark.parametrize("names", [tuple(OWN), *((name,) for name in OWN)], ids=" ".join)
def test_own_token_losses(names: tuple[str, ...], loss_in_forward: bool, dtype: torch.dtype) -> None:
    pair = draw(23, 1000, padding=(3, 0)).copy(dtype)
    reference = pair.copy()
    expected = run_own(reference, reference.whole(), names)
    for chunk in CHUNKS:
        copy = pair.copy()
        actual = run_own(copy, copy.fused(chunk=chunk, loss_in_forward=loss_in_forward), names)
        assert_same(actual, expected, *SAME[dtype])


def test_own_token_losses_see_every_token_once() -> None:
    pair, sizes = draw(23, 1000), set()
    for chunk in CHUNKS:
        seen: list[int] = []

        def entropies(s: TokenStatistics, which: slice, seen: list[int] = seen) -> Numbers:
            seen += range(pair.count)[which]
            sizes.add(len(s.entropy))
            return {"entropy": s.entropy}

        pair.fused(chunk=chunk)(StatisticsRequest(entropy=True), PerTokenLoss({"entropy": 1.0}, entropies))
        assert seen == list(range(pair.count))
    assert {1, pair.count} < sizes, "a token, all tokens, and something in between"


def test_own_token_losses_without_a_gradient() -> None:
    """Neither a graph that nobody asked for nor a missing one."""
    pair = draw(5)
    expected = pair.fused()(*own_token_loss(pair)).loss.detach()
    frozen = replace(pair, student=pair.student.copy(gradients=False)).fused()(*own_token_loss(pair))
    with torch.no_grad():
        silent = pair.fused()(*own_token_loss(pair))
    for answer in (silent, frozen):
        assert not answer.loss.requires_grad and not answer.entropy.requires_grad
        torch.testing.assert_close(answer.loss, expected)
    constant = PerTokenLoss({"constant": 2.0}, lambda s, _: {"constant": s.entropy.detach()})
    pair.fused()(StatisticsRequest(entropy=True), constant).loss.backward()
    assert all((leaf.grad == 0).all() for leaf in pair.student.leaves.values())


# Half precision ------------------------------------------------------------------------------------------------------


def errors_of(numbers: Numbers, truth: Numbers) -> dict[str, float]:
    """The gradients' errors, in norm."""
    return {n: (numbers[n].double() - x).norm().item() for n, x in truth.items() if n.startswith("gradient")}


@every_term
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("spread", [2.0, 8.0], ids=["unsure", "sure"])
def test_bfloat16_is_no_less_precise(name: str, autocast: torch.dtype | None, spread: float) -> None:
    pair = draw(250, 400, (32, 24), student=PLAIN, teacher=PLAIN, spread=spread).copy(torch.bfloat16)
    truth = run(pair.copy(torch.float64), name, fused=False)
    inputs = pair if autocast is None else pair.copy(torch.float32)
    whole = errors_of(run(inputs, name, False, autocast=autocast), truth)
    # with chunks the weight's gradient is rounded once more, but not once a chunk
    for chunk, margin in ((None, 1.1), (20, 1.3)):
        fused = errors_of(run(inputs, name, True, autocast=autocast, chunk=chunk, itemsize=2), truth)
        for leaf, error in whole.items():
            assert fused[leaf] <= margin * error, (leaf, chunk, fused[leaf] / error)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_sets_the_precision_of_both_projections(dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype):
        answer = draw(student=PLAIN, teacher=PLAIN).fused()(StatisticsRequest(top_k=3))
    for logits in (answer.topk_logits, answer.teacher_topk_logits):
        assert logits.dtype == torch.float32 and torch.equal(logits, logits.to(dtype).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("margin", [4.0, 8.0, 12.0])
def test_half_precision_keeps_the_gradient_of_sure_tokens(dtype: torch.dtype, margin: float) -> None:
    """1 - q has its digits only as long as neither of the two has been rounded. The logits are exact here."""
    model = Model(margin * torch.eye(64), torch.eye(64)).copy(dtype)
    exact = model.copy(torch.float64)
    fused = FusedHead(model.hidden, model.projection(), backend=BACKEND)
    for m, head in ((model, fused), (exact, DenseHead(exact.logits(64, 1.0)))):
        head(StatisticsRequest(ids=torch.arange(64).unsqueeze(-1))).logps.sum().backward()
        assert m.hidden.grad is not None
    for found, expected in ((model.hidden, exact.hidden), (model.weight, exact.weight)):
        assert (found.grad.double() - expected.grad).norm() <= 0.005 * expected.grad.norm()


@every_term
@pytest.mark.parametrize("loss_in_forward", [None, True, False], ids=["no own loss", "forward", "backward"])
@pytest.mark.parametrize("autocast", [None, torch.float16], ids=["float16", "autocast"])
def test_float16_with_a_loss_scale(name: str, loss_in_forward: bool | None, autocast: torch.dtype | None) -> None:
    """A mean over a long batch makes gradients that float16 can't hold: the loss scale must not come too late."""
    pair = draw(50, 200, (32, 24), student=PLAIN, teacher=PLAIN).copy(torch.float16)
    tiny = {"scale": 65536e-7} if loss_in_forward is None else {"scale": 65536.0, "weight": 1e-7}
    truth = run(pair.copy(torch.float64), name, fused=False, **tiny)
    inputs = pair if autocast is None else pair.copy(torch.float32)
    options = {"chunk": 20, "itemsize": 2, "loss_in_forward": loss_in_forward is not False}
    for leaf, error in errors_of(run(inputs, name, True, autocast=autocast, **options, **tiny), truth).items():
        assert error <= 0.005 * truth[leaf].norm(), (leaf, error / truth[leaf].norm())


@every_term
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [0, 5])
@pytest.mark.parametrize("weight", [None, 0.0], ids=["statistics", "own loss"])
def test_half_precision_with_nothing_to_learn(name: str, dtype: torch.dtype, count: int, weight: float | None) -> None:
    """No token, or a loss without a slope: DDP still waits for every gradient."""
    found = run(draw(count).copy(dtype), name, fused=True, scale=0.0, weight=weight)
    assert found["loss"].isfinite()
    for leaf in ("hidden", "weight", "bias"):
        gradient = found[f"gradient of {leaf}"]
        assert gradient.dtype == dtype and (gradient == 0).all()


def test_bfloat16_with_a_weight_of_many_blocks() -> None:
    """Sums and roundings of the weight's gradient go block by block; a real vocabulary has several."""
    pair = draw(3, 140_001, (31, 1), student=PLAIN).copy(torch.bfloat16)
    truth = run(pair.copy(torch.float64), "entropy", fused=False)
    fused, whole = (errors_of(run(pair, "entropy", kind), truth) for kind in (True, False))
    assert all(fused[leaf] <= 1.1 * error for leaf, error in whole.items())


# Gradients: whose, when and how often --------------------------------------------------------------------------------


@every_precision
def test_tied_weights(dtype: torch.dtype) -> None:
    """One parameter is the embedding and the head: it gets both gradients."""
    pair = draw(9, 37, (8, 8), (5, 0)).copy(dtype)

    def gradient(fused: bool) -> Numbers:
        embedding = pair.student.weight.detach().clone().requires_grad_()
        hidden = embedding[torch.arange(9)].tanh()
        tied = replace(pair, student=replace(pair.student, hidden=hidden, weight=embedding))
        answer = (tied.fused() if fused else tied.whole())(StatisticsRequest(entropy=True, divergence=losses.jsd(0.5)))
        (answer.entropy + answer.divergence).mean().backward()
        return {"gradient": embedding.grad}

    assert_same(gradient(True), gradient(False), *SAME[dtype])


@every_own_mode
@pytest.mark.parametrize("trained", [{"hidden"}, {"weight"}, {"bias"}, {"hidden", "bias"}], ids=" ".join)
def test_only_what_requires_a_gradient_gets_one(trained: set[str], loss_in_forward: bool) -> None:
    """LoRA freezes the head; somebody may train nothing else."""
    everything, pair = draw(), draw()
    expected = run_own(everything, everything.whole())
    for name in set(pair.student.leaves) - trained:
        pair.student.leaves[name].requires_grad_(False)
        del expected[f"gradient of {name}"]
    assert_same(run_own(pair, pair.fused(loss_in_forward=loss_in_forward)), expected, *SAME[torch.float32])


@every_term
def test_no_grad_gives_the_same_values(name: str) -> None:
    pair = draw()
    answer, loss = loss_of(pair, name, pair.fused())
    assert loss.requires_grad
    with torch.no_grad():
        silent, _ = loss_of(pair, name, pair.fused())
    for statistic, value in vars(answer).items():
        if isinstance(value, Tensor):
            same = getattr(silent, statistic)
            assert torch.equal(same, value) and not same.requires_grad and same.grad_fn is None


@every_term
@pytest.mark.parametrize("factor", [65536.0, 1 / 7, -1e-6])
def test_accumulates_and_scales(name: str, factor: float) -> None:
    """Two heads on halves of the tokens, as two micro-batches, and one head on all of them."""
    pair, term = draw(10).copy(torch.float64), TERMS[name]
    whole = pair.copy()
    term.library(whole.whole()(term.ask(whole))).sum().backward()
    for rows in (slice(0, 4), slice(4, 10)):
        request = term.ask(pair)
        request = request if request.ids is None else replace(request, ids=request.ids[rows])
        (term.library(pair.at(rows).fused()(request)).sum() * factor).backward()
    assert_same({n: x / factor for n, x in gradients_of(pair).items()}, gradients_of(whole), *SAME[torch.float64])


@every_term
def test_statistics_can_be_differentiated_twice(name: str) -> None:
    pair = draw().copy(torch.float64)
    expected = run(pair, name, fused=False, scale=3.0)
    _, loss = loss_of(pair, name, pair.fused())
    loss.backward(retain_graph=True)
    (2 * loss).backward()
    found = gradients_of(pair)
    assert_same(found, {n: expected[n] for n in found}, *SAME[torch.float64])


def test_how_often_own_token_losses_can_be_differentiated() -> None:
    """Once in the forward pass: a silent second time would add zeros or old numbers."""
    pair = draw().copy(torch.float64)
    twice, whole = pair.copy(), pair.copy()
    answer = whole.whole()(*own_token_loss(pair))
    (2 * answer.loss + answer.entropy.sum()).backward()
    expected = gradients_of(whole)

    answer = twice.fused(loss_in_forward=False)(*own_token_loss(pair))
    answer.loss.backward(retain_graph=True)
    (answer.loss + answer.entropy.sum()).backward()
    assert_same(gradients_of(twice), expected, *SAME[torch.float64])

    answer = pair.fused()(*own_token_loss(pair))
    (2 * answer.loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="loss_in_forward"):
        answer.loss.backward(retain_graph=True)
    answer.entropy.sum().backward()  # the statistics still can
    assert_same(gradients_of(pair), expected, *SAME[torch.float64])


@every_term
def test_backward_under_autocast(name: str) -> None:
    """Whoever calls backward inside autocast must not get another precision, or an error."""
    pair = draw()
    expected = run(pair, name, fused=True)
    _, loss = loss_of(pair, name, pair.fused())
    with torch.autocast("cpu", torch.bfloat16):
        loss.backward()
    found = gradients_of(pair)
    assert_same(found, {n: expected[n] for n in found}, *SAME[torch.float32])


# Mistakes ------------------------------------------------------------------------------------------------------------


def test_bad_shapes() -> None:
    pair = draw(5, 37)
    (hidden, projection), (other, teacher) = ((m.hidden, m.projection()) for m in (pair.student, pair.teacher))
    for vocab_size, *arguments in [
        (37, hidden[:, 1:], projection),
        (37, hidden.unsqueeze(0), projection),
        (37, hidden[0], projection),
        (38, hidden, projection),
        (37, hidden, projection, other[:, 1:], teacher),
        (37, hidden, projection, other[1:], teacher),
        (37, hidden, projection, other, Projection(teacher.weight[1:])),
    ]:
        with pytest.raises(ValueError):
            FusedHead(*arguments, vocab_size=vocab_size, backend=BACKEND)


@pytest.mark.parametrize("kind", ["fused", "whole"])
def test_requests_without_an_answer(kind: str) -> None:
    alone, both = getattr(draw(), kind)(teacher=False), getattr(draw(), kind)()
    for head, request in [
        (alone, StatisticsRequest(teacher_entropy=True)),
        (alone, StatisticsRequest(divergence=losses.jsd(0.5))),
        (both, StatisticsRequest(top_k=-1)),
        (both, StatisticsRequest(ids=torch.zeros(1, 2, dtype=torch.long))),
    ]:
        with pytest.raises(ValueError):
            head(request)


# Whole objectives: numbers, memory and cost --------------------------------------------------------------------------

every_objective = pytest.mark.parametrize("objective", ["tsd-kd", "eopd"])


def ask_teacher(pair: Pair, **options: Any) -> PolicyScores:
    """As the student of a head of its own; the policy that sampled is near the student."""
    with torch.no_grad():
        teacher = replace(pair, student=pair.teacher).fused(teacher=False, **options)
        s = teacher(StatisticsRequest(entropy=True, top_k=16, ids=pair.ids(1)))
        old = pair.fused(teacher=False)(StatisticsRequest(ids=pair.ids(1))).logps[:, 0]
    old = old - torch.linspace(-0.1, 0.4, pair.count).to(old)
    return policy_scores(s.entropy, s.logps[:, 0], s.topk_logps, s.topk_ids, old)


def objective_loss(
    objective: str, pair: Pair, fused: bool, answers: PolicyScores, mask: Tensor, **options: Any
) -> Tensor:
    head = pair.fused(teacher=objective == "tsd-kd", **options) if fused else pair.whole(objective == "tsd-kd")
    if objective == "tsd-kd":
        return TSDKDObjective()(head, completions_of(mask)).loss / mask.any(-1).sum()
    return EOPDObjective()(head, CompletionBatch(mask, pair.ids(1)[:, 0], scores=answers)).loss / pair.count


@every_objective
@every_own_mode
def test_objectives_equal_loops_and_finite_differences(objective: str, loss_in_forward: bool) -> None:
    """Responses of one token and of none, more candidates than tokens; the teacher is asked with a head, too."""
    lengths = [1, 3, 0, 1, 2]
    pair = draw(7, 6, (2, 3), (0, 2), {"softcap": 3.0}, spread=1.5).copy(torch.float64)

    def responses(rows: list) -> list[list]:
        it = iter(rows)
        return [[next(it) for _ in range(length)] for length in lengths]

    teacher, constant = (responses(m.logits_loop(m.numbers(), 6, 1.0)) for m in (pair.teacher, pair.student))
    tokens, answers = responses(pair.ids(1)[:, 0].tolist()), ask_teacher(pair, chunk=1)
    old_logps = responses(answers.old_per_token_logps.tolist())

    def reference(numbers: list[float]) -> float:
        student = responses(pair.student.logits_loop(numbers, 6, 1.0))
        if objective == "tsd-kd":
            return ref.tsd_kd_loss(student, teacher, constant_logits=constant)["loss"]
        return ref.eopd_loss(student, teacher, tokens, old_logps)["loss"]

    mask, options = torch.arange(3) < torch.tensor(lengths).unsqueeze(-1), {"loss_in_forward": loss_in_forward}
    loss = objective_loss(objective, pair, True, answers, mask, chunk=1, **options)
    loss.backward()
    gradient = torch.cat([x.flatten() for x in gradients_of(pair).values()])
    expected = torch.tensor(ref.central_difference(reference, pair.student.numbers())).double()
    # the objectives' masks divide in float32
    assert loss.item() == pytest.approx(reference(pair.student.numbers()), rel=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


class Memory(TorchDispatchMode):
    """The largest result of any operation, and the most that the results ever held together, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.peak = self.total = 0
        self.alive: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self.add(x.untyped_storage())
                self.largest = max(self.largest, x.numel() * x.element_size())
        return out

    def add(self, storage: Any) -> None:
        self.largest = max(self.largest, storage.nbytes())
        self.total += storage.nbytes() - self.alive.get(StorageWeakRef(storage), 0)
        self.alive[StorageWeakRef(storage)] = storage.nbytes()
        if self.total > self.peak:  # counted what is gone, too
            self.alive = {storage: size for storage, size in self.alive.items() if not storage.expired()}
            self.total = sum(self.alive.values())
            self.peak = max(self.peak, self.total)


@every_objective
@every_own_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_never_whole(objective: str, loss_in_forward: bool, dtype: torch.dtype) -> None:
    pair = draw(64, 4096, (8, 6), student={"softcap": 3.0}).copy(dtype)
    answers, mask, logits = ask_teacher(pair), torch.ones(8, 8, dtype=torch.bool), 64 * 4096 * dtype.itemsize
    with Memory() as whole:
        objective_loss(objective, pair, False, answers, mask).backward()
    assert whole.largest >= logits and whole.peak >= 2 * logits
    options = {"chunk": SMALL_CHUNK, "loss_in_forward": loss_in_forward}
    with Memory() as fused:
        objective_loss(objective, pair, True, answers, mask, **options).backward()
    gradient = 4096 * 8 * 4  # of the weight, summed in float32
    assert fused.largest <= gradient
    assert fused.peak <= logits / 2 + 2 * gradient


COSTS = [
    ("tsd-kd", {"hidden", "weight"}, 4, 4.5),
    ("tsd-kd", {"hidden"}, 3, 3.4),
    ("eopd", {"hidden", "weight"}, 3, 3.1),
    ("eopd", {"hidden"}, 2, 2.1),
]


@pytest.mark.parametrize(("objective", "trained", "whole", "limit"), COSTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cost(objective: str, trained: set[str], whole: float, limit: float, dtype: torch.dtype) -> None:
    """One product for each model, and the gradients'; a second projection of the selected tokens only."""
    pair = draw(200, 1500, (32, 32), student=PLAIN).copy(dtype)
    for name, leaf in pair.student.leaves.items():
        leaf.requires_grad_(name in trained)
    answers, mask = ask_teacher(pair), torch.ones(4, 50, dtype=torch.bool)

    def products(fused: bool, gradients: bool = True) -> float:
        in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
        with torch.set_grad_enabled(gradients), FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            loss = objective_loss(objective, pair, fused, answers, mask)
            if gradients:
                loss.backward()
        return counter.get_total_flops() / (2 * 200 * 1500 * 32)

    assert products(fused=False) == pytest.approx(whole)  # nothing escapes the counter
    assert whole - 0.01 <= products(fused=True) <= limit
    assert products(fused=True, gradients=False) == pytest.approx(2 if objective == "tsd-kd" else 1)


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@every_own_mode
@pytest.mark.parametrize("backward", [True, False], ids=["after backward", "after forward"])
@pytest.mark.usefixtures("no_collector")
def test_nothing_waits_for_the_garbage_collector(loss_in_forward: bool, backward: bool) -> None:
    """Gigabytes must go with the last reference, not with the next collection."""
    pair = draw()
    derived = replace(pair, student=replace(pair.student, hidden=pair.student.hidden * 1.0))
    answer = derived.fused(loss_in_forward=loss_in_forward)(*own_token_loss(pair))
    tensors = {**{n: x for n, x in vars(answer).items() if isinstance(x, Tensor)}, "hidden": derived.student.hidden}
    storages = {name: StorageWeakRef(x.untyped_storage()) for name, x in tensors.items()}
    if backward:
        (answer.loss + answer.entropy.sum() + answer.topk_logits.sum()).backward()
    del derived, answer, tensors
    assert [name for name, storage in storages.items() if not storage.expired()] == []
