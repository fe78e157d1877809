"""Rollouts: exactly the model's distribution, whatever else is in the batch and whatever the ambient RNG did."""

import math
import random
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

from conftest import build_model
from tsdkd.rollout.base import Completion, SamplingConfig
from tsdkd.rollout.hf import HuggingFaceSampler, sample_completions
from tsdkd.rollout.seeding import RandomStream, prompt_generator

FAMILIES = ("gemma2", "llama", "qwen2", "qwen3")
WIDTHS = (3, 1, 21, 8, 13, 2, 9, 7)  # below, at and above gemma2's sliding window of 8
PROMPTS = [[random.Random(i).randrange(4, 60) for _ in range(width)] for i, width in enumerate(WIDTHS)]
LIMITS = (18, 30, 25, 18, 1, 30, 24, 2)
ROWS = 64
every_family = pytest.mark.parametrize("family", FAMILIES)


def generators(indices: Sequence[int], seed: int = 0, step: int = 0) -> list[torch.Generator]:
    return [prompt_generator(seed, step, i) for i in indices]


def draw(model: Any, indices: Sequence[int], limits: Sequence[int] | None = None, **options: Any) -> list[Completion]:
    """Sample for PROMPTS[i], i in `indices`, each with its own generator and its own limit."""
    own = {"stop_token_ids": {1, 7, 23}, "vocab_size": ROWS}
    seeds = {key: options.pop(key) for key in ("seed", "step") if key in options}
    limits = [LIMITS[i] for i in indices] if limits is None else limits
    return sample_completions(
        model, [PROMPTS[i] for i in indices], limits, generators(indices, **seeds), **{**own, **options}
    )


def next_probs(model: Any, ids: list[int], temperature: float = 1.0, vocab_size: int = ROWS) -> Tensor:
    """The next token's distribution after `ids`, by one plain forward pass, in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1, :vocab_size].double()
    return (logits / temperature).softmax(-1)


def excess(counts: Counter[Any], probs: dict[Any, float]) -> float:
    """Pearson's chi-square as a number of standard deviations above its mean; cells expected below 5 are pooled."""
    draws = sum(counts.values())
    assert set(counts) <= {cell for cell, p in probs.items() if p > 0}, "drawn, though it has no probability"
    cells = [(counts[cell], draws * p) for cell, p in probs.items() if draws * p >= 5]
    rest = (draws - sum(n for n, _ in cells), draws - sum(e for _, e in cells))
    cells += [rest] if rest[1] > 1e-6 else []
    statistic = sum((n - e) ** 2 / e for n, e in cells)
    freedom = max(len(cells) - 1, 1)
    return (statistic - freedom) / math.sqrt(2 * freedom)


def build(family: str) -> Any:
    """`build_model`, or a GPT-2: with absolute positions a row that is shifted by its padding shows."""
    if family != "gpt2":
        return build_model(family)
    torch.manual_seed(0)
    size = {"vocab_size": ROWS, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "initializer_range": 0.5}
    return GPT2LMHeadModel(GPT2Config(**size, eos_token_id=1, bos_token_id=1)).eval()


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_greedy_equals_generate_on_each_prompt_alone(family: str) -> None:
    model = build(family)

    def alone(prompt: list[int], limit: int, stop: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=limit,
            eos_token_id=stop or None,
            pad_token_id=0,
        )
        return out[0, len(prompt) :].tolist()

    model.generation_config.eos_token_id = None
    free = [alone(p, n, []) for p, n in zip(PROMPTS, LIMITS, strict=True)]
    stop = sorted({free[0][3], free[2][10], free[5][0]})  # rows end at different lengths, so the batch shrinks
    expected = [alone(p, n, stop) for p, n in zip(PROMPTS, LIMITS, strict=True)]
    got = sample_completions(model, PROMPTS, LIMITS, None, stop_token_ids=set(stop), vocab_size=ROWS)
    assert [c.ids for c in got] == expected
    assert [c.stopped for c in got] == [ids[-1] in stop for ids in expected]
    assert len({len(ids) for ids in expected}) >= 4 and len({c.stopped for c in got}) == 2
    unstopped = sample_completions(model, PROMPTS, LIMITS, None, stop_token_ids=set(), vocab_size=ROWS)
    assert [c.ids for c in unstopped] == free


