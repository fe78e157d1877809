"""Rollouts with a transformers model: batched, with a KV cache; finished sequences leave the batch.

`model.generate` can't seed each prompt separately, keeps finished rows in the batch, and applies the checkpoint's
generation config (Qwen2.5 ships a repetition penalty). This loop samples from the plain softmax.
"""

from collections.abc import Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.models.utils import add_hooks, remove_hooks

from .base import Completion, SamplingConfig, SeedKey, TokenChoice
from .captured import CapturedStep
from .categorical import sample_tokens
from .decoding import DecodingBatch
from .seeding import RandomStream, prompt_generator
from .step import DecodingStep

_TOKENS_PER_SYNC = 16  # on a GPU, where each check waits for all tokens to be computed
# Finished rows leave the batch when at most this share of it is unfinished: each time copies the full cache, and on a
# GPU captures the step again, which takes 0.1 to 0.8 s, while a step takes nearly as long with half of the rows.
_SHARE_ON_CPU, _SHARE_ON_GPU = 0.875, 0.5


class HuggingFaceSampler:
    """Samples with the student itself, between training steps, without a second copy of its weights.

    Args:
        accelerator: unwraps the model; with ZeRO-3, the parameters are gathered for the rollout.
        sampling: sampling parameters.
    """

    needs_weight_check = False
    streams: tuple[RandomStream, ...] = (RandomStream.SAMPLING,)  # one per uniform number of a token

    def __init__(self, accelerator: Accelerator, sampling: SamplingConfig) -> None:
        self.accelerator, self.sampling = accelerator, sampling
        self._captured: CapturedStep | None = None

    def update(self, weights_version: Hashable) -> bool:
        """See `Sampler`."""
        return False

    def generate(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        seed_keys: Sequence[SeedKey],
    ) -> list[Completion]:
        """See `Sampler`."""
        was_training = model.training
        model.eval()
        # The wrapper of the model's forward exits autocast after each token, and torch drops its half-precision weight
        # copies when the outermost autocast exits. One autocast around all tokens keeps them.
        with _unwrapped_for_generation(model, self.accelerator) as unwrapped, self.accelerator.autocast():
            if self._captured is None or self._captured.step.models[0] is not unwrapped:
                self._captured = self._make_step(unwrapped)
            generators = [[prompt_generator(*key, stream) for stream in self.streams] for key in seed_keys]
            completions = sample_with_step(
                self._captured, prompts, limits, generators, stop_token_ids=self.sampling.stop_token_ids
            )
        model.train(was_training)
        return completions

    def _make_step(self, student: PreTrainedModel) -> CapturedStep:
        sampling = self.sampling
        return make_step(
            student, vocab_size=sampling.vocab_size, temperature=sampling.temperature, top_p=sampling.top_p
        )


@contextmanager
def _unwrapped_for_generation(model: nn.Module, accelerator: Accelerator) -> Iterator[PreTrainedModel]:
    """Yield the unwrapped model; with ZeRO-3, with gathered parameters and without the hooks that gather them again.

    TRL's `unwrap_model_for_generation` also toggles gradient checkpointing. This is not needed here, because layers of
    transformers do not checkpoint activations in eval mode.
    """
    unwrapped: PreTrainedModel = accelerator.unwrap_model(model)
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None or plugin.zero_stage != 3:
        yield unwrapped
        return
    import deepspeed  # an extra

    with deepspeed.zero.GatheredParameters(model.parameters()):
        remove_hooks(model)
        try:
            yield unwrapped
        finally:
            add_hooks(model)


