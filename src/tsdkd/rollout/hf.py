"""Rollouts with a transformers model: batched, KV-cached, finished sequences leave the batch.

`model.generate` can't seed each prompt by itself, keeps finished rows in the batch, and takes whatever the
checkpoint's generation config says (Qwen2.5 ships a repetition penalty); this loop samples from the softmax alone.
"""

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.models.utils import unwrap_model_for_generation

from .base import Completion, Key, SamplingConfig
from .categorical import sample_tokens
from .seeding import prompt_generator

_TOKENS_PER_SYNC = 16  # on a GPU, where each look waits until all tokens are computed


class HuggingFaceSampler:
    """The student samples by itself, between its training steps: there is no second copy of its weights.

    Args:
        accelerator: knows the wrappers; under ZeRO-3 the parameters are gathered for the rollout.
        sampling: how completions are drawn.
        gradient_checkpointing_kwargs: with which checkpointing is turned on again.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        sampling: SamplingConfig,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.accelerator, self.sampling = accelerator, sampling
        self.gradient_checkpointing_kwargs = gradient_checkpointing_kwargs

    needs_weight_check = False

    def update(self, weights: Hashable) -> bool:
        """See `Sampler`."""
        return False

    def generate(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        keys: Sequence[Key],
    ) -> list[Completion]:
        """See `Sampler`."""
        was_training = model.training
        model.eval()
        with self._unwrap_for_generation(model) as unwrapped:
            generators = [prompt_generator(*key) for key in keys]
            completions = sample_completions(unwrapped, prompts, limits, generators, **vars(self.sampling))
        model.train(was_training)
        return completions

    @contextmanager
    def _unwrap_for_generation(self, model: nn.Module) -> Iterator[PreTrainedModel]:
        """The model, unwrapped. The wrapper of its forward leaves autocast after each token, and torch forgets the
        weights in half precision when the outermost autocast is left: hence one around all tokens."""
        kwargs = self.gradient_checkpointing_kwargs
        with (
            unwrap_model_for_generation(model, self.accelerator, gradient_checkpointing_kwargs=kwargs) as unwrapped,
            self.accelerator.autocast(),
        ):
            yield unwrapped


@torch.no_grad()
def sample_completions(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    generators: Sequence[torch.Generator] | None,
    *,
    stop_ids: Collection[int],
    vocab_size: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> list[Completion]:
    """Sample one completion for each prompt.

    Args:
        model: in eval mode, unwrapped.
        prompts: token ids, none empty, of any lengths.
        limits: each completion's maximum length, tokens, at least 1.
        generators: one a prompt (see `prompt_generator`); None decodes greedily.
        stop_ids, vocab_size, temperature, top_p: see `Sampling`.

    Returns:
        Completions in the order of `prompts`.
    """

    def choose(logits: list[Tensor], uniform: Tensor | None) -> Tensor:
        scaled = logits[0] if temperature == 1.0 else logits[0] / temperature
        return scaled.argmax(-1) if uniform is None else sample_tokens(scaled, uniform[:, 0], top_p)[0]

    streams = None if generators is None else [(g,) for g in generators]
    return sample_from_models([model], prompts, limits, streams, choose, stop_ids=stop_ids, vocab_size=vocab_size)


@torch.no_grad()
def sample_from_models(
    models: Sequence[PreTrainedModel],
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    generators: Sequence[Sequence[torch.Generator]] | None,
    choose: Callable[[list[Tensor], Tensor | None], Tensor],
    *,
    stop_ids: Collection[int],
    vocab_size: int,
) -> list[Completion]:
    """Sample one completion for each prompt, each token from what several models say.

    Args:
        models: in eval mode, unwrapped.
        prompts, limits, stop_ids, vocab_size: see `sample_completions`.
        generators: for each prompt as many as a token takes uniform numbers; None for none.
        choose: the models' logits, float32 `[B, V]` each, and uniform numbers in [0, 1), float64 `[B, numbers]` (None
            without generators) -> the tokens `[B]`.

    Returns:
        Completions in the order of `prompts`.
    """
    device = next(models[0].parameters()).device
    longest = max(limits)
    uniform = None
    if generators is not None:
        # drawn beforehand, each number from its own stream: the same on every device, whatever else is in the batch
        uniforms = [[torch.rand(longest, dtype=torch.float64, generator=g) for g in streams] for streams in generators]
        uniform = torch.stack([torch.stack(numbers, dim=-1) for numbers in uniforms]).to(device, non_blocking=True)
    stop = frozenset(stop_ids)
    completions = [Completion([], False) for _ in prompts]
    rows = list(range(len(prompts)))  # the prompts that are still in the batch
    input_ids, attention_mask, position_ids = (x.to(device, non_blocking=True) for x in _left_pad(prompts, limits))
    width = input_ids.shape[1]
    caches: list[Any] = [None] * len(models)
    unread: list[Tensor] = []  # tokens that the host hasn't looked at
    every = 1 if device.type == "cpu" else _TOKENS_PER_SYNC
    next_sync = min(every, longest)
    # without padding there is no mask: transformers would wait for the device to find that out
    padded = min(len(prompts[row]) for row in rows) < width
    for t in range(longest):
        start, end = width + t - input_ids.shape[1], width + t
        outputs = [
            model(
                input_ids=input_ids,
                attention_mask=attention_mask[:, :end] if padded else None,
                position_ids=position_ids[:, start:end],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            for model, cache in zip(models, caches, strict=True)
        ]
        caches = [_mark_compileable(output.past_key_values) for output in outputs]
        logits = [output.logits[:, -1, :vocab_size].float() for output in outputs]
        next_ids = choose(logits, None if uniform is None else uniform[:, t])
        unread.append(next_ids)
        input_ids = next_ids.unsqueeze(-1)
        if t + 1 < next_sync:
            continue
        # the only place where the host waits for the device
        unfinished = _append_tokens(torch.stack(unread, dim=-1).tolist(), rows, completions, limits, stop)
        unread.clear()
        if not unfinished:
            break
        next_sync = min(t + 1 + every, max(limits[rows[position]] for position in unfinished))
        if len(unfinished) <= 0.875 * len(rows):  # not at every finish: selecting copies the whole cache
            rows = [rows[position] for position in unfinished]
            padded = min(len(prompts[row]) for row in rows) < width
            keep = torch.tensor(unfinished).to(device, non_blocking=True)
            input_ids, attention_mask, position_ids = (x[keep] for x in (input_ids, attention_mask, position_ids))
            uniform = None if uniform is None else uniform[keep]
            for cache in caches:
                cache.batch_select_indices(keep)
    return completions


def _append_tokens(
    tokens: list[list[int]],
    rows: list[int],
    completions: list[Completion],
    limits: Sequence[int],
    stop: Collection[int],
) -> list[int]:
    """Append the next tokens of `rows` to their completions, up to the end of each; the places of those that haven't
    ended."""
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


def _mark_compileable(cache: Any) -> Any:
    """The cache, marked as those are for which transformers makes a token's mask without a look at what it masks."""
    for layer in getattr(cache, "layers", ()):
        layer.is_compileable = True
    return cache


def _left_pad(prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids `[B, longest prompt]`; mask and positions, `[B, longest prompt + longest limit]`, of all that will come."""
    width = max(len(p) for p in prompts)
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
    own = torch.arange(width + max(limits)) - torch.tensor([[width - len(p)] for p in prompts])
    # a row that has ended but is still in the batch must not run out of the model's positions
    last = torch.tensor([[len(p) + limit - 1] for p, limit in zip(prompts, limits, strict=True)])
    return ids, (own >= 0).long(), own.clamp(min=0).minimum(last)
