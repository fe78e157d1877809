"""The loss of TSD-KD's public code, which differs from the paper's. For measuring the difference (docs/fidelity.md).

The ranking is reversed. One opener is computed for the whole micro-batch; it is one token too short and covers the
same columns in all rows. The entropy term uses all positions, padding included, except the tenth with the lowest
entropy. All terms are means over the micro-batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config.options import FRACTION, NON_NEGATIVE, POSITIVE_FRACTION, option
from ..data import completion_mask
from ..lm_head.statistics import StatisticsRequest, TokenStatistics
from ..losses import jsd
from ..objective import CompletionBatch, Objective, ObjectiveOutput
from ..selection import entropy_gap_gate
from ..trainer.trainer import Batch, TokenSelectiveTrainer
from .defaults import TOP_P_UNSUPPORTED, TSDKDDefaults

_NUM_CANDIDATES = 10


@dataclass
class TSDKDReleasedOptions:
    """Arguments of the public code. The gate's temperature and the number of candidates are constants there."""

    alpha: float = option(0.1, "Weight of indirect distillation.", NON_NEGATIVE)
    beta: float = option(0.9, "Interpolates the JSD between forward (0) and reverse (1) KL.", FRACTION)
    threshold: float = option(
        0.1, "Fraction of the entropy in the opener, and quantile for the entropy term.", POSITIVE_FRACTION
    )


@dataclass
class TSDKDReleasedConfig(TSDKDReleasedOptions, TSDKDDefaults):
    """The loss of TSD-KD's public code, including its reversed ranking; for measuring the difference."""

    method = "tsd-kd-released"
    paper = "github.com/kmswin1/TSD-KD"
    has_jsd = True
    unsupported_options = {
        **TOP_P_UNSUPPORTED,
        "teacher_chat_template_kwargs": "the public code gives both models the same prompts",
        "padding_free": "the loss depends on the padding of its micro-batches",
        "max_tokens_per_micro_batch": "the loss depends on the split into micro-batches",
    }


@dataclass
class TSDKDReleasedObjective(TSDKDReleasedOptions, Objective):
    """The loss of the public code.

    `CompletionBatch.mask` covers completions and padding as a rectangle. `loss_mask` excludes padding and
    end-of-sequence tokens, which the public code treats as padding.
    """

    unit = "micro-batches"
    micro_batching = "fixed"

    @property
    def loss_weights(self) -> dict[str, float]:
        """See `Objective`."""
        return {"direct": 1.0, "indirect": self.alpha, "entropy": 1.0}

    def request(self, completions: CompletionBatch) -> StatisticsRequest:
        """See `Objective`."""
        return StatisticsRequest(entropy=True, teacher_entropy=True, divergence=jsd(self.beta), top_k=_NUM_CANDIDATES)

    def per_token_loss(self, completions: CompletionBatch) -> None:
        """See `Objective`. None, because every term depends on other tokens."""

    def loss(self, statistics: TokenStatistics, completions: CompletionBatch) -> ObjectiveOutput:
        """See `Objective`."""
        in_loss = completions.gather(completions.loss_mask)
        index = in_loss.nonzero().squeeze(-1)
        gate = entropy_gap_gate(statistics.entropy, statistics.teacher_entropy)
        terms = {"direct": (gate * statistics.divergence)[index].sum() / in_loss.sum().clamp(min=1)}
        entropy = statistics.entropy.detach()
        valid = entropy[index].float()
        opener = (completions.gather(self._opener_columns(valid, completions.mask)) & in_loss).nonzero().squeeze(-1)
        terms["indirect"] = reversed_plackett_luce_nll(
            statistics.topk_logits[opener], statistics.teacher_topk_logits[opener]
        ).sum() / max(len(opener), 1)
        high = entropy >= (torch.quantile(valid, self.threshold) if len(valid) else torch.inf)
        terms["entropy"] = statistics.entropy.where(high, 0.0).sum() / high.sum().clamp(min=1)
        weights = self.loss_weights
        loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        return ObjectiveOutput(loss, terms, weights, self.metrics(statistics, completions))

    def _opener_columns(self, valid: Tensor, mask: Tensor) -> Tensor:
        """`[B, T]` bool, true in the first columns of the completions.

        The number of columns is the number of leading tokens in the flattened micro-batch whose cumulative entropy is
        below the threshold.
        """
        cut = (valid.cumsum(0) / valid.sum() < self.threshold).sum()
        start = mask.int().argmax(-1, keepdim=True)
        column = torch.arange(mask.shape[1], device=mask.device) - start
        return (column >= 0) & (column < cut)


def reversed_plackett_luce_nll(student: Tensor, teacher: Tensor) -> Tensor:
    """Eq. 4 with sums over a prefix instead of a suffix, which gives the likelihood of the reversed order.

    Args:
        student, teacher: `[n, k]`, logits of both models for the student's candidates, float32.

    Returns:
        `[n]`, nats.
    """
    ranking = teacher.argsort(dim=-1, descending=True, stable=True)
    ranked = student.gather(-1, ranking)
    return (ranked.logcumsumexp(-1) - ranked).sum(-1)


class TSDKDReleasedTrainer(TokenSelectiveTrainer):
    """Computes statistics at all positions up to the length of the longest completion, padding included.

    Arguments: see `TokenSelectiveTrainer`.
    """

    config_class = TSDKDReleasedConfig
    objective_class = TSDKDReleasedObjective

    def _postprocess_micro_batch(self, model: nn.Module, batch: Batch, step: int, mode: str) -> None:
        """Pad every row with end-of-sequence tokens up to the longest completion; attention masks the padding."""
        width = int(batch["prompt_lengths"].max() + batch["completion_lengths"].max())
        ids = nn.functional.pad(batch["input_ids"], (0, width - batch["input_ids"].shape[1]))
        lengths = batch["prompt_lengths"] + batch["completion_lengths"]
        in_sequence = torch.arange(width, device=ids.device) < lengths.unsqueeze(-1)
        batch["input_ids"], batch["attention_mask"] = (
            ids.masked_fill(~in_sequence, self._eos_token_id),
            in_sequence.long(),
        )

    def _position_mask(self, batch: Batch) -> Tensor:
        longest = batch["completion_lengths"].max()
        return completion_mask({**batch, "completion_lengths": longest.expand_as(batch["completion_lengths"])})

    def _completion_batch(self, batch: Batch, mode: str) -> CompletionBatch:
        completions = super()._completion_batch(batch, mode)
        completions.loss_mask = completion_mask(batch) & (batch["input_ids"][:, 1:] != self._eos_token_id)
        return completions

    @property
    def _eos_token_id(self) -> int:
        end: int = self.pair.tokenizer.eos_token_id
        return end if end is not None else min(self.stop_token_ids, default=0)
