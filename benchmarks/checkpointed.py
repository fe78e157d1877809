"""What the fused head is measured against: the whole-logits head, a chunk of tokens at a time, recomputed by
`torch.utils.checkpoint` in the backward pass."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tsdkd.lm_head.dense import DenseHead
from tsdkd.lm_head.statistics import PerTokenLoss, StatisticsRequest, TokenStatistics


@dataclass(frozen=True)
class CheckpointedHead:
    """A `tsdkd.lm_head.statistics.Head` that holds the logits of one chunk.

    Attributes:
        hidden: `[N, H]`, the student's last hidden states.
        project: `[C, H]` -> `[C, V]`, the student's logits over the shared ids, temperature applied.
        teacher_hidden: `[N, H']`.
        teacher_project: the same of the teacher, which gets no gradient.
        chunk: tokens projected at a time.
    """

    hidden: Tensor
    project: Callable[[Tensor], Tensor]
    teacher_hidden: Tensor
    teacher_project: Callable[[Tensor], Tensor]
    chunk: int = 128

    def __call__(self, request: StatisticsRequest, per_token_loss: PerTokenLoss | None = None) -> TokenStatistics:
        """The statistics of all N tokens."""
        starts = range(0, max(1, len(self.hidden)), self.chunk)
        chunks = [slice(start, start + self.chunk) for start in starts]
        parts = [
            checkpoint(self._chunk_statistics, request, c, use_reentrant=False, preserve_rng_state=False)
            for c in chunks
        ]
        result = TokenStatistics()
        for name, first in vars(parts[0]).items():
            if isinstance(first, Tensor):
                setattr(result, name, torch.cat([getattr(part, name) for part in parts]))
        if per_token_loss is not None:
            result.loss_terms, result.loss = per_token_loss.sums(result)
        return result

    def _chunk_statistics(self, request: StatisticsRequest, rows: slice) -> TokenStatistics:
        with torch.no_grad():
            teacher = self.teacher_project(self.teacher_hidden[rows])
        ids = None if request.ids is None else request.ids[rows]
        return DenseHead(self.project(self.hidden[rows]), teacher)(replace(request, ids=ids))
