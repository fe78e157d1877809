"""The Triton backend: every pass over the logits is one kernel."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from ..losses import Divergence
from . import triton_kernels as kernels
from .rows import GradOutputs, SoftmaxRows, ratio_weight


class TritonRows(SoftmaxRows):
    """Rows of logits that are stored as the matrix product returned them: kernels scale and cap what they load."""

    lane_maxima: Tensor

    def project(self, hidden: Tensor) -> Tensor:
        return self.projection.linear(hidden)

    def compute_statistics(self, top_k: int = 0) -> None:
        count, size = self.logits.shape
        self.row_statistics = self.logits.new_empty(3, count, dtype=self.dtype)
        self.lane_maxima = self.row_statistics
        if top_k:
            self.lane_maxima = self.logits.new_empty(count, min(size, kernels.BLOCK), dtype=self.dtype)
        self._launch(
            kernels.row_statistics,
            self.logits,
            self.row_statistics,
            self.lane_maxima,
            count,
            size,
            self.logits.stride(0),
            self.row_statistics.stride(0),
            *self._factor_and_cap(),
            LANE_MAXIMA=top_k > 0,
        )

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """The k largest logits are in the k lanes with the largest maxima: only these are read again."""
        size, block = self.logits.shape[1], kernels.BLOCK
        lanes = self.lane_maxima.topk(min(k, self.lane_maxima.shape[1]), dim=-1, sorted=False).indices
        columns = (lanes.unsqueeze(-1) + torch.arange(0, size, block, device=lanes.device)).flatten(1)
        ids = columns.clamp(max=size - 1)
        logits, index = self.logits_at(ids).masked_fill_(columns != ids, -torch.inf).topk(k, dim=-1)
        return logits, ids.gather(-1, index)

    def logits_at(self, ids: Tensor) -> Tensor:
        return self.projection.transform_(self.logits.gather(-1, ids).to(self.dtype), self.temperature)

    def compute_divergence(self, teacher: Any, divergence: Divergence) -> tuple[Tensor, Tensor, Tensor]:
        results = torch.empty_like(self.row_statistics, memory_format=torch.contiguous_format)
        self._launch(
            kernels.divergence,
            self.logits,
            teacher.logits,
            self.row_statistics,
            teacher.row_statistics,
            results,
            *self.logits.shape,
            self.logits.stride(0),
            teacher.logits.stride(0),
            self.row_statistics.stride(0),
            teacher.row_statistics.stride(0),
            *self._factor_and_cap(),
            *teacher._factor_and_cap(),
            *_constants(divergence),
        )
        value, student_kl, ratio = results
        return value, student_kl, ratio

    def logits_grad_(
        self,
        teacher: Any,
        divergence: Divergence | None,
        student_kl: Tensor,
        ratio: Tensor,
        ids: Tensor | None,
        grad_outputs: GradOutputs,
    ) -> Tensor:
        given = {name: x for name, x in vars(grad_outputs).items() if x is not None}
        unused = self.row_statistics  # a pointer that the kernel doesn't read
        entropy, of_divergence, logps = (
            given[name].to(self.dtype).contiguous() if name in given else unused
            for name in ("entropy", "divergence", "logps")
        )
        other = teacher if "divergence" in given else self
        has_logps = "logps" in given and ids is not None
        self._launch(
            kernels.logits_grad,
            self.logits,
            other.logits,
            self.row_statistics,
            other.row_statistics,
            student_kl,
            ratio,
            entropy,
            of_divergence,
            ids.contiguous() if has_logps and ids is not None else unused,
            logps,
            *self.logits.shape,
            self.logits.stride(0),
            other.logits.stride(0),
            self.row_statistics.stride(0),
            other.row_statistics.stride(0),
            logps.shape[-1] if has_logps else 0,
            *self._factor_and_cap(),
            *other._factor_and_cap(),
            *_constants(divergence if "divergence" in given else None),
            HAS_ENTROPY="entropy" in given,
            HAS_DIVERGENCE="divergence" in given,
            HAS_LOGPS=has_logps,
        )
        return self.logits

    def _factor_and_cap(self) -> tuple[float, float]:
        """Return `FACTOR` and `CAP` of the kernels."""
        scale, softcap = self.projection.scale, self.projection.softcap
        return (scale / self.temperature, 0.0) if softcap is None else (scale / softcap, softcap / self.temperature)

    def _launch(self, kernel: Any, *arguments: Any, **flags: bool) -> None:
        programs = triton.cdiv(len(self.logits), kernels.ROWS)
        with _on(self.logits.device):
            kernel[(programs,)](*arguments, **flags, ROWS=kernels.ROWS, BLOCK=kernels.BLOCK, **kernels.OPTIONS)


def _constants(divergence: Divergence | None) -> tuple[float, float, float, float]:
    """Return `MIXTURE`, `OF_STUDENT`, `OF_TEACHER` and `OF_RATIO` of the kernels."""
    if divergence is None:
        return 0.0, 0.0, 0.0, 0.0
    return divergence.mixture, divergence.student, divergence.teacher, ratio_weight(divergence)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