@every_family
def test_a_completion_depends_on_its_own_prompt_only(family: str) -> None:
    model = build_model(family, seed=1)
    everything = range(len(PROMPTS))
    together = draw(model, everything)
    assert len({len(c.ids) for c in together}) >= 4, "all rows end together: nothing is tested"
    assert [draw(model, [i])[0] for i in everything] == together
    backwards = draw(model, list(reversed(everything)))
    assert list(reversed(backwards)) == together
    assert draw(model, [6, 2, 3]) == [together[i] for i in (6, 2, 3)]


def test_a_longer_neighbour_does_not_change_the_draws() -> None:
    """The longest limit of the batch decides how many numbers are drawn beforehand."""
    model = build_model("qwen3", seed=2)
    for limit in (1, 2, 15, 16, 17, 24):
        (short,) = draw(model, [2], [limit], stop_token_ids=set())
        beside = draw(model, [2, 0], [limit, 40], stop_token_ids=set())
        assert short.ids == beside[0].ids
        assert len(short.ids) == limit and len(beside[1].ids) == 40


def test_ambient_rng_is_neither_read_nor_advanced() -> None:
    model = build_model("llama", seed=3)
    results = []
    for ambient in (0, 12345):
        torch.manual_seed(ambient)
        before = torch.get_rng_state()
        results.append(draw(model, range(len(PROMPTS)), top_p=0.9))
        assert torch.equal(torch.get_rng_state(), before)
    assert results[0] == results[1]


def test_seed_step_and_index_decide_the_draw() -> None:
    model = build_model("qwen2", seed=4)

    def completion(seed: int, step: int, index: int) -> tuple[int, ...]:
        generator = prompt_generator(seed, step, index)
        options: dict[str, Any] = {"stop_token_ids": set(), "vocab_size": ROWS}
        return tuple(sample_completions(model, PROMPTS[:1], [16], [generator], **options)[0].ids)

    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (2, 0, 0), (0, 0, 2), (42, 7, 3), (42, 3, 7)]
    draws = [completion(*key) for key in keys]
    assert len(set(draws)) == len(keys)
    assert [completion(*key) for key in keys] == draws


def test_keys_give_distinct_streams() -> None:
    keys = [(s, t, i, u) for s in range(4) for t in range(5) for i in range(20) for u in RandomStream]
    first = {float(torch.rand(1, dtype=torch.float64, generator=prompt_generator(*key))) for key in keys}
    assert len(first) == len(keys)


@every_family
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_frequencies_match_the_softmax(family: str, temperature: float) -> None:
    model = build_model(family, seed=5)
    prompt, draws = PROMPTS[0], 6000
    options: dict[str, Any] = {"stop_token_ids": {1}, "vocab_size": ROWS, "temperature": temperature}
    got = sample_completions(model, [prompt] * draws, [1] * draws, generators(range(draws)), **options)
    counts = Counter(c.ids[0] for c in got)
    probs = dict(enumerate(next_probs(model, prompt, temperature).tolist()))
    assert excess(counts, probs) < 5
    other = dict(enumerate(next_probs(model, prompt, 1.7 - temperature).tolist()))
    assert excess(counts, other) > 20, "the draws can't tell the two temperatures apart: nothing is tested"


@pytest.mark.parametrize("varies", ["seed", "step", "index"])
def test_consecutive_tokens_are_jointly_right_whatever_part_of_the_key_varies(varies: str) -> None:
    """Two tokens over a vocabulary of five: twenty-five cells, so related generators would show."""
    model, prompt, draws, size = build_model("qwen3", seed=6), PROMPTS[5], 5000, 5
    keys = [{"seed": 3, "step": 4, "index": 5, varies: i} for i in range(draws)]
    rng = [prompt_generator(**key) for key in keys]
    got = sample_completions(model, [prompt] * draws, [2] * draws, rng, stop_token_ids=set(), vocab_size=size)
    first = next_probs(model, prompt, vocab_size=size).tolist()
    second = [next_probs(model, [*prompt, a], vocab_size=size).tolist() for a in range(size)]
    probs = {(a, b): first[a] * second[a][b] for a in range(size) for b in range(size)}
    assert excess(Counter((c.ids[0], c.ids[1]) for c in got), probs) < 5


