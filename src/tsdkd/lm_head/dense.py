"""Statistics from whole logits, by autograd: the specification that every faster head is proven equal to."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..losses import token_entropy, upcast
from .statistics import PerTokenLoss, StatisticsRequest, TokenStatistics, validate_request


@dataclass(frozen=True)
class DenseHead:
    """Answers from whole logits, by autograd.

    Attributes:
        student_logits: `[N, V]`, temperature applied.
        teacher_logits: `[N, V]`, or None where only the student is asked about.
    """

    student_logits: Tensor
    teacher_logits: Tensor | None = None

    def __call__(self, request: StatisticsRequest, own: PerTokenLoss | None = None) -> TokenStatistics:
        """Raises `ValueError` for a request that can't be answered, as where it needs a teacher and there is none."""
        validate_request(request, len(self.student_logits), self.teacher_logits is not None)
        student = upcast(self.student_logits)
        teacher: Any = None if self.teacher_logits is None else self.teacher_logits.detach()
        answer = TokenStatistics()
        if request.entropy:
            answer.entropy = token_entropy(student)
        if request.teacher_entropy:
            answer.teacher_entropy = token_entropy(teacher)
        if request.divergence is not None:
            answer.divergence = request.divergence(student, teacher)
        if request.top_k:
            answer.topk_logits, answer.topk_ids = student.topk(min(request.top_k, student.shape[-1]), dim=-1)
            answer.topk_logps = student.detach().log_softmax(-1).gather(-1, answer.topk_ids)
            if teacher is not None:
                answer.teacher_topk_logits = upcast(teacher.gather(-1, answer.topk_ids))
        if request.ids is not None:
            answer.logps = student.log_softmax(-1).gather(-1, request.ids)
        if own is not None:
            answer.loss_terms, answer.loss = own.sums(answer)
        return answer
