"""Sums of a head's gradients over chunks of tokens, at least in float32."""

from functools import cache

import torch
from torch import Tensor

from .projection import Projection
from .rows import accumulation_dtype


class HeadGradients:
    """Gradients of hidden states `[N, H]`, weight `[V, H]` and bias `[V]`; None if not needed."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs_input_grad: tuple[bool, bool, bool]
    ) -> None:
        def zeros(like: Tensor) -> Tensor:
            return torch.zeros(like.shape, dtype=accumulation_dtype(like.dtype), device=like.device)

        self.hidden = zeros(hidden) if needs_input_grad[0] else None
        self.weight = zeros(weight) if needs_input_grad[1] else None
        self.bias = zeros(bias) if needs_input_grad[2] and bias is not None else None

    def add(
        self, rows: slice | Tensor, logits_gradient: Tensor, hidden: Tensor, head: Projection, scale: Tensor | None
    ) -> None:
        """Add a chunk's gradients: those of its logits `[C, V]`, times `scale`, for the hidden states `[C, H]`."""
        vocab_size = logits_gradient.shape[1]
        if self.hidden is not None:
            self.hidden[rows] += _scale(logits_gradient @ head.weight, scale)
        if self.weight is not None:
            _add_outer(self.weight[:vocab_size], logits_gradient, hidden, scale)
        if self.bias is not None:
            self.bias[:vocab_size] += _scale(logits_gradient.sum(0, dtype=self.bias.dtype), scale)

    def add_sparse(self, rows: slice | Tensor, ids: Tensor, values: Tensor, hidden: Tensor, head: Projection) -> None:
        """Add the gradients `values` `[C, k]` of the logits at `ids` `[C, k]` only."""
        if self.hidden is not None:
            vectors = head.weight[ids].to(values.dtype)
            self.hidden[rows] += torch.einsum("ck,ckh->ch", values, vectors)
        if self.weight is not None:
            outer = values.unsqueeze(-1) * hidden.unsqueeze(1).to(values.dtype)
            self.weight.index_add_(0, ids.flatten(), outer.flatten(0, 1))
        if self.bias is not None:
            self.bias.index_add_(0, ids.flatten(), values.flatten())

    def scale_(self, factor: Tensor) -> None:
        """Multiply the gradients added so far by `factor`, in place."""
        for gradient in (self.hidden, self.weight, self.bias):
            if gradient is not None:
                gradient *= factor

    def pop_grads(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the three gradients in the precisions of their tensors and release the float32 memory."""
        gradients = (self.hidden, self.weight, self.bias)
        self.hidden = self.weight = self.bias = None
        return tuple(
            None if g is None or x is None else _cast_in_place(g, x.dtype)
            for g, x in zip(gradients, (hidden, weight, bias), strict=True)
        )


def _scale(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x.to(scale.dtype) * scale


def _add_outer(total: Tensor, logits_gradient: Tensor, hidden: Tensor, scale: Tensor | None) -> None:
    """`total += logits_gradient.T @ hidden`, `[V, H]`."""
    if total.dtype == hidden.dtype:
        total.addmm_(logits_gradient.t(), hidden)
        return
    if scale is None and _accumulates(total.device, hidden.dtype, total.dtype):
        torch.addmm(total, logits_gradient.t(), hidden, out_dtype=total.dtype, out=total)
        return
    # half precision: the product of a block of ids stays in the cache until it is added in float32
    size = max(1, (2**21 if total.device.type == "cpu" else 2**25) // total.shape[1])
    for start in range(0, total.shape[0], size):
        ids = slice(start, start + size)
        total[ids] += _scale(logits_gradient[:, ids].t() @ hidden, scale)


@cache
def _accumulates(device: torch.device, dtype: torch.dtype, total_dtype: torch.dtype) -> bool:
    """Whether the device can add a product of `dtype` to a matrix of `total_dtype` in one call.

    CUDA can, but not in every version of torch, nor on every GPU.
    """
    if device.type == "cpu":
        return False
    total = torch.zeros(8, 8, dtype=total_dtype, device=device)
    try:
        torch.addmm(total, total.to(dtype), total.to(dtype), out_dtype=total_dtype, out=total)
    except RuntimeError:
        return False
    return True


def _cast_in_place(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert `x` to `dtype`. A narrower dtype overwrites `x`, because memory is at its peak here."""
    if x.dtype == dtype:
        return x
    if x.element_size() < dtype.itemsize or not x.is_contiguous():
        return x.to(dtype)
    wide = x.view(-1)
    narrow = wide.view(dtype)  # same bytes: element i is written only after wide element i was read
    for start in range(0, len(wide), 2**22):
        part = wide[start : start + 2**22]
        narrow[start : start + len(part)] = part.to(dtype)
    return narrow[: len(wide)].view(x.shape)
