"""Computes statistics in one pass over chunks of tokens, and gradients as early as possible."""

from typing import Any

import torch
from torch import Tensor

from .gradients import HeadGradients
from .projection import Projection
from .rows import GradOutputs, SoftmaxRows, accumulation_dtype
from .statistics import PerTokenLoss, StatisticsRequest, TokenStatistics

DIFFERENTIABLE = ("entropy", "divergence", "topk_logits", "logps")
_STUDENT, _TEACHER, _KL, _RATIO = slice(0, 3), slice(3, 6), 6, 7  # rows of `ChunkedStatistics.row_statistics`


class ChunkedStatistics:
    """The forward pass, and the state that the backward pass needs.

    Args:
        student: the student's head in the precision of the pass, restricted to the shared ids.
        teacher: the same for the teacher, with its hidden states `[N, H']`, or None.
        temperature: divides the logits of both models.
        chunk: number of tokens projected at a time.
        rows_class: the backend.
        request: the statistics to compute.
        per_token_loss: losses to differentiate in the forward pass, or None.
    """

    def __init__(
        self,
        student: Projection,
        teacher: tuple[Projection, Tensor] | None,
        temperature: float,
        chunk: int,
        rows_class: type[SoftmaxRows],
        request: StatisticsRequest,
        per_token_loss: PerTokenLoss | None,
    ) -> None:
        self.student, self.teacher = student, teacher
        self.temperature, self.chunk, self.rows_class = temperature, chunk, rows_class
        self.request, self.per_token_loss = request, per_token_loss

    # Forward

    def forward(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs_input_grad: tuple[bool, bool, bool]
    ) -> TokenStatistics:
        """Compute the statistics of all tokens and the gradients of the per-token losses."""
        # don't keep the parameters: sharded ones are empty again in the backward pass
        self.inputs = (hidden.detach(), weight.detach(), None if bias is None else bias.detach())
        self.needs_input_grad = needs_input_grad
        self.gradients = None if self.per_token_loss is None else HeadGradients(*self.inputs, needs_input_grad)
        count = len(hidden)
        self.row_statistics = hidden.new_zeros(8, count, dtype=accumulation_dtype(self.student.weight.dtype))
        size = _chunk_size(count, self.chunk)
        starts = range(0, max(count, 1), size)  # one empty chunk if there are no tokens
        statistics = _concat_statistics([self._forward_chunk(slice(i, min(i + size, count))) for i in starts])
        self.topk_ids: Any = statistics.topk_ids
        # the tensor itself becomes an output whose graph references this object
        self.topk_logits: Any = None if statistics.topk_logits is None else statistics.topk_logits.detach()
        return statistics

    def _forward_chunk(self, rows: slice) -> TokenStatistics:
        request, statistics = self.request, TokenStatistics()
        hidden, student = self._project(rows)
        student.compute_statistics(request.top_k)
        self.row_statistics[_STUDENT, rows] = student.row_statistics
        teacher = None
        if self.teacher is not None and (request.needs_teacher or request.top_k):
            teacher = self._project_teacher(rows, student)
            if request.needs_teacher:
                teacher.compute_statistics()
                self.row_statistics[_TEACHER, rows] = teacher.row_statistics
        if request.entropy:
            statistics.entropy = student.entropy
        if request.teacher_entropy and teacher is not None:
            statistics.teacher_entropy = teacher.entropy
        if request.divergence is not None and teacher is not None:
            found = student.compute_divergence(teacher, request.divergence)
            statistics.divergence, self.row_statistics[_KL, rows], self.row_statistics[_RATIO, rows] = found
        if request.top_k:
            k = min(request.top_k, len(self.student.weight))
            statistics.topk_logits, statistics.topk_ids = student.topk(k)
            statistics.topk_logps = student.logps_at(statistics.topk_ids)
            if teacher is not None:
                statistics.teacher_topk_logits = teacher.logits_at(statistics.topk_ids)
        if request.ids is not None:
            statistics.logps = student.logps_at(request.ids[rows])
        if self.per_token_loss is not None:
            self._accumulate_loss_gradients(rows, statistics, student, teacher, hidden)
        return statistics

    def _accumulate_loss_gradients(
        self,
        rows: slice,
        statistics: TokenStatistics,
        student: SoftmaxRows,
        teacher: SoftmaxRows | None,
        hidden: Tensor,
    ) -> None:
        """Evaluate the per-token losses and add their gradient while the chunk's logits are in memory."""
        assert self.per_token_loss is not None and self.gradients is not None
        leaves = {n: x.detach().requires_grad_() for n in DIFFERENTIABLE if (x := getattr(statistics, n)) is not None}
        with torch.enable_grad():
            view = TokenStatistics(**{**vars(statistics), **leaves})
            statistics.loss_terms, statistics.loss = self.per_token_loss.sums(view, rows)
        if not statistics.loss.requires_grad:
            return
        found = torch.autograd.grad(statistics.loss, list(leaves.values()), allow_unused=True)
        grad_outputs = dict(zip(leaves, found, strict=True))
        self._add_sparse(
            self.gradients, rows, statistics.topk_ids, statistics.topk_logits, grad_outputs.pop("topk_logits", None)
        )
        if any(g is not None for g in grad_outputs.values()):
            self._add_dense(self.gradients, rows, GradOutputs(**grad_outputs), student, teacher, hidden)

    def _project(self, rows: slice | Tensor, row_statistics: Tensor | None = None) -> tuple[Tensor, SoftmaxRows]:
        hidden = self.inputs[0][rows].to(self.student.weight.dtype)
        return hidden, self.rows_class(self.student, hidden, self.temperature, row_statistics)

    def _project_teacher(
        self, rows: slice | Tensor, student: SoftmaxRows, row_statistics: Tensor | None = None
    ) -> SoftmaxRows:
        assert self.teacher is not None
        projection, hidden = self.teacher
        return self.rows_class(projection, hidden[rows], self.temperature, row_statistics, student)

    # Backward

    def backward(self, grad_loss: Tensor | None, **grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        """Compute the gradients of hidden states, weight and bias from those of the loss and the statistics."""
        if grad_loss is None:
            gradients = HeadGradients(*self.inputs, self.needs_input_grad)
        else:
            gradients = self._take_loss_gradients(grad_loss)
        topk_logits = grad_outputs.pop("topk_logits")
        # most entropies have no gradient; logits of tokens without a gradient are not projected again
        of_top, of_others = _nonzero_indices(
            _nonzero_grad_mask([topk_logits]), _nonzero_grad_mask(list(grad_outputs.values()))
        )
        if topk_logits is not None and of_top is not None:
            self._backward_topk(gradients, of_top, topk_logits)
        if of_others is not None:
            for rows in of_others.split(_chunk_size(len(of_others), self.chunk)):
                self._backward_chunk(gradients, rows, grad_outputs)
        return gradients.pop_grads(*self.inputs)

    def _take_loss_gradients(self, grad_outputs: Tensor) -> HeadGradients:
        gradients, self.gradients = self.gradients, None
        if gradients is None:
            raise RuntimeError(
                "the per-token losses were differentiated in the forward pass, which allows only one backward pass; "
                "create the head with loss_in_forward=False to differentiate them again"
            )
        gradients.scale_(grad_outputs)
        return gradients

    def _backward_chunk(self, gradients: HeadGradients, rows: Tensor, grad_outputs: dict[str, Tensor | None]) -> None:
        hidden, student = self._project(rows, self.row_statistics[_STUDENT, rows])
        teacher = None
        if grad_outputs["divergence"] is not None:
            teacher = self._project_teacher(rows, student, self.row_statistics[_TEACHER, rows])
        chunk_grad_outputs = GradOutputs(**{name: None if g is None else g[rows] for name, g in grad_outputs.items()})
        self._add_dense(gradients, rows, chunk_grad_outputs, student, teacher, hidden)

    def _backward_topk(self, gradients: HeadGradients, index: Tensor, grad_outputs: Tensor) -> None:
        """Differentiate only k logits of a few tokens: gather their rows of the weight instead of projecting."""
        # choose the size so that two [C, k, H] tensors are about as large as a chunk's logits
        vocab_size, num_candidates, hidden_size = (
            len(self.student.weight),
            grad_outputs.shape[-1],
            self.inputs[0].shape[-1],
        )
        size = max(1, self.chunk * vocab_size // (2 * num_candidates * hidden_size))
        for rows in index.split(size):
            self._add_sparse(gradients, rows, self.topk_ids[rows], self.topk_logits[rows], grad_outputs[rows])

    # Both

    @property
    def _logit_scale(self) -> float:
        return self.student.scale / self.temperature

    def _add_sparse(
        self,
        gradients: HeadGradients,
        rows: slice | Tensor,
        ids: Tensor | None,
        logits: Tensor | None,
        grad_outputs: Tensor | None,
    ) -> None:
        if grad_outputs is None or ids is None or logits is None:
            return
        values = grad_outputs * self._logit_scale
        if self.student.softcap is not None:
            values = values * self.student.softcap_grad(logits, self.temperature)
        gradients.add_sparse(rows, ids, values, self.inputs[0][rows], self.student)

    def _add_dense(
        self,
        gradients: HeadGradients,
        rows: slice | Tensor,
        grad_outputs: GradOutputs,
        student: SoftmaxRows,
        teacher: SoftmaxRows | None,
        hidden: Tensor,
    ) -> None:
        """Overwrite the chunk's logits with their gradient and project it back."""
        grad_outputs = grad_outputs.times(self._logit_scale)
        largest = None
        if hidden.dtype == torch.float16:  # a loss scale can't recover values that have underflowed
            largest = grad_outputs.abs_max()
            grad_outputs = grad_outputs.times(1.0 / largest)
        ids = None if self.request.ids is None else self.request.ids[rows]
        saved = (self.request.divergence, self.row_statistics[_KL, rows], self.row_statistics[_RATIO, rows])
        gradient = student.logits_grad_(teacher, *saved, ids, grad_outputs)
        gradients.add(rows, gradient, hidden, self.student, largest)


def _chunk_size(count: int, limit: int) -> int:
    """Return the size of nearly equal chunks, at most `limit`. A small last chunk would cost almost as much time."""
    chunks = max(1, -(-count // limit))
    return max(1, -(-count // chunks))


def _nonzero_grad_mask(grad_outputs: list[Tensor | None]) -> Tensor | None:
    """`[N]` bool, true for tokens with a nonzero derivative; None if there are no derivatives."""
    given = [g for g in grad_outputs if g is not None]
    return (
        torch.stack([(g != 0).flatten(1).any(-1) if g.ndim > 1 else g != 0 for g in given]).any(0) if given else None
    )


def _nonzero_indices(*masks: Tensor | None) -> list[Tensor | None]:
    """Indices at which each mask `[N]` is true. Synchronizes with the device only once for all masks."""
    given = [mask for mask in masks if mask is not None]
    counts = iter(torch.stack([mask.sum() for mask in given]).tolist() if given else ())
    return [None if mask is None else torch.nonzero_static(mask, size=next(counts)).squeeze(-1) for mask in masks]


def _concat_statistics(parts: list[TokenStatistics]) -> TokenStatistics:
    """Concatenate the statistics of consecutive chunks."""
    whole = TokenStatistics()
    for name, first in vars(parts[0]).items():
        values = [getattr(part, name) for part in parts]
        if isinstance(first, Tensor):
            joined = torch.stack(values).sum(0).detach() if name == "loss" else torch.cat(values)
            setattr(whole, name, joined)
    whole.loss_terms = {
        name: torch.stack([part.loss_terms[name].detach() for part in parts]).sum() for name in parts[0].loss_terms
    }
    return whole
