"""A batch of sequences being decoded by one or more transformers models, with their KV caches."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .captured import CapturedStep
from .step import supports_in_place

_MIN_TOKENS = 16  # fewer are not worth a capture
_GROWTH = {"cpu": 32, "other": 256}  # slots; on a GPU, a graph has to be captured again


@dataclass
class DecodingBatch:
    """The unfinished sequences, left-padded, and the state needed for their next tokens.

    The first step, and all steps of models that do not support in-place caches, use transformers' own caches.

    Attributes:
        captured: computes the next tokens.
        prompt_lengths: lengths of all prompts, tokens.
        rows: indices of the prompts in the batch.
        input_ids: `[B, T]`, the tokens that are not yet in the caches: first the prompts, then the last tokens.
        attention_mask, position_ids: `[B, longest prompt + longest limit]`, for all tokens including future ones.
        uniform: `[B, longest limit, numbers]`, float64; `[B, longest limit, 0]` without generators.
        caches: transformers' caches, one per model; None before the first step.
        is_padded: whether any row has padding. If not, no mask is passed, because transformers would synchronize with
            the device to inspect it.
        num_sampled: number of tokens sampled so far for each completion.
        buffers: keys and values of each layer of each model, `[B, heads, capacity, D]`; none while `caches` is used.
        visible: `[B, 1, 1, capacity]`, see `DecodingStep`.
        slot: `[1]`, see `DecodingStep`.
    """

    captured: CapturedStep
    prompt_lengths: list[int]
    rows: list[int]
    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    uniform: Tensor
    caches: list[Any]
    is_padded: bool
    num_sampled: int = 0
    buffers: list[Tensor] = field(default_factory=list)
    visible: Any = None
    slot: Any = None

    @classmethod
    def start(
        cls,
        captured: CapturedStep,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        generators: Sequence[Sequence[torch.Generator]] | None,
        device: torch.device,
    ) -> "DecodingBatch":
        """Create the batch of all prompts on the device."""
        # draw in advance, each number from its own stream: independent of the device and of the rest of the batch
        streams = generators if generators is not None else [()] * len(prompts)
        uniform = torch.stack([_draw_uniform(of_prompt, max(limits)) for of_prompt in streams])
        uniform = uniform.to(device, non_blocking=True)
        input_ids, mask, position_ids = (x.to(device, non_blocking=True) for x in _left_pad(prompts, limits))
        lengths = [len(prompt) for prompt in prompts]
        return cls(
            captured,
            lengths,
            list(range(len(prompts))),
            input_ids,
            mask,
            position_ids,
            uniform,
            [None] * len(captured.step.models),
            is_padded=min(lengths) < max(lengths),
        )

    def next_tokens(self) -> Tensor:
        """Sample and append the next token of each row; returns them, `[B]`, without device synchronization."""
        end = max(self.prompt_lengths) + self.num_sampled
        if self.buffers:
            next_ids = self._step_in_place(end)
        else:
            next_ids = self._step_with_caches(end)
            if self.num_sampled == 0 and self.uniform.shape[1] >= _MIN_TOKENS:
                self._use_buffers(end)
        self.input_ids = next_ids.unsqueeze(-1)
        self.num_sampled += 1
        return next_ids

    def _step_with_caches(self, end: int) -> Tensor:
        start, step = end - self.input_ids.shape[1], self.captured.step
        outputs = [
            model(
                input_ids=self.input_ids,
                attention_mask=self.attention_mask[:, :end] if self.is_padded else None,
                position_ids=self.position_ids[:, start:end],
                use_cache=True,
                logits_to_keep=1,
                **{name: cache},
            )
            for model, name, cache in zip(step.models, step.cache_names, self.caches, strict=True)
        ]
        self.caches = [_mark_compileable(output[name]) for output, name in zip(outputs, step.cache_names, strict=True)]
        logits = [output.logits[:, -1, : step.vocab_size].float() for output in outputs]
        return step.choose(logits, self.uniform[:, self.num_sampled])

    def _step_in_place(self, end: int) -> Tensor:
        if end > self.visible.shape[-1]:
            self._grow(end)
        small = (self.input_ids, self.position_ids[:, end - 1 : end], self.slot, self.uniform[:, self.num_sampled])
        next_ids = self.captured(*small, self.visible, *self.buffers)
        self.slot = self.slot + 1
        return next_ids

    def _use_buffers(self, end: int) -> None:
        """Move keys and values to buffers that are written in place, if all models support it."""
        models, length = self.captured.step.models, self.attention_mask.shape[1]
        if not all(supports_in_place(m, cache, length) for m, cache in zip(models, self.caches, strict=True)):
            return
        self.buffers = [
            states for cache in self.caches for layer in cache.layers for states in (layer.keys, layer.values)
        ]
        self.caches = []
        self.slot = self.position_ids.new_full((1,), end)
        self._grow(end + 1)

    def _grow(self, length: int) -> None:
        """Give the buffers capacity for at least `length` tokens."""
        growth = _GROWTH.get(self.input_ids.device.type, _GROWTH["other"])
        capacity = min(-(-length // growth) * growth, self.attention_mask.shape[1])
        self.captured.release()
        for i, buffer in enumerate(self.buffers):  # one after the other: all of them twice may not fit
            self.buffers[i] = _extend(buffer, capacity)
        self.visible = self.attention_mask[:, None, None, :capacity].bool()

    def select(self, positions: list[int]) -> None:
        """Keep only the rows at these positions of the batch."""
        self.rows = [self.rows[position] for position in positions]
        self.is_padded = min(self.prompt_lengths[row] for row in self.rows) < max(self.prompt_lengths)
        keep = torch.tensor(positions).to(self.input_ids.device, non_blocking=True)
        self.input_ids, self.attention_mask = self.input_ids[keep], self.attention_mask[keep]
        self.position_ids = self.position_ids[keep]
        self.uniform = self.uniform[keep]
        for cache in self.caches:
            cache.reorder_cache(keep)  # which all kinds of layers have
        self.captured.release()
        for i in range(len(self.buffers)):
            self.buffers[i] = self.buffers[i][keep]
        self.visible = None if self.visible is None else self.visible[keep]


def _extend(states: Tensor, capacity: int) -> Tensor:
    """Extend keys or values `[B, heads, length, D]` with zeros to `capacity` tokens."""
    extended = states.new_zeros(*states.shape[:2], capacity, states.shape[-1])
    extended[:, :, : states.shape[2]] = states
    return extended


def _draw_uniform(streams: Sequence[torch.Generator], count: int) -> Tensor:
    """Draw `[count, streams]`, float64 in [0, 1)."""
    numbers = [torch.rand(count, dtype=torch.float64, generator=g) for g in streams]
    return torch.stack(numbers, dim=-1) if numbers else torch.empty(count, 0, dtype=torch.float64)


def _mark_compileable(cache: Any) -> Any:
    """Mark the cache as compileable, so that transformers creates the mask without inspecting its values."""
    for layer in getattr(cache, "layers", ()):
        if not isinstance(getattr(type(layer), "is_compileable", None), property):  # of linear attention: fixed
            layer.is_compileable = True
    return cache


def _left_pad(prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids `[B, longest prompt]`, and mask and positions `[B, longest prompt + longest limit]`."""
    width = max(len(p) for p in prompts)
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
    position_ids = torch.arange(width + max(limits)) - torch.tensor([[width - len(p)] for p in prompts])
    # a finished row that is still in the batch must not exceed the model's positions
    last = torch.tensor([[len(p) + limit - 1] for p, limit in zip(prompts, limits, strict=True)])
    return ids, (position_ids >= 0).long(), position_ids.clamp(min=0).minimum(last)
