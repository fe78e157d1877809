"""A model's head: hidden states to logits, with what the model's own forward does to them afterwards."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Projection:
    """`logits = cap(scale * (hidden @ weight.T + bias))` with `cap(x) = softcap * tanh(x / softcap)`.

    Attributes:
        weight: `[V, H]`.
        bias: `[V]` or None.
        scale: Cohere's `logit_scale`, or one over Granite's `logits_scaling`.
        softcap: Gemma's `final_logit_softcapping`, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def slice_vocab(self, vocab_size: int, dtype: torch.dtype) -> "Projection":
        """The first `vocab_size` rows, detached, in `dtype`."""
        bias = None if self.bias is None else self.bias.detach()[:vocab_size].to(dtype)
        return Projection(self.weight.detach()[:vocab_size].to(dtype), bias, self.scale, self.softcap)

    def logits(self, hidden: Tensor, temperature: float = 1.0) -> Tensor:
        """`[N, H]` -> `[N, V]`, a new tensor; no gradient."""
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias)
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        if temperature != 1.0:
            logits /= temperature
        return logits

    def softcap_grad(self, logits: Tensor, temperature: float) -> Tensor:
        """What the cap does to a gradient, `1 - (z / softcap)^2`, where the cap is set; shape of `logits`."""
        assert self.softcap is not None
        return 1.0 - (logits * (temperature / self.softcap)).square()
