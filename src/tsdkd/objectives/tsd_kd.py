"""TSD-KD: `alpha L_Indirect + L_Direct + L_EM` (Eq. 13), each term a mean over the responses of the global batch."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..losses import generalized_jsd, plackett_luce_nll, token_entropy
from ..selection import adaptive_opener_ratio, entropy_gap_gate, opener_mask, top_entropy_mask
from . import ObjectiveOutput, mean_of


@dataclass
class TSDKDObjective:
    """The objective of TSD-KD. All three special terms off (`gate=False`, `alpha=0`, `entropy_weight=0`) is GKD.

    `window` holds the difficulty of the last five responses that this process trained on (A.7); it is the only state.
    """

    alpha: float = 0.1
    beta: float = 0.9
    indirect_top_k: int = 10
    opener_ratio: float = 0.1
    adaptive_opener: bool = False
    gate: bool = True
    gate_temperature: float = 1.0
    entropy_weight: float = 1.0
    entropy_ratio: float = 0.1
    indirect_reduction: str = "mean"
    window: deque[float] = field(default_factory=lambda: deque(maxlen=5))

    unit = "responses"

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, *, training: bool = True
    ) -> ObjectiveOutput:
        """Sums over the responses of a micro-batch.

        Args:
            student_logits: `[N, V]`, the N response tokens of `mask` in row order, temperature applied.
            teacher_logits: `[N, V]`.
            mask: `[B, T]` bool with N true entries, a row a response.
            training: whether the adaptive opener's window moves on.
        """
        lengths = mask.sum(-1, keepdim=True)
        share = (1.0 / lengths.clamp(min=1)).expand_as(mask)[mask]  # a token's weight in its response's mean
        with torch.set_grad_enabled(self.entropy_weight != 0 and torch.is_grad_enabled()):
            student_entropy = token_entropy(student_logits)
        teacher_entropy = token_entropy(teacher_logits.detach())
        entropy = student_entropy.new_zeros(mask.shape).masked_scatter(mask, student_entropy.detach())

        gate = entropy_gap_gate(student_entropy, teacher_entropy, self.gate_temperature)
        jsd = generalized_jsd(student_logits, teacher_logits, self.beta)
        terms = {"direct": (share * jsd * (gate if self.gate else 1.0)).sum()}
        weights = {"direct": 1.0}

        opener = opener_mask(
            entropy, mask, self._opener_ratio(student_entropy.detach(), teacher_entropy, mask, training)
        )
        if self.alpha != 0:
            terms["indirect"] = self._indirect(student_logits, teacher_logits, mask, opener)
            weights["indirect"] = self.alpha
        if self.entropy_weight != 0:
            uncertain = top_entropy_mask(entropy, mask, self.entropy_ratio)
            per_response = (uncertain / uncertain.sum(-1, keepdim=True).clamp(min=1))[mask]
            terms["entropy"] = (per_response * student_entropy).sum()
            weights["entropy"] = self.entropy_weight

        metrics = self._metrics(student_logits, teacher_logits, mask, opener, gate, student_entropy, teacher_entropy)
        return ObjectiveOutput(terms, weights, metrics)

    def _indirect(self, student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, opener: Tensor) -> Tensor:
        """Eq. 5 summed over responses; a response's positions are averaged, summed, or divided by its length."""
        inside = opener[mask]
        nll = plackett_luce_nll(student_logits[inside], teacher_logits[inside], self.indirect_top_k)
        divisor = {
            "mean": opener.sum(-1),
            "sum": torch.ones_like(opener[:, 0], dtype=torch.long),
            "length": mask.sum(-1),
        }
        per_row = divisor[self.indirect_reduction].clamp(min=1).unsqueeze(-1).expand_as(mask)
        return (nll / per_row[opener]).sum()

    def _opener_ratio(
        self, student_entropy: Tensor, teacher_entropy: Tensor, mask: Tensor, training: bool
    ) -> float | Tensor:
        if not self.adaptive_opener:
            return self.opener_ratio
        gap = student_entropy.new_zeros(mask.shape).masked_scatter(mask, student_entropy - teacher_entropy)
        lengths = mask.sum(-1)
        difficulty = torch.sigmoid(gap.double().sum(-1) / lengths.clamp(min=1))
        window = self.window if training else self.window.copy()
        ratios = []
        for value, length in zip(difficulty.tolist(), lengths.tolist(), strict=True):
            if length > 0:
                window.append(value)
            ratios.append(adaptive_opener_ratio(sum(window) / len(window)) if window else self.opener_ratio)
        return torch.tensor(ratios, dtype=torch.float64, device=mask.device)

    def _metrics(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        mask: Tensor,
        opener: Tensor,
        gate: Tensor,
        student_entropy: Tensor,
        teacher_entropy: Tensor,
    ) -> dict[str, tuple[Tensor, Tensor]]:
        inside = opener[mask]
        present = mask.any(-1)
        agreement = student_logits[inside].argmax(-1) == self._teacher_choice(
            student_logits[inside], teacher_logits[inside]
        )
        return {
            "opener/length": mean_of(opener.sum(-1)[present]),
            "opener/share": mean_of((opener.sum(-1) / mask.sum(-1).clamp(min=1))[present]),
            "opener/top1_agreement": mean_of(agreement),
            "gate": mean_of(gate),
            "entropy/student": mean_of(student_entropy),
            "entropy/teacher": mean_of(teacher_entropy),
        }

    def _teacher_choice(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """The teacher's favourite among the student's candidates."""
        candidates = student_logits.topk(min(self.indirect_top_k, student_logits.shape[-1]), dim=-1).indices
        return candidates.gather(-1, teacher_logits.gather(-1, candidates).argmax(-1, keepdim=True)).squeeze(-1)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to continue."""
        return {"window": list(self.window)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.window = deque(state["window"], maxlen=5)
