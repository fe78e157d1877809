"""A batch of sequences being decoded by one or more transformers models, with their KV caches."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..models.loading import unwrap_peft
from .base import TokenChoice


@dataclass
class DecodingBatch:
    """The unfinished sequences, left-padded, and the state needed for their next tokens.

    Attributes:
        models: see `sample_from_models`.
        cache_names: name of the cache argument of each model's forward.
        prompt_lengths: lengths of all prompts, tokens.
        rows: indices of the prompts in the batch.
        input_ids: `[B, T]`, the tokens that are not yet in the caches: first the prompts, then the last tokens.
        attention_mask, position_ids: `[B, longest prompt + longest limit]`, for all tokens including future ones.
        uniform: `[B, longest limit, numbers]`, float64; `[B, longest limit, 0]` without generators.
        caches: one per model; None before the first step.
        is_padded: whether any row has padding. If not, no mask is passed, because transformers would synchronize with
            the device to inspect it.
        num_sampled: number of tokens sampled so far for each completion.
    """

    models: Sequence[PreTrainedModel]
    cache_names: list[str]
    prompt_lengths: list[int]
    rows: list[int]
    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    uniform: Tensor
    caches: list[Any]
    is_padded: bool
    num_sampled: int = 0

    @classmethod
    def start(
        cls,
        models: Sequence[PreTrainedModel],
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
            models,
            [_cache_argument(model) for model in models],
            lengths,
            list(range(len(prompts))),
            input_ids,
            mask,
            position_ids,
            uniform,
            [None] * len(models),
            is_padded=min(lengths) < max(lengths),
        )

    def step(self, choose: TokenChoice, vocab_size: int) -> Tensor:
        """Sample and append the next token of each row; returns them, `[B]`, without device synchronization."""
        end = max(self.prompt_lengths) + self.num_sampled
        start = end - self.input_ids.shape[1]
        outputs = [
            model(
                input_ids=self.input_ids,
                attention_mask=self.attention_mask[:, :end] if self.is_padded else None,
                position_ids=self.position_ids[:, start:end],
                use_cache=True,
                logits_to_keep=1,
                **{name: cache},
            )
            for model, name, cache in zip(self.models, self.cache_names, self.caches, strict=True)
        ]
        self.caches = [_mark_compileable(output[name]) for output, name in zip(outputs, self.cache_names, strict=True)]
        logits = [output.logits[:, -1, :vocab_size].float() for output in outputs]
        next_ids = choose(logits, self.uniform[:, self.num_sampled])
        self.input_ids = next_ids.unsqueeze(-1)
        self.num_sampled += 1
        return next_ids

    def select(self, positions: list[int]) -> None:
        """Keep only the rows at these positions of the batch."""
        self.rows = [self.rows[position] for position in positions]
        self.is_padded = min(self.prompt_lengths[row] for row in self.rows) < max(self.prompt_lengths)
        keep = torch.tensor(positions).to(self.input_ids.device, non_blocking=True)
        self.input_ids, self.attention_mask = self.input_ids[keep], self.attention_mask[keep]
        self.position_ids = self.position_ids[keep]
        self.uniform = self.uniform[keep]
        for cache in self.caches:
            cache.batch_select_indices(keep)


def _draw_uniform(streams: Sequence[torch.Generator], count: int) -> Tensor:
    """Draw `[count, streams]`, float64 in [0, 1)."""
    numbers = [torch.rand(count, dtype=torch.float64, generator=g) for g in streams]
    return torch.stack(numbers, dim=-1) if numbers else torch.empty(count, 0, dtype=torch.float64)


def _cache_argument(model: PreTrainedModel) -> str:
    """Return the name of the cache in a model's forward and output.

    It is `cache` since transformers 5.18, and `past_key_values` before and in older remote code. A forward with only
    `*args` and `**kwargs`, such as PEFT's, passes its arguments to the wrapped model or to its base class.
    """
    base = unwrap_peft(model)
    forwards = [base.forward, *(vars(owner)["forward"] for owner in type(base).__mro__ if "forward" in vars(owner))]
    named = (forward for forward in forwards if not _passes_on(forward))
    return "cache" if "cache" in inspect.signature(next(named, base.forward)).parameters else "past_key_values"


def _passes_on(forward: Callable[..., Any]) -> bool:
    """Whether a forward declares only `*args` and `**kwargs`."""
    kinds = {p.kind for name, p in inspect.signature(forward).parameters.items() if name != "self"}
    return kinds <= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


def _mark_compileable(cache: Any) -> Any:
    """Mark the cache as compileable, so that transformers creates the mask without inspecting its values."""
    for layer in getattr(cache, "layers", ()):
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