@torch.no_grad()
def sample_completions(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    generators: Sequence[torch.Generator] | None,
    *,
    stop_token_ids: Collection[int],
    vocab_size: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> list[Completion]:
    """Sample one completion for each prompt of a single batch. For several batches, make the step once.

    Args:
        model: an unwrapped model in eval mode.
        prompts: token ids, non-empty, of any lengths.
        limits: maximum length of each completion, tokens, at least 1.
        generators: one per prompt (see `prompt_generator`); None decodes greedily.
        stop_token_ids, vocab_size, temperature, top_p: see `SamplingConfig`.

    Returns:
        Completions in the order of `prompts`.
    """
    step = make_step(model, vocab_size=vocab_size, temperature=temperature, top_p=top_p, is_greedy=generators is None)
    streams = None if generators is None else [(g,) for g in generators]
    return sample_with_step(step, prompts, limits, streams, stop_token_ids=stop_token_ids)


def make_step(
    model: PreTrainedModel, *, vocab_size: int, temperature: float = 1.0, top_p: float = 1.0, is_greedy: bool = False
) -> CapturedStep:
    """Make the step that `sample_with_step` repeats. Use one for all batches: torch never frees a capture on a CPU.

    Args:
        model: an unwrapped model in eval mode.
        vocab_size, temperature, top_p: see `SamplingConfig`.
        is_greedy: whether to choose the most probable tokens, without generators.
    """
    choose = _greedy_choice if is_greedy else _sampling_choice(temperature, top_p)
    return CapturedStep(DecodingStep([model], choose, vocab_size))


def _greedy_choice(logits: list[Tensor], uniform: Tensor) -> Tensor:
    return logits[0].argmax(-1)


def _sampling_choice(temperature: float, top_p: float) -> TokenChoice:
    def choose(logits: list[Tensor], uniform: Tensor) -> Tensor:
        scaled = logits[0] if temperature == 1.0 else logits[0] / temperature
        return sample_tokens(scaled, uniform[:, 0], top_p)[0]

    return choose


@torch.no_grad()
def sample_with_step(
    captured: CapturedStep,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    generators: Sequence[Sequence[torch.Generator]] | None,
    *,
    stop_token_ids: Collection[int],
) -> list[Completion]:
    """Sample one completion for each prompt.

    Args:
        captured: chooses the next tokens with one or more models.
        prompts, limits, stop_token_ids: see `sample_completions`.
        generators: for each prompt, one generator per uniform number that a token needs; None for none.

    Returns:
        Completions in the order of `prompts`.
    """
    captured.start()
    try:
        return _sample(captured, prompts, limits, generators, frozenset(stop_token_ids))
    finally:
        captured.start()  # free the caches and the graph before training


def _sample(
    captured: CapturedStep,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    generators: Sequence[Sequence[torch.Generator]] | None,
    stop: frozenset[int],
) -> list[Completion]:
    device = captured.step.device
    batch = DecodingBatch.start(captured, prompts, limits, generators, device)
    completions = [Completion([], False) for _ in prompts]
    longest = max(limits)
    unread: list[Tensor] = []  # tokens that the host hasn't read yet
    tokens_per_sync, share = (1, _SHARE_ON_CPU) if device.type == "cpu" else (_TOKENS_PER_SYNC, _SHARE_ON_GPU)
    next_sync = min(tokens_per_sync, longest)
    for t in range(longest):
        unread.append(batch.next_tokens())
        if t + 1 < next_sync:
            continue
        # the only place where the host waits for the device
        tokens = torch.stack(unread, dim=-1).tolist()
        unread.clear()
        unfinished = _append_tokens(tokens, batch.rows, completions, limits, stop)
        if not unfinished:
            break
        next_sync = min(t + 1 + tokens_per_sync, max(limits[batch.rows[position]] for position in unfinished))
        if len(unfinished) <= share * len(batch.rows):
            batch.select(unfinished)
    return completions


def _append_tokens(
    tokens: list[list[int]],
    rows: list[int],
    completions: list[Completion],
    limits: Sequence[int],
    stop: Collection[int],
) -> list[int]:
    """Append the next tokens of `rows` to their completions, up to the end of each completion.

    Returns:
        The positions in the batch of the unfinished completions.
    """
    unfinished = []
    for position, row in enumerate(rows):
        completion = completions[row]
        for token in tokens[position]:
            if completion.stopped or len(completion.ids) == limits[row]:
                break
            completion.ids.append(token)
            completion.stopped = token in stop
        if not completion.stopped and len(completion.ids) < limits[row]:
            unfinished.append(position)
    return unfinished