@pytest.mark.parametrize("top_p", [0.3, 0.6, 0.9])
def test_top_p_keeps_exactly_the_nucleus(top_p: float) -> None:
    model, prompt, draws, size = build_model("qwen2", seed=7), PROMPTS[3], 5000, 12
    probs = next_probs(model, prompt, 1.3, size)
    nucleus, mass = [], 0.0
    for token in sorted(range(size), key=lambda v: -float(probs[v])):
        if mass >= top_p:
            break
        nucleus.append(token)
        mass += float(probs[token])
    assert 1 <= len(nucleus) < size and float(probs[nucleus].min()) * draws > 20 * mass
    options: dict[str, Any] = {"stop_token_ids": set(), "vocab_size": size, "temperature": 1.3, "top_p": top_p}
    got = sample_completions(model, [prompt] * draws, [1] * draws, generators(range(draws)), **options)
    counts = Counter(c.ids[0] for c in got)
    assert set(counts) == set(nucleus)
    assert excess(counts, {v: float(probs[v]) / mass for v in nucleus}) < 5


@pytest.mark.parametrize(("top_p", "kept"), [(1e-9, 1), (0.25, 1), (0.5, 2), (0.51, 3), (0.75, 3), (1.0, 4)])
def test_top_p_at_the_edge_of_a_token(top_p: float, kept: int) -> None:
    """Four equally likely tokens: the smallest set whose mass reaches top_p."""
    model = build_model("llama")
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    options: dict[str, Any] = {"stop_token_ids": set(), "vocab_size": 4, "top_p": top_p}
    got = sample_completions(model, [PROMPTS[0]] * 200, [1] * 200, generators(range(200)), **options)
    assert len({c.ids[0] for c in got}) == kept


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("size", [1, 10, 60])
def test_ids_outside_the_shared_vocabulary_are_never_sampled(size: int, greedy: bool) -> None:
    model = build_model("qwen3", seed=8)
    model.get_output_embeddings().weight.data[size:] *= 3  # what lies outside would often win
    prompts, limits = PROMPTS * 8, list(LIMITS) * 8
    rng = None if greedy else generators(range(len(prompts)))
    inside = sample_completions(model, prompts, limits, rng, stop_token_ids=set(), vocab_size=size, temperature=2.0)
    assert all(0 <= token < size for c in inside for token in c.ids)
    rng = None if greedy else generators(range(len(prompts)))
    all_ids = sample_completions(model, prompts, limits, rng, stop_token_ids=set(), vocab_size=ROWS, temperature=2.0)
    assert any(token >= size for c in all_ids for token in c.ids), "nothing is tested"


@every_family
def test_stop_token_ends_a_completion_and_limits_are_each_row_s_own(family: str) -> None:
    model = build_model(family, seed=9)
    stop, count = {1, 9, 17, 30}, 96
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
    limits = [1 + i % 14 for i in range(count)]
    got = sample_completions(
        model, prompts, limits, generators(range(count)), stop_token_ids=stop, vocab_size=ROWS, temperature=2.0
    )
    for completion, limit in zip(got, limits, strict=True):
        assert 1 <= len(completion.ids) <= limit
        assert not stop & set(completion.ids[:-1])
        assert completion.stopped == (completion.ids[-1] in stop)
        assert completion.stopped or len(completion.ids) == limit
    at_limit = [c.stopped for c, limit in zip(got, limits, strict=True) if len(c.ids) == limit]
    early = [c for c, limit in zip(got, limits, strict=True) if len(c.ids) < limit]
    assert set(at_limit) == {True, False} and early, "one of the three ways to end doesn't occur"


def test_the_checkpoint_s_generation_config_has_no_effect() -> None:
    plain, tuned = build_model("qwen2", seed=10), build_model("qwen2", seed=10)
    settings = {"repetition_penalty": 5.0, "top_k": 1, "top_p": 0.1, "temperature": 0.01, "do_sample": False}
    settings |= {"max_new_tokens": 2, "eos_token_id": list(range(60)), "no_repeat_ngram_size": 1, "min_new_tokens": 9}
    for name, value in settings.items():
        setattr(tuned.generation_config, name, value)
    everything = range(len(PROMPTS))
    assert draw(tuned, everything) == draw(plain, everything)
    options: dict[str, Any] = {"stop_token_ids": {1}, "vocab_size": ROWS}
    assert sample_completions(tuned, PROMPTS, LIMITS, None, **options) == sample_completions(
        plain, PROMPTS, LIMITS, None, **options
    )


