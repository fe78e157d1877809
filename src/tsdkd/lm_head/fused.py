"""The fused head: statistics and their gradients from hidden states, a chunk of tokens at a time.

Student and teacher are projected once a token. The per-token losses are differentiated while their chunk's logits are
still there; whatever else an objective makes of the statistics is differentiated in the backward pass, where only the
tokens with a gradient are projected again, and of the top-k logits only those k.
"""

from typing import Any

import torch
from torch import Tensor

from .chunked import DIFFERENTIABLE, ChunkedStatistics
from .projection import Projection
from .statistics import PerTokenLoss, StatisticsRequest, TokenStatistics, validate_request


class FusedHead:
    """A `tsdkd.lm_head.statistics.Head` whose logits never exist as a whole.

    Under autocast both projections run in its precision, otherwise in the hidden states'. Statistics are float32, or
    float64 where the hidden states are.

    Args:
        hidden: `[N, H]`, the student's last hidden states at the N positions that predict completion tokens.
        projection: the student's head; weight, bias and hidden states receive gradients where they require them.
        teacher_hidden: `[N, H']`, or None for requests about the student only.
        teacher_projection: the teacher's head.
        vocab_size: ids that both models have; probabilities are over the first `vocab_size`. Default: the student's.
        temperature: divides the logits of both.
        chunk_gib: GiB for both models' logits of one chunk of tokens; by default 0.25 on a CPU and 1 on a GPU. Scratch
            memory of 0.01 GiB (0.16 on a GPU) comes beside it.
        loss_in_forward: differentiate per-token losses in the forward pass. They can then be differentiated only once,
            and only their weighted sum. False: in the backward pass, at the price of projecting again.

    Raises:
        ValueError: the shapes don't fit.
    """

    def __init__(
        self,
        hidden: Tensor,
        projection: Projection,
        teacher_hidden: Tensor | None = None,
        teacher_projection: Projection | None = None,
        *,
        vocab_size: int | None = None,
        temperature: float = 1.0,
        chunk_gib: float | None = None,
        loss_in_forward: bool = True,
    ) -> None:
        self.hidden, self.projection = hidden, projection
        self.temperature, self.loss_in_forward = temperature, loss_in_forward
        self.vocab_size = vocab_size or projection.weight.shape[0]
        self.dtype = compute_dtype(hidden)
        self.student = projection.slice_vocab(self.vocab_size, self.dtype)
        self.teacher: tuple[Projection, Tensor] | None = None
        if teacher_hidden is not None and teacher_projection is not None:
            teacher_dtype = compute_dtype(teacher_hidden)
            teacher = teacher_projection.slice_vocab(self.vocab_size, teacher_dtype)
            self.teacher = teacher, teacher_hidden.detach().to(teacher_dtype)
        self._check_shapes()
        chunk_gib = chunk_gib or (0.25 if hidden.device.type == "cpu" else 1.0)
        self.chunk = self._chunk_tokens(chunk_gib * 2**30)

    def __call__(self, request: StatisticsRequest, per_token_loss: PerTokenLoss | None = None) -> TokenStatistics:
        """The statistics of all N tokens. Raises `ValueError` for a request that can't be met."""
        validate_request(request, len(self.hidden), self.teacher is not None)
        inputs = (self.hidden, self.projection.weight, self.projection.bias)
        has_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
        forward_loss = per_token_loss if has_gradient and self.loss_in_forward else None
        chunked = ChunkedStatistics(self.student, self.teacher, self.temperature, self.chunk, request, forward_loss)
        result = TokenStatistics()
        loss, *statistics = _ChunkedStatisticsFunction.apply(chunked, result, *inputs)
        for name, value in zip(DIFFERENTIABLE, statistics, strict=True):
            setattr(result, name, value)
        if forward_loss is not None:
            result.loss = loss
        elif per_token_loss is not None:
            result.loss_terms, result.loss = per_token_loss.sums(result)
        return result

    def _check_shapes(self) -> None:
        heads = {"student": (self.student, self.hidden)}
        if self.teacher is not None:
            heads["teacher"] = self.teacher
        for name, (head, hidden) in heads.items():
            if hidden.ndim != 2 or hidden.shape[1] != head.weight.shape[1]:
                raise ValueError(
                    f"{name}: hidden states must be [N, {head.weight.shape[1]}], found {tuple(hidden.shape)}"
                )
            if head.weight.shape[0] < self.vocab_size:
                raise ValueError(
                    f"{name}: the head has {head.weight.shape[0]} rows, fewer than vocab_size {self.vocab_size}"
                )
            if hidden.shape[0] != self.hidden.shape[0]:
                raise ValueError(
                    f"{name}: must have the student's {self.hidden.shape[0]} tokens, found {hidden.shape[0]}"
                )

    def _chunk_tokens(self, budget: float) -> int:
        models = 1 if self.teacher is None else 2
        return max(1, int(budget // (self.vocab_size * self.dtype.itemsize * models)))


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The precision of a projection: autocast's, or else the hidden states'."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


class _ChunkedStatisticsFunction(torch.autograd.Function):
    """Ties `ChunkedStatistics` to autograd. That holds what the backward pass needs, but no output: no cycle."""

    @staticmethod
    def forward(
        ctx: Any,
        chunked: ChunkedStatistics,
        result: TokenStatistics,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> tuple[Any, ...]:
        ctx.chunked = chunked
        ctx.set_materialize_grads(False)
        with torch.autocast(hidden.device.type, enabled=False):
            found = chunked.forward(hidden, weight, bias, ctx.needs_input_grad[2:])
        vars(result).update(vars(found))
        return found.loss, *(getattr(found, name) for name in DIFFERENTIABLE)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        chunked: ChunkedStatistics = ctx.chunked
        with torch.autocast(chunked.inputs[0].device.type, enabled=False):
            return None, None, *chunked.backward(grad_loss, **dict(zip(DIFFERENTIABLE, grad_outputs, strict=True)))
