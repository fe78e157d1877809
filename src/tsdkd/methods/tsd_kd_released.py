"""The loss of TSD-KD's public code, which isn't its paper's: to measure the difference (docs/fidelity.md).

The ranking is reversed, one opener is cut for a whole micro-batch (a token short, as a column of all rows), the
entropy term takes all but the lowest tenth, padding included, and everything is a mean over a micro-batch.
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
    """The public code's arguments; the temperature of the gate and the number of candidates are constants there."""

    alpha: float = option(0.1, "Weight of indirect distillation.", NON_NEGATIVE)
    beta: float = option(0.9, "Interpolates between forward (0) and reverse (1) KL.", FRACTION)
    threshold: float = option(
        0.1, "The opener's share of the entropy, and the quantile of the entropies.", POSITIVE_FRACTION
    )


@dataclass
class TSDKDReleasedConfig(TSDKDReleasedOptions, TSDKDDefaults):
    """The loss of TSD-KD's public code, with its reversed ranking: to measure what it changes."""

    method = "tsd-kd-released"
    paper = "github.com/kmswin1/TSD-KD"
    has_jsd = True
    unsupported_options = TOP_P_UNSUPPORTED


@dataclass
class TSDKDReleasedObjective(TSDKDReleasedOptions, Objective):
    """`CompletionBatch.mask` is a rectangle of completions and padding, `loss_mask` what isn't padding, as
    end-of-sequence tokens are there."""

    unit = "micro-batches"

    def request(self, completions: CompletionBatch) -> StatisticsRequest:
        """See `Objective`."""
        return StatisticsRequest(entropy=True, teacher_entropy=True, divergence=jsd(self.beta), top_k=_NUM_CANDIDATES)

    def per_token_loss(self, completions: CompletionBatch) -> None:
        """See `Objective`: every term depends on the other tokens."""

    def loss(self, statistics: TokenStatistics, completions: CompletionBatch) -> ObjectiveOutput:
        """See `Objective`."""
        in_loss = completions.gather(completions.loss_mask)
        index = in_loss.nonzero().squeeze(-1)
        gate = entropy_gap_gate(statistics.entropy, statistics.teacher_entropy)
        terms = {"direct": (gate * statistics.divergence)[index].sum() / in_loss.sum().clamp(min=1)}
        entropy = statistics.entropy.detach()
        valid = entropy[index].float()
        opener = (completions.gather(self._opener_columns(valid, completions.mask)) & in_loss).nonzero().squeeze(-1)
        terms["indirect"] = _reversed_plackett_luce_nll(statistics, opener).sum() / max(len(opener), 1)
        high = entropy >= (torch.quantile(valid, self.threshold) if len(valid) else torch.inf)
        terms["entropy"] = statistics.entropy.where(high, 0.0).sum() / high.sum().clamp(min=1)
        weights = {"direct": 1.0, "indirect": self.alpha, "entropy": 1.0}
        loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        return ObjectiveOutput(loss, terms, weights, self.metrics(statistics, completions))

    def _opener_columns(self, valid: Tensor, mask: Tensor) -> Tensor:
        """`[B, T]`: the first columns of the completions, as many as tokens of the flattened micro-batch stay below
        the threshold."""
        cut = (valid.cumsum(0) / valid.sum() < self.threshold).sum()
        start = mask.int().argmax(-1, keepdim=True)
        column = torch.arange(mask.shape[1], device=mask.device) - start
        return (column >= 0) & (column < cut)


def _reversed_plackett_luce_nll(statistics: TokenStatistics, rows: Tensor) -> Tensor:
    """A prefix where Eq. 4 has a suffix: the likelihood of the opposite order."""
    ranking = statistics.teacher_topk_logits[rows].argsort(dim=-1, descending=True, stable=True)
    ranked = statistics.topk_logits[rows].gather(-1, ranking)
    return (ranked.logcumsumexp(-1) - ranked).sum(-1)


class TSDKDReleasedTrainer(TokenSelectiveTrainer):
    """Computes statistics for every completion and its padding, up to the length of the longest completion.

    Arguments: see `TokenSelectiveTrainer`.
    """

    config_class = TSDKDReleasedConfig
    objective_class = TSDKDReleasedObjective

    def _postprocess_micro_batch(self, model: nn.Module, batch: Batch, step: int, mode: str) -> None:
        """Pad until every row has room for the longest completion; the padding is end-of-sequence, which the models
        don't see."""
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