def test_finished_rows_leave_the_batch() -> None:
    model = build_model("qwen3", seed=11)
    rows: list[int] = []  # of each forward, whoever calls it

    class Embedded(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if op is torch.ops.aten.embedding.default:
                rows.append(len(args[1]))
            return op(*args, **(kwargs or {}))

    limits = [2] * 15 + [40]
    with Embedded():
        sample_completions(
            model, [PROMPTS[0]] * 16, limits, generators(range(16)), stop_token_ids=set(), vocab_size=ROWS
        )
    assert 40 <= len(rows) <= 46 and sum(rows) < 2.5 * sum(limits)


def test_a_row_that_has_ended_asks_for_no_position_beyond_the_model_s() -> None:
    """One of sixteen rows fills the context of 128 and stays in the batch for a while."""
    model, prompts = build("gpt2"), [PROMPTS[0]] * 15 + [list(range(4, 59)) * 2]
    limits = [40] * 15 + [128 - len(prompts[-1])]
    got = sample_completions(model, prompts, limits, generators(range(16)), stop_token_ids=set(), vocab_size=ROWS)
    assert [len(c.ids) for c in got] == limits


def test_a_rollout_casts_each_weight_once() -> None:
    """Float32 weights under bfloat16 autocast; the completions are those of one autocast a token."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare_model(build_model("qwen3", seed=13))
    shapes = {id(w): tuple(w.shape) for name, w in model.named_parameters() if name.endswith("_proj.weight")}

    class Casts(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.of: Counter[int] = Counter()

        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if op is torch.ops.aten._to_copy.default and id(args[0]) in shapes:
                self.of[id(args[0])] += 1
            return op(*args, **(kwargs or {}))

    stop, keys = frozenset({1, 7, 23}), [(0, 0, i) for i in range(len(PROMPTS))]
    with Casts() as casts:
        together = HuggingFaceSampler(accelerator, SamplingConfig(stop, ROWS)).generate(model, PROMPTS, LIMITS, keys)
    assert casts.of == dict.fromkeys(shapes, 1)
    with Casts() as casts:
        alone = draw(model, range(len(PROMPTS)))
    assert min(casts.of.values()) > 10 and together == alone
    AcceleratorState._reset_state(reset_partial_state=True)


def test_weights_get_no_gradient_and_the_mode_stays() -> None:
    model = build_model("llama", seed=12)
    draw(model, [0, 1])
    assert not model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.filterwarnings("error::FutureWarning")
def test_a_student_with_gradient_checkpointing_samples_without_deprecated_names(adapters: bool) -> None:
    """And is as before afterwards: in training mode, with checkpointing on."""
    model: Any = build_model("qwen3", seed=14)
    if adapters:
        peft = pytest.importorskip("peft")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's own
            model = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, target_modules=["q_proj"]))
    expected = draw(model, range(len(PROMPTS)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.gradient_checkpointing_enable()
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    assert layers
    sampler = HuggingFaceSampler(Accelerator(cpu=True), SamplingConfig(frozenset({1, 7, 23}), ROWS))
    keys = [(0, 0, i) for i in range(len(PROMPTS))]
    assert sampler.generate(model.train(), PROMPTS, LIMITS, keys) == expected
    assert model.training and all(layer.gradient_checkpointing for layer in layers)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "k_proj"]},
    ],
)
def test_an_engine_gets_merged_weights_and_the_student_keeps_its_own_bitwise(options: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    from tsdkd.rollout.vllm.weights import iter_merged_parameters

    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=32, init_lora_weights=False, task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(build_model("llama", seed=5), config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected_logits = model(torch.tensor([PROMPTS[2]])).logits

    plain = build_model("llama", seed=6)
    handed_out = dict(iter_merged_parameters(model))
    assert handed_out.keys() == dict(plain.named_parameters()).keys()
    plain.load_state_dict(handed_out)
    torch.testing.assert_close(plain(torch.tensor([PROMPTS[2]])).logits, expected_logits, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    torch.testing.assert_close(model(torch.tensor([PROMPTS[2]])).logits, expected_logits, rtol=0, atol=0)
