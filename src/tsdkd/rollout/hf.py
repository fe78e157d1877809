"""Rollouts with a transformers model: batched, KV-cached, finished sequences leave the batch.

`model.generate` can't seed each prompt by itself, keeps finished rows in the batch, and takes whatever the
checkpoint's generation config says (Qwen2.5 ships a repetition penalty); this loop samples from the softmax alone.
"""

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.models.utils import unwrap_model_for_generation

from . import Completion, Key, Sampling, prompt_generator
from .draw import draw


class HuggingFaceSampler:
    """The student samples by itself, between its training steps: there is no second copy of its weights.

    Args:
        accelerator: knows the wrappers; under ZeRO-3 the parameters are gathered for the rollout.
        sampling: how completions are drawn.
        gradient_checkpointing_kwargs: with which checkpointing is turned on again.
    """

    def __init__(
        self, accelerator: Accelerator, sampling: Sampling, gradient_checkpointing_kwargs: dict[str, Any] | None = None
    ) -> None:
        self.accelerator, self.sampling = accelerator, sampling
        self.gradient_checkpointing_kwargs = gradient_checkpointing_kwargs

    unproven = False

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
        with unwrap_model_for_generation(
            model, self.accelerator, gradient_checkpointing_kwargs=self.gradient_checkpointing_kwargs
        ) as unwrapped:
            generators = [prompt_generator(*key) for key in keys]
            completions = sample(unwrapped, prompts, limits, generators, **vars(self.sampling))
        model.train(was_training)
        return completions


@torch.no_grad()
def sample(
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
        scaled = logits[0] / temperature
        return scaled.argmax(-1) if uniform is None else draw(scaled, uniform[:, 0], top_p)[0]

    streams = None if generators is None else [(g,) for g in generators]
    return sample_together([model], prompts, limits, streams, choose, stop_ids=stop_ids, vocab_size=vocab_size)


@torch.no_grad()
def sample_together(
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
        prompts, limits, stop_ids, vocab_size: see `sample`.
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
        drawn = [[torch.rand(longest, dtype=torch.float64, generator=g) for g in streams] for streams in generators]
        uniform = torch.stack([torch.stack(numbers, dim=-1) for numbers in drawn]).to(device)
    stop = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
    limit = torch.tensor(limits, device=device)
    rows = torch.arange(len(prompts), device=device)  # the prompts that are still in the batch
    growing = torch.ones(len(prompts), dtype=torch.bool, device=device)
    sampled = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
    lengths = torch.zeros(len(prompts), dtype=torch.long, device=device)
    stopped = torch.zeros(len(prompts), dtype=torch.bool, device=device)

    input_ids, attention_mask = _left_pad(prompts, device)
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    caches: list[Any] = [None] * len(models)
    for t in range(longest):
        outputs = [
            model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            for model, cache in zip(models, caches, strict=True)
        ]
        caches = [output.past_key_values for output in outputs]
        logits = [output.logits[:, -1, :vocab_size].float() for output in outputs]
        next_ids = choose(logits, None if uniform is None else uniform[rows, t])
        now = rows[growing]
        sampled[now, t] = next_ids[growing]
        lengths[now] = t + 1
        stopped[now] = torch.isin(next_ids[growing], stop)
        growing = growing & ~stopped[rows] & (limit[rows] > t + 1)
        left = int(growing.sum())
        if left == 0:
            break
        if left <= 0.875 * len(rows):  # not at every finish: selecting copies the whole cache
            keep = growing.nonzero().squeeze(-1)
            rows, next_ids, growing = rows[keep], next_ids[keep], growing[keep]
            attention_mask, position_ids = attention_mask[keep], position_ids[keep]
            for cache in caches:
                cache.batch_select_indices(keep)
        input_ids = next_ids.unsqueeze(-1)
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(rows), 1)], dim=-1)
        position_ids = position_ids[:, -1:] + 1

    ids, counts = sampled.tolist(), lengths.tolist()
    return [Completion(ids[i][: counts[i]], flag) for i, flag in enumerate(stopped.tolist())]


def _left_pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(p) for p in prompts)
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask
