"""Controls for TSD-KD's claims: the same terms on other tokens, or with another ranking. Not methods to train with.

    tsdkd train --config demo.yaml --method tsdkd.reproduce.controls:TSDKDControlTrainer --ranked_tokens random

With `ranked_tokens` and `entropy_tokens`, a term acts on as many tokens as in TSD-KD, so that only their choice
differs. `ranking: improbable` replaces the indirect term by one on all improbable tokens.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..config.options import POSITIVE_FRACTION, option
from ..lm_head.statistics import StatisticsRequest, TokenStatistics
from ..methods.tsd_kd import TSDKDConfig, TSDKDObjective, TSDKDOptions
from ..methods.tsd_kd_released import reversed_plackett_luce_nll
from ..objective import CompletionBatch
from ..trainer.trainer import TokenSelectiveTrainer

_ALPHA_IS_ZERO = (lambda v: v["alpha"] == 0, "alpha is 0")
_NOT_RANKED = (lambda v: v["alpha"] == 0 or v["ranking"] == "improbable", "alpha is 0 or ranking is improbable")


@dataclass
class TSDKDControlOptions(TSDKDOptions):
    """Options of the controls."""

    ranked_tokens: Literal["opener", "random", "last"] = option(
        "opener",
        "Tokens of the indirect term: the opener, or as many random or last tokens of the response.",
        no_effect=_NOT_RANKED,
    )
    ranking: Literal["teacher", "reversed", "improbable"] = option(
        "teacher",
        "Indirect term: the teacher's ranking, the same reversed as in the public code, or no ranking at all: the "
        "sampled token's log-probability is lowered wherever it is below improbable_below.",
        no_effect=_ALPHA_IS_ZERO,
    )
    improbable_below: float = option(
        0.1,
        "Probability of a sampled token below which `ranking: improbable` lowers it.",
        POSITIVE_FRACTION,
        (lambda v: v["ranking"] != "improbable", "ranking is not improbable"),
    )
    entropy_tokens: Literal["uncertain", "random"] = option(
        "uncertain",
        "Tokens of entropy minimization: the most uncertain ones, or as many random ones.",
        no_effect=(lambda v: v["entropy_weight"] == 0, "entropy_weight is 0"),
    )


@dataclass
class TSDKDControlConfig(TSDKDControlOptions, TSDKDConfig):
    """TSD-KD with its terms on other tokens or with another ranking, to test its claims."""

    method = "tsd-kd-control"


@dataclass
class TSDKDControlObjective(TSDKDControlOptions, TSDKDObjective):
    """TSD-KD's objective with exchanged selections. With the defaults it is TSD-KD's."""

    def request(self, completions: CompletionBatch) -> StatisticsRequest:
        """See `Objective`."""
        request = super().request(completions)
        if self.ranking == "improbable" and self.alpha != 0:
            return replace(request, ids=completions.ids.unsqueeze(-1))
        return request

    def select_for_ranking(self, entropy: Tensor, statistics: TokenStatistics, completions: CompletionBatch) -> Tensor:
        """See `TSDKDObjective`."""
        opener = super().select_for_ranking(entropy, statistics, completions)
        if self.ranked_tokens == "opener":
            return opener
        if self.ranked_tokens == "random":
            order = _random_order(completions)
        else:
            order = torch.arange(entropy.shape[-1], 0, -1, device=entropy.device).expand_as(entropy)
        return _first_in_order(order, opener.sum(-1), completions.mask)

    def select_for_entropy(self, entropy: Tensor, completions: CompletionBatch) -> Tensor:
        """See `TSDKDObjective`."""
        uncertain = super().select_for_entropy(entropy, completions)
        if self.entropy_tokens == "uncertain":
            return uncertain
        return _first_in_order(_random_order(completions), uncertain.sum(-1), completions.mask)

    def ranking_nll(self, student: Tensor, teacher: Tensor) -> Tensor:
        """See `TSDKDObjective`."""
        if self.ranking == "reversed":
            return reversed_plackett_luce_nll(student, teacher)
        return super().ranking_nll(student, teacher)

    def _indirect_loss(
        self, statistics: TokenStatistics, completions: CompletionBatch, opener: Tensor, opener_index: Tensor
    ) -> Tensor:
        if self.ranking != "improbable":
            return super()._indirect_loss(statistics, completions, opener, opener_index)
        # a constant advantage of -1: the gradient of the log-probability, on improbable tokens of the whole response
        logps = statistics.logps[:, 0]
        improbable = logps.detach() < torch.tensor(self.improbable_below).log()
        return (completions.token_weights.to(logps) * logps * improbable).sum()


def _random_order(completions: CompletionBatch) -> Tensor:
    """`[B, T]`, random numbers that depend on the completions alone, so that a resumed run repeats them."""
    seed = int((completions.ids.double() * torch.arange(1, len(completions.ids) + 1).to(completions.ids)).sum())
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(completions.mask.shape, generator=generator).to(completions.mask.device)


def _first_in_order(order: Tensor, count: Tensor, mask: Tensor) -> Tensor:
    """`[B, T]` bool, the `count` `[B]` tokens of each row of `mask` with the smallest `order` `[B, T]`."""
    rank = order.float().masked_fill(~mask, float("inf")).argsort(-1).argsort(-1)
    return mask & (rank < count.unsqueeze(-1))


class TSDKDControlTrainer(TokenSelectiveTrainer):
    """Trains with exchanged selections. Arguments: see `TokenSelectiveTrainer`."""

    config_class = TSDKDControlConfig
    objective_class = TSDKDControlObjective
