"""TSD-KD: `alpha L_Indirect + L_Direct + L_EM` (Eq. 13), each term a mean over the responses of the global batch."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..losses import plackett_luce_nll
from ..selection import adaptive_opener_ratio, entropy_gap_gate, opener_mask, top_entropy_mask
from ..statistics import Head, OwnTokenLoss, Request, TokenStatistics
from . import ObjectiveOutput, mean_of, sampling_metrics


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
        self,
        head: Head,
        mask: Tensor,
        *,
        training: bool = True,
        sampled_ids: Tensor | None = None,
        sampler_logps: Tensor | None = None,
    ) -> ObjectiveOutput:
        """Sums over the responses of a micro-batch.

        Args:
            head: answers about the N response tokens of `mask`, in row order.
            mask: `[B, T]` bool with N true entries, a row a response.
            training: whether the adaptive opener's window moves on.
            sampled_ids: `[N]`, the response tokens; only `sampler_logps` needs them.
            sampler_logps: `[N]`, their log-probabilities under the engine that sampled them, nats, for the log.
        """
        share = (1.0 / mask.sum(-1, keepdim=True).clamp(min=1)).expand_as(mask)[mask]  # weight in a response's mean
        direct = OwnTokenLoss(
            {"direct": 1.0}, lambda t, rows: {"direct": share[rows] * t.jsd * (self._gate(t) if self.gate else 1.0)}
        )
        tokens = head(
            Request(
                entropy=True,
                teacher_entropy=True,
                jsd_beta=self.beta,
                top_k=self.indirect_top_k if self.alpha != 0 else 0,
                ids=None if sampler_logps is None or sampled_ids is None else sampled_ids.unsqueeze(-1),
            ),
            direct,
        )
        loss, terms, weights = tokens.own_loss, dict(tokens.own_terms), dict(direct.weights)
        entropy = tokens.entropy.new_zeros(mask.shape).masked_scatter(mask, tokens.entropy.detach())
        opener = opener_mask(entropy, mask, self._opener_ratio(tokens, mask, training))
        if self.alpha != 0:
            terms["indirect"], weights["indirect"] = self._indirect(tokens, mask, opener), self.alpha
            loss = loss + self.alpha * terms["indirect"]
        if self.entropy_weight != 0:
            uncertain = top_entropy_mask(entropy, mask, self.entropy_ratio)
            per_response = (uncertain / uncertain.sum(-1, keepdim=True).clamp(min=1))[mask]
            terms["entropy"], weights["entropy"] = (per_response * tokens.entropy).sum(), self.entropy_weight
            loss = loss + self.entropy_weight * terms["entropy"]
        metrics = self._metrics(tokens, mask, opener)
        if tokens.logps is not None:
            metrics |= sampling_metrics(tokens.logps.squeeze(-1), sampler_logps)
        return ObjectiveOutput(loss, terms, weights, metrics)

    def _gate(self, tokens: TokenStatistics) -> Tensor:
        return entropy_gap_gate(tokens.entropy, tokens.teacher_entropy, self.gate_temperature)

    def _indirect(self, tokens: TokenStatistics, mask: Tensor, opener: Tensor) -> Tensor:
        """Eq. 5 summed over responses; a response's positions are averaged, summed, or divided by its length."""
        inside = opener[mask]
        nll = plackett_luce_nll(tokens.top_logits[inside], tokens.teacher_top_logits[inside], self.indirect_top_k)
        divisor = {
            "mean": opener.sum(-1),
            "sum": torch.ones_like(opener[:, 0], dtype=torch.long),
            "length": mask.sum(-1),
        }
        per_row = divisor[self.indirect_reduction].clamp(min=1).unsqueeze(-1).expand_as(mask)
        return (nll / per_row[opener]).sum()

    def _opener_ratio(self, tokens: TokenStatistics, mask: Tensor, training: bool) -> float | Tensor:
        if not self.adaptive_opener:
            return self.opener_ratio
        difference = tokens.entropy.detach() - tokens.teacher_entropy
        gap = difference.new_zeros(mask.shape).masked_scatter(mask, difference)
        lengths = mask.sum(-1)
        difficulty = torch.sigmoid(gap.double().sum(-1) / lengths.clamp(min=1))
        window = self.window if training else self.window.copy()
        ratios = []
        for value, length in zip(difficulty.tolist(), lengths.tolist(), strict=True):
            if length > 0:
                window.append(value)
            ratios.append(adaptive_opener_ratio(sum(window) / len(window)) if window else self.opener_ratio)
        return torch.tensor(ratios, dtype=torch.float64, device=mask.device)

    @torch.no_grad()
    def _metrics(self, tokens: TokenStatistics, mask: Tensor, opener: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        present = mask.any(-1)
        metrics = {
            "opener/length": mean_of(opener.sum(-1)[present]),
            "opener/share": mean_of((opener.sum(-1) / mask.sum(-1).clamp(min=1))[present]),
            "gate": mean_of(self._gate(tokens)),
            "entropy/student": mean_of(tokens.entropy),
            "entropy/teacher": mean_of(tokens.teacher_entropy),
        }
        if self.alpha != 0:
            # candidates are sorted: the student's favourite is the first
            favourite = tokens.teacher_top_logits[opener[mask]].argmax(-1)
            metrics["opener/top1_agreement"] = mean_of(favourite == 0)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to continue."""
        return {"window": list(self.window)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.window = deque(state["window"], maxlen=5)
