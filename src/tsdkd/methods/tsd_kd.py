"""TSD-KD: `alpha L_Indirect + L_Direct + L_EM` (Eq. 13), each term a mean over the responses of the global batch."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..config.options import FRACTION, NON_NEGATIVE, POSITIVE, POSITIVE_FRACTION, option
from ..lm_head.statistics import Head, PerTokenLoss, StatisticsRequest, TokenStatistics
from ..losses import jsd, plackett_luce_nll
from ..objective import CompletionBatch, Objective, ObjectiveOutput, common_metrics, mean_metric
from ..selection import adaptive_opener_ratio, entropy_gap_gate, opener_mask, top_entropy_mask
from ..trainer.trainer import TokenSelectiveTrainer
from .defaults import NO_TOP_P, TSDKDDefaults

_ALPHA_IS_ZERO = (lambda v: v["alpha"] == 0, "alpha is 0")
_AT_LEAST_TWO = (lambda v: v >= 2, "must be at least 2 (one candidate has no ranking)")


@dataclass
class TSDKDOptions:
    """Options of TSD-KD (Table 10; Sec. 4.1).

    Args:
        alpha: weight of indirect distillation (Eq. 13); 0 turns it off.
        beta: of the generalised JSD (Eq. 1).
        indirect_top_k: number of candidates that the student proposes.
        opener_ratio: c, the opener's share of a response's entropy.
        adaptive_opener: choose c by the difficulty of the last five responses (A.7).
        gate: weigh direct distillation by the entropy gap (Eq. 11).
        gate_temperature: tau of the gate, nats.
        entropy_weight: weight of entropy minimisation (1 in the paper); 0 turns it off.
        entropy_ratio: share of a response's tokens whose entropy is minimised.
        indirect_reduction: over the opener's positions: "mean", "sum" (Eq. 5 as written), or "length" (sum / L).
    """

    alpha: float = option(0.1, "Weight of indirect distillation; 0 turns it off.", NON_NEGATIVE)
    beta: float = option(0.9, "Interpolates between forward (0) and reverse (1) KL.", FRACTION)
    indirect_top_k: int = option(
        10, "Number of candidates that the student proposes to the teacher.", _AT_LEAST_TWO, _ALPHA_IS_ZERO
    )
    opener_ratio: float = option(
        0.1,
        "The opener's share of a response's entropy.",
        POSITIVE_FRACTION,
        (lambda v: v["alpha"] == 0 or v["adaptive_opener"], "alpha is 0 or adaptive_opener is true"),
    )
    adaptive_opener: bool = option(
        False, "Choose the opener's share by the difficulty of recent responses.", pointless=_ALPHA_IS_ZERO
    )
    gate: bool = option(True, "Weigh direct distillation by the entropy gap.")
    gate_temperature: float = option(
        1.0, "Temperature of the gate, nats.", POSITIVE, (lambda v: not v["gate"], "gate is false")
    )
    entropy_weight: float = option(1.0, "Weight of entropy minimisation; 0 turns it off.", NON_NEGATIVE)
    entropy_ratio: float = option(
        0.1,
        "Share of a response's tokens whose entropy is minimised.",
        POSITIVE_FRACTION,
        (lambda v: v["entropy_weight"] == 0, "entropy_weight is 0"),
    )
    indirect_reduction: Literal["mean", "sum", "length"] = option(
        "mean", "Reduction over the opener's positions.", pointless=_ALPHA_IS_ZERO
    )


@dataclass
class TSDKDConfig(TSDKDOptions, TSDKDDefaults):
    """Token-selective dual distillation: ranking of the opener, gated JSD, entropy of the most uncertain tokens."""

    method = "tsd-kd"
    paper = "Kim and Baek 2026 (ICLR)"
    unsupported_options = NO_TOP_P


@dataclass
class TSDKDObjective(TSDKDOptions, Objective):
    """The objective of TSD-KD. All three special terms off (`gate=False`, `alpha=0`, `entropy_weight=0`) is GKD.

    `window` holds the difficulty of the last five responses that this process trained on (A.7); it is the only state.
    """

    window: deque[float] = field(default_factory=lambda: deque(maxlen=5), init=False)

    unit = "responses"

    def __call__(self, head: Head, responses: CompletionBatch) -> ObjectiveOutput:
        """See `Objective`."""
        mask, share = responses.mask, responses.shares
        direct = PerTokenLoss(
            {"direct": 1.0},
            lambda t, rows: {
                "direct": share[rows].to(t.divergence) * t.divergence * (self._compute_gate(t) if self.gate else 1.0)
            },
        )
        tokens = head(
            StatisticsRequest(
                entropy=True,
                teacher_entropy=True,
                divergence=jsd(self.beta),
                top_k=self.indirect_top_k if self.alpha != 0 else 0,
                ids=responses.logged_ids,
            ),
            direct,
        )
        loss, terms, weights = tokens.loss, dict(tokens.loss_terms), dict(direct.weights)
        entropy = tokens.entropy.new_zeros(mask.shape).masked_scatter(mask, tokens.entropy.detach())
        opener = opener_mask(entropy, mask, self._resolve_opener_ratio(tokens, mask, responses.training))
        inside = responses.at(opener).nonzero().squeeze(-1)
        if self.alpha != 0:
            terms["indirect"], weights["indirect"] = self._indirect_loss(tokens, responses, opener, inside), self.alpha
            loss = loss + self.alpha * terms["indirect"]
        if self.entropy_weight != 0:
            uncertain = top_entropy_mask(entropy, mask, self.entropy_ratio)
            per_response = responses.at(uncertain.double() / uncertain.sum(-1, keepdim=True).clamp(min=1))
            terms["entropy"] = (per_response.to(tokens.entropy) * tokens.entropy).sum()
            weights["entropy"] = self.entropy_weight
            loss = loss + self.entropy_weight * terms["entropy"]
        metrics = common_metrics(tokens, responses) | self._metrics(tokens, mask, opener, inside)
        return ObjectiveOutput(loss, terms, weights, metrics)

    def _compute_gate(self, tokens: TokenStatistics) -> Tensor:
        return entropy_gap_gate(tokens.entropy, tokens.teacher_entropy, self.gate_temperature)

    def _indirect_loss(
        self, tokens: TokenStatistics, responses: CompletionBatch, opener: Tensor, inside: Tensor
    ) -> Tensor:
        """Eq. 5 summed over responses; a response's positions are averaged, summed, or divided by its length.
        `inside`: which of the N tokens are in an opener."""
        nll = plackett_luce_nll(tokens.topk_logits[inside], tokens.teacher_topk_logits[inside], self.indirect_top_k)
        divisor = {
            "mean": opener.sum(-1),
            "sum": torch.ones_like(opener[:, 0], dtype=torch.long),
            "length": responses.mask.sum(-1),
        }
        per_row = divisor[self.indirect_reduction].clamp(min=1).unsqueeze(-1).expand_as(opener)
        return (nll / responses.at(per_row)[inside]).sum()

    def _resolve_opener_ratio(self, tokens: TokenStatistics, mask: Tensor, training: bool) -> float | Tensor:
        if not self.adaptive_opener:
            return self.opener_ratio
        difference = tokens.entropy.detach() - tokens.teacher_entropy
        gap = difference.new_zeros(mask.shape).masked_scatter(mask, difference)
        lengths = mask.sum(-1)
        difficulty = torch.sigmoid(gap.double().sum(-1) / lengths.clamp(min=1))
        window = self.window if training else self.window.copy()
        ratios = []
        for value, length in torch.stack([difficulty, lengths.double()], dim=-1).tolist():
            if length > 0:
                window.append(value)
            ratios.append(adaptive_opener_ratio(sum(window) / len(window)) if window else self.opener_ratio)
        return torch.tensor(ratios, dtype=torch.float64, device=mask.device)

    @torch.no_grad()
    def _metrics(
        self, tokens: TokenStatistics, mask: Tensor, opener: Tensor, inside: Tensor
    ) -> dict[str, tuple[Tensor, Tensor]]:
        lengths, responses = opener.sum(-1), mask.any(-1).sum()
        metrics = {
            "opener/length": (lengths.sum(), responses),
            "opener/share": ((lengths / mask.sum(-1).clamp(min=1)).sum(), responses),
            "gate": mean_metric(self._compute_gate(tokens)),
        }
        if self.alpha != 0:
            # candidates are sorted: the student's favourite is the first
            favourite = tokens.teacher_topk_logits[inside].argmax(-1)
            metrics["opener/top1_agreement"] = mean_metric(favourite == 0)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to continue."""
        return {"window": list(self.window)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.window = deque(state["window"], maxlen=5)


class TSDKDTrainer(TokenSelectiveTrainer):
    """Token-selective dual knowledge distillation (ICLR 2026). Arguments: see `TokenSelectiveTrainer`.

    Example:
        >>> trainer = TSDKDTrainer(
        ...     model="Qwen/Qwen2.5-1.5B-Instruct",
        ...     teacher_model="Qwen/Qwen2.5-14B-Instruct",
        ...     args=TSDKDConfig(output_dir="student"),
        ...     train_dataset=load_dataset("json", data_files="prompts.jsonl", split="train"),
        ... )
        >>> trainer.train()
    """

    config_class = TSDKDConfig
    objective_class = TSDKDObjective
