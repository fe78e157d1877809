"""The fused head: computes statistics and their gradients from hidden states, one chunk of tokens at a time.

The logits of student and teacher are computed once per token. Per-token losses are differentiated while the logits of
their chunk are in memory. All other terms of an objective are differentiated in the backward pass. It computes logits
again only for tokens with a gradient; for top-k logits, it computes only these k.
"""

import logging
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import escape_line
from .chunked import DIFFERENTIABLE, ChunkedStatistics
from .projection import Projection
from .rows import SoftmaxRows
from .softmax import TorchRows
from .statistics import PerTokenLoss, StatisticsRequest, TokenStatistics, validate_request

logger = logging.getLogger(__name__)


class FusedHead:
    """A `tsdkd.lm_head.statistics.Head` that never stores the full logits.

    Both projections run in the precision of autocast if it is enabled, otherwise in that of the hidden states.
    Statistics are float32, or float64 if the hidden states are.

    Args:
        hidden: `[N, H]`, the student's last hidden states at the N positions that predict completion tokens.
        projection: the student's head. Weight, bias and hidden states receive gradients if they require them.
        teacher_hidden: `[N, H']`, or None if requests concern only the student.
        teacher_projection: the teacher's head.
        vocab_size: number of ids shared by both models; probabilities are computed over these first ids. Default: the
            student's vocabulary.
        temperature: divides the logits of both models.
        chunk_gib: GiB for the logits of both models in one chunk of tokens. Default: 0.25 on a CPU, 1 on a GPU.
            Additional scratch memory: 0.01 GiB (0.16 on a GPU).
        loss_in_forward: whether to differentiate per-token losses in the forward pass. Then only their weighted sum
            can be differentiated, and only once. If False, the backward pass differentiates them, which requires
            computing the logits again.
        backend: what computes everything but the matrix products: `torch` operations or `triton` kernels. Default:
            Triton on all devices except the CPU if it is installed and works.

    Raises:
        ValueError: the shapes do not match.
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
        backend: Literal["torch", "triton"] | None = None,
    ) -> None:
        self.hidden, self.projection = hidden, projection
        self.temperature, self.loss_in_forward = temperature, loss_in_forward
        self.rows_class = _rows_class(backend, hidden.device)
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
        """Compute the statistics of all N tokens. Raises `ValueError` if the request can't be satisfied."""
        validate_request(request, len(self.hidden), self.teacher is not None)
        inputs = (self.hidden, self.projection.weight, self.projection.bias)
        has_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
        forward_loss = per_token_loss if has_gradient and self.loss_in_forward else None
        chunked = ChunkedStatistics(
            self.student, self.teacher, self.temperature, self.chunk, self.rows_class, request, forward_loss
        )
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
    """Return the precision of a projection: that of autocast if enabled, otherwise that of the hidden states."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _rows_class(backend: Literal["torch", "triton"] | None, device: torch.device) -> type[SoftmaxRows]:
    if backend == "torch" or (backend is None and not _triton_works(device)):
        return TorchRows
    from .triton_rows import TritonRows  # Triton is not installed everywhere

    return TritonRows


@cache
def _triton_works(device: torch.device) -> bool:
    """Whether to use Triton by default. It needs a C compiler, and a GPU that it supports: one small kernel tells."""
    if device.type == "cpu" or find_spec("triton") is None:
        return False
    try:
        from .triton_rows import TritonRows

        TritonRows(
            Projection(torch.ones(8, 8, device=device)), torch.ones(1, 8, device=device), 1.0
        ).compute_statistics()
    except Exception as error:  # from an import, its compiler, a C compiler, or a driver
        reason = escape_line(str(error))[:200]
        logger.warning("Triton's kernels don't work here; the LM head uses torch operations: %s", reason)
        return False
    return True


class _ChunkedStatisticsFunction(torch.autograd.Function):
    """Connects `ChunkedStatistics` to autograd. To avoid a reference cycle, the latter does not store any outputs."""

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
