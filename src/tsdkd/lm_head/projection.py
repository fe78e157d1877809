"""A model's output head: hidden states to logits, including the scaling and soft cap of the model's forward."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Projection:
    """`logits = cap(scale * (hidden @ weight.T + bias))` with `cap(x) = softcap * tanh(x / softcap)`.

    Attributes:
        weight: `[V, H]`.
        bias: `[V]` or None.
        scale: Cohere's `logit_scale`, or the inverse of Granite's `logits_scaling`.
        softcap: Gemma's `final_logit_softcapping`, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def slice_vocab(self, vocab_size: int, dtype: torch.dtype) -> "Projection":
        """Return the projection with only the first `vocab_size` rows, detached, in `dtype`."""
        bias = None if self.bias is None else self.bias.detach()[:vocab_size].to(dtype)
        return Projection(self.weight.detach()[:vocab_size].to(dtype), bias, self.scale, self.softcap)

    def logits(self, hidden: Tensor, temperature: float = 1.0) -> Tensor:
        """Compute logits `[N, V]` from hidden states `[N, H]` as a new tensor, without gradient."""
        return self.transform_(self.linear(hidden), temperature)

    def linear(self, hidden: Tensor) -> Tensor:
        """Compute `hidden @ weight.T + bias`, `[N, V]`."""
        return torch.nn.functional.linear(hidden, self.weight, self.bias)

    def transform_(self, logits: Tensor, temperature: float) -> Tensor:
        """Scale and soft-cap the output of `linear` in place, and divide it by the temperature."""
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        if temperature != 1.0:
            logits /= temperature
        return logits

    def softcap_grad(self, logits: Tensor, temperature: float) -> Tensor:
        """Derivative of the soft cap, `1 - (z / softcap)^2`, in the shape of `logits`. Requires a soft cap."""
        assert self.softcap is not None
        return 1.0 - (logits * (temperature / self.softcap)).square()


def get_projection(model: Any) -> Projection:
    """Return a model's output layer with the scale and soft cap of its configuration."""
    layer, config = get_output_layer(model), model.config.get_text_config()
    divisor = getattr(config, "logits_scaling", None)  # Granite; HyperCLOVA X multiplies by it
    if divisor is not None:
        scale = divisor if config.model_type == "hyperclovax" else 1.0 / divisor
    else:
        names = ("logit_scale", "output_multiplier", "lm_head_multiplier")
        scale = next((s for name in names if (s := getattr(config, name, None)) is not None), 1.0)
    return Projection(layer.weight, layer.bias, scale, getattr(config, "final_logit_softcapping", None))


def get_output_layer(model: Any) -> Any:
    """Return the module whose weight projects hidden states to logits."""
    layer = model.get_output_embeddings()
    copies = getattr(layer, "modules_to_save", None)  # PEFT's trained copy of a full layer
    return layer if copies is None else copies[layer.active_adapter]
