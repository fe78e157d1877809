"""Computes statistics from full logits with autograd: the reference that every faster head is tested against."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..losses import token_entropy, upcast
from .statistics import PerTokenLoss, StatisticsRequest, TokenStatistics, validate_request


@dataclass(frozen=True)
class DenseHead:
    """Computes statistics from full logits with autograd.

    Attributes:
        student_logits: `[N, V]`, temperature applied.
        teacher_logits: `[N, V]`, or None if requests concern only the student.
    """

    student_logits: Tensor
    teacher_logits: Tensor | None = None

    def __call__(self, request: StatisticsRequest, per_token_loss: PerTokenLoss | None = None) -> TokenStatistics:
        """Compute the requested statistics.

        Raises:
            ValueError: the request can't be satisfied, e.g. it needs a teacher but there is none.
        """
        validate_request(request, len(self.student_logits), self.teacher_logits is not None)
        student = upcast(self.student_logits)
        teacher: Any = None if self.teacher_logits is None else self.teacher_logits.detach()
        statistics = TokenStatistics()
        if request.entropy:
            statistics.entropy = token_entropy(student)
        if request.teacher_entropy:
            statistics.teacher_entropy = token_entropy(teacher)
        if request.divergence is not None:
            statistics.divergence = request.divergence(student, teacher)
        if request.top_k:
            statistics.topk_logits, statistics.topk_ids = student.topk(min(request.top_k, student.shape[-1]), dim=-1)
            statistics.topk_logps = student.detach().log_softmax(-1).gather(-1, statistics.topk_ids)
            if teacher is not None:
                statistics.teacher_topk_logits = upcast(teacher.gather(-1, statistics.topk_ids))
        if request.ids is not None:
            statistics.logps = student.log_softmax(-1).gather(-1, request.ids)
        if per_token_loss is not None:
            statistics.loss_terms, statistics.loss = per_token_loss.sums(statistics)
        return statistics
