"""A decoding step on tensors alone, with KV caches that are written in place, so that the step can be captured."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from ..models.loading import unwrap_peft
from .base import TokenChoice


class DecodingStep:
    """Chooses the next token of each row of a batch.

    Args:
        models: unwrapped models in eval mode.
        choose: chooses the tokens from the logits of all models; see `TokenChoice`.
        vocab_size: see `SamplingConfig`.
    """

    NUM_SMALL_INPUTS = 4

    def __init__(self, models: Sequence[PreTrainedModel], choose: TokenChoice, vocab_size: int) -> None:
        self.models, self.choose, self.vocab_size = models, choose, vocab_size
        self.cache_names = [cache_argument(model) for model in models]

    @property
    def device(self) -> torch.device:
        """Device of the models."""
        return next(self.models[0].parameters()).device

    @property
    def modules(self) -> list[nn.Module]:
        """All modules of all models."""
        return [module for model in self.models for module in model.modules()]

    def __call__(
        self, input_ids: Tensor, position_ids: Tensor, slot: Tensor, uniform: Tensor, visible: Tensor, *caches: Tensor
    ) -> tuple[Tensor, ...]:
        """Compute the next tokens.

        Args:
            input_ids, position_ids: `[B, 1]`, the last tokens and their positions.
            slot: `[1]`, the slot of the caches for the last tokens.
            uniform: `[B, numbers]`; see `TokenChoice`.
            visible: `[B, 1, 1, capacity]` bool, false in the slots of padding.
            caches: keys and values of each layer of each model, `[B, heads, capacity, D]`; written in place.

        Returns:
            Ids `[B]`, and the logits of each model, float32 `[B, V]`.
        """
        mask = visible & (torch.arange(visible.shape[-1], device=visible.device) <= slot)
        logits, layers = [], iter(caches)
        for model, name in zip(self.models, self.cache_names, strict=True):
            cache = Cache(layers=[_InPlaceLayer(next(layers), next(layers), slot) for _ in range(_num_layers(model))])
            output = model(
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=position_ids,
                use_cache=True,
                logits_to_keep=1,
                **{name: cache},
            )
            logits.append(output.logits[:, -1, : self.vocab_size].float())
        return self.choose(logits, uniform), *logits


class _InPlaceLayer(CacheLayerMixin):
    """Keys and values `[B, heads, capacity, D]` of one layer; those of the next token go to `slot` `[1]`."""

    is_sliding = False
    is_compileable = True

    def __init__(self, keys: Tensor, values: Tensor, slot: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.slot, self.is_initialized = keys, values, slot, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        # under autocast, the caches of older transformers have the keys' precision
        self.keys.index_copy_(2, self.slot, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.slot, value_states.to(self.values.dtype))
        return self.keys, self.values

    def get_mask_sizes(self, *args: Any) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_seq_length(self) -> Any:
        return self.slot

    def get_max_length(self) -> int:
        return self.keys.shape[2]

    get_max_cache_shape = get_max_length  # its name before transformers 5.16


def _num_layers(model: Any) -> int:
    count: int = model.config.get_text_config().num_hidden_layers
    return count


def supports_in_place(model: Any, cache: Any, length: int) -> bool:
    """Whether a model can decode up to `length` tokens in place, after its first step has filled `cache`.

    It needs an attention that accepts a mask, caches of all previous tokens in every layer, and a forward that follows
    transformers' rules for static shapes.
    """
    layers, config = getattr(cache, "layers", []), model.config.get_text_config()
    return (
        getattr(unwrap_peft(model), "_can_compile_fullgraph", False)
        and config._attn_implementation == "sdpa"
        and not getattr(config, "alibi", False)  # computed from a mask [B, T]
        and len({p.device for p in model.parameters()}) == 1
        and len(layers) == _num_layers(model)
        and all(_keeps_all(layer, length) for layer in layers)
    )


def _keeps_all(layer: Any, length: int) -> bool:
    is_wide = isinstance(layer, DynamicSlidingWindowLayer) and layer.sliding_window > length
    return is_wide or type(layer) is DynamicLayer


def cache_argument(model: PreTrainedModel) -> str:
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
