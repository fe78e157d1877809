"""TSD-KD: `alpha L_Indirect + L_Direct + L_EM` (Eq. 13), each term a mean over the completions of the global batch."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..config.options import FRACTION, NON_NEGATIVE, POSITIVE, POSITIVE_FRACTION, option
from ..lm_head.statistics import StatisticsRequest, TokenStatistics
from ..losses import jsd, plackett_luce_nll
from ..objective import CompletionBatch, Metrics, Objective, ObjectiveOutput, mean_metric
from ..selection import adaptive_opener_ratio, entropy_gap_gate, opener_mask, top_entropy_mask
from ..trainer.trainer import TokenSelectiveTrainer
from .defaults import TOP_P_UNSUPPORTED, TSDKDDefaults

_ALPHA_IS_ZERO = (lambda v: v["alpha"] == 0, "alpha is 0")
_AT_LEAST_TWO = (lambda v: v >= 2, "must be at least 2 (one candidate has no ranking)")


@dataclass
class TSDKDOptions:
    """Options of TSD-KD (Table 10; Sec. 4.1)."""

    alpha: float = option(0.1, "Weight of indirect distillation (Eq. 13); 0 disables it.", NON_NEGATIVE)
    beta: float = option(0.9, "Interpolates the JSD (Eq. 1) between forward (0) and reverse (1) KL.", FRACTION)
    indirect_top_k: int = option(
        10, "Number of student candidates that the teacher ranks.", _AT_LEAST_TWO, _ALPHA_IS_ZERO
    )
    opener_ratio: float = option(
        0.1,
        "Fraction c of a response's entropy that the opener contains.",
        POSITIVE_FRACTION,
        (lambda v: v["alpha"] == 0 or v["adaptive_opener"], "alpha is 0 or adaptive_opener is true"),
    )
    adaptive_opener: bool = option(
        False, "Choose c from the difficulty of the last five completions (A.7).", no_effect=_ALPHA_IS_ZERO
    )
    gate: bool = option(True, "Weight direct distillation by the entropy gap (Eq. 11).")
    gate_temperature: float = option(
        1.0, "Temperature tau of the gate, in nats.", POSITIVE, (lambda v: not v["gate"], "gate is false")
    )
    entropy_weight: float = option(
        1.0, "Weight of entropy minimization (1 in the paper); 0 disables it.", NON_NEGATIVE
    )
    entropy_ratio: float = option(
        0.1,
        "Fraction of a response's tokens whose entropy is minimized.",
        POSITIVE_FRACTION,
        (lambda v: v["entropy_weight"] == 0, "entropy_weight is 0"),
    )
    indirect_reduction: Literal["mean", "sum", "length"] = option(
        "mean",
        "Reduction over the opener's tokens: mean, sum (Eq. 5 as written), or length (sum / response length).",
        no_effect=_ALPHA_IS_ZERO,
    )


@dataclass
class TSDKDConfig(TSDKDOptions, TSDKDDefaults):
    """Token-selective dual distillation: candidate ranking in the opener, gated JSD, entropy minimization."""

    method = "tsd-kd"
    paper = "Kim and Baek 2026 (ICLR)"
    has_jsd = True
    unsupported_options = TOP_P_UNSUPPORTED


@dataclass
class TSDKDObjective(TSDKDOptions, Objective):
    """The objective of TSD-KD. With `gate=False`, `alpha=0` and `entropy_weight=0` it equals GKD.

    Attributes:
        difficulties: difficulties of the last five completions that this process trained on (A.7); the only state.
    """

    difficulties: deque[float] = field(default_factory=lambda: deque(maxlen=5), init=False)

    unit = "completions"

    @property
    def micro_batching(self) -> Literal["free", "in order"]:  # type: ignore[override]
        """See `Objective`. Adaptive c follows the completions in the order of training."""
        return "in order" if self.adaptive_opener else "free"

    @property
    def term_weights(self) -> dict[str, float]:
        """See `Objective`. Only the direct term can be computed from each token's statistics alone."""
        return {"direct": 1.0}

    @property
    def loss_weights(self) -> dict[str, float]:
        """See `Objective`."""
        weights = {"direct": 1.0, "indirect": self.alpha, "entropy": self.entropy_weight}
        return {name: weight for name, weight in weights.items() if weight != 0}

    def request(self, completions: CompletionBatch) -> StatisticsRequest:
        """See `Objective`."""
        return StatisticsRequest(
            entropy=True,
            teacher_entropy=True,
            divergence=jsd(self.beta),
            top_k=self.indirect_top_k if self.alpha != 0 else 0,
            ids=completions.logged_ids,
        )

    def per_token_terms(
        self, completions: CompletionBatch, statistics: TokenStatistics, rows: slice
    ) -> dict[str, Tensor]:
        """Eq. 11: the gated divergence."""
        divergence = statistics.divergence
        gate = self._compute_gate(statistics) if self.gate else 1.0
        return {"direct": completions.token_weights[rows].to(divergence) * divergence * gate}

    def loss(self, statistics: TokenStatistics, completions: CompletionBatch) -> ObjectiveOutput:
        """Eq. 13: the direct term, the ranking term on the opener, and the entropy of the most uncertain tokens."""
        loss, terms, weights = statistics.loss, dict(statistics.loss_terms), self.loss_weights
        entropy = completions.scatter(statistics.entropy.detach())
        opener = self.select_for_ranking(entropy, statistics, completions)
        opener_index = completions.gather(opener).nonzero().squeeze(-1)
        if self.alpha != 0:
            terms["indirect"] = self._indirect_loss(statistics, completions, opener, opener_index)
            loss = loss + weights["indirect"] * terms["indirect"]
        if self.entropy_weight != 0:
            terms["entropy"] = self._entropy_loss(statistics, completions, entropy)
            loss = loss + weights["entropy"] * terms["entropy"]
        metrics = self.metrics(statistics, completions) | self._opener_metrics(
            statistics, completions.mask, opener, opener_index
        )
        return ObjectiveOutput(loss, terms, weights, metrics)

    def select_for_ranking(self, entropy: Tensor, statistics: TokenStatistics, completions: CompletionBatch) -> Tensor:
        """`[B, T]` bool, the tokens whose candidates the teacher ranks: the openers. `entropy` is `[B, T]`, nats."""
        return opener_mask(entropy, completions.mask, self._resolve_opener_ratio(statistics, completions))

    def select_for_entropy(self, entropy: Tensor, completions: CompletionBatch) -> Tensor:
        """`[B, T]` bool, the tokens whose entropy is minimized: the most uncertain ones of each completion."""
        return top_entropy_mask(entropy, completions.mask, self.entropy_ratio)

    def ranking_nll(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Eq. 4 for the logits `[n, k]` of both models for the student's candidates; returns `[n]`."""
        return plackett_luce_nll(student, teacher, self.indirect_top_k)

    def _compute_gate(self, statistics: TokenStatistics) -> Tensor:
        return entropy_gap_gate(statistics.entropy, statistics.teacher_entropy, self.gate_temperature)

    def _indirect_loss(
        self, statistics: TokenStatistics, completions: CompletionBatch, opener: Tensor, opener_index: Tensor
    ) -> Tensor:
        """Eq. 5, reduced within each response by `indirect_reduction` and summed over completions.

        Args:
            opener_index: indices, among the N tokens, of the tokens in an opener.
        """
        student, teacher = statistics.topk_logits[opener_index], statistics.teacher_topk_logits[opener_index]
        nll = self.ranking_nll(student, teacher)
        divisor = {
            "mean": opener.sum(-1),
            "sum": torch.ones_like(opener[:, 0], dtype=torch.long),
            "length": completions.mask.sum(-1),
        }
        per_row = divisor[self.indirect_reduction].clamp(min=1).unsqueeze(-1).expand_as(opener)
        return (nll / completions.gather(per_row)[opener_index]).sum()

    def _entropy_loss(self, statistics: TokenStatistics, completions: CompletionBatch, entropy: Tensor) -> Tensor:
        """Eq. 12: mean entropy of the most uncertain tokens of each completion, summed over completions."""
        uncertain = self.select_for_entropy(entropy, completions)
        weights = completions.gather(uncertain.double() / uncertain.sum(-1, keepdim=True).clamp(min=1))
        return (weights.to(statistics.entropy) * statistics.entropy).sum()

    def _resolve_opener_ratio(self, statistics: TokenStatistics, completions: CompletionBatch) -> float | Tensor:
        """c: the option, or the value that follows from the difficulty of recent completions (A.7)."""
        if not self.adaptive_opener:
            return self.opener_ratio
        difference = statistics.entropy.detach() - statistics.teacher_entropy
        gap, lengths = completions.scatter(difference), completions.mask.sum(-1)
        difficulty = torch.sigmoid(gap.double().sum(-1) / lengths.clamp(min=1))
        difficulties = self.difficulties if completions.is_training else self.difficulties.copy()
        ratios = []
        for value, length in torch.stack([difficulty, lengths.double()], dim=-1).tolist():
            if length > 0:
                difficulties.append(value)
            ratios.append(
                adaptive_opener_ratio(sum(difficulties) / len(difficulties)) if difficulties else self.opener_ratio
            )
        return torch.tensor(ratios, dtype=torch.float64, device=gap.device)

    @torch.no_grad()
    def _opener_metrics(
        self, statistics: TokenStatistics, mask: Tensor, opener: Tensor, opener_index: Tensor
    ) -> Metrics:
        lengths, completions = opener.sum(-1), mask.any(-1).sum()
        metrics = {
            "opener/length": (lengths.sum(), completions),
            "opener/share": ((lengths / mask.sum(-1).clamp(min=1)).sum(), completions),
            "gate": mean_metric(self._compute_gate(statistics)),
        }
        if self.alpha != 0:
            # the candidates are sorted, so the student's best is the first
            teacher_choice = statistics.teacher_topk_logits[opener_index].argmax(-1)
            metrics["opener/top1_agreement"] = mean_metric(teacher_choice == 0)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Return the state to store in a checkpoint."""
        return {"difficulties": list(self.difficulties)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict()`."""
        self.difficulties = deque(state["difficulties"], maxlen=5)


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
