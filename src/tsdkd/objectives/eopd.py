"""EOPD: clipped reverse KL, plus top-k forward KL where the teacher is uncertain (Eq. 9), a mean over tokens."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..losses import clipped_policy_loss, forward_kl_on
from ..statistics import Head, OwnTokenLoss, Request, TokenStatistics
from . import ObjectiveOutput, mean_of, sampling_metrics


@dataclass
class TeacherAnswers:
    """What the teacher said of the N tokens of a rollout (Alg. 1, line 9), and the policy that sampled them.

    Attributes:
        old_logps: `[N]`, log-probabilities of the sampled tokens under the policy that sampled them, nats.
        teacher_logps: `[N]`, under the teacher, nats.
        teacher_entropy: `[N]`, over the full vocabulary, nats.
        topk_ids: `[N, K]`, the teacher's most probable tokens.
        topk_logps: `[N, K]`, their log-probabilities, nats.
        random_uniform: `[N]` in [0, 1), for the random placement of forward KL.
        importance: `[N]`, weights of the clipped reverse KL where an engine sampled from another distribution than
            `old_logps`; None where it didn't.
    """

    old_logps: Tensor
    teacher_logps: Tensor
    teacher_entropy: Tensor
    topk_ids: Tensor
    topk_logps: Tensor
    random_uniform: Tensor
    importance: Tensor | None = None

    def of(self, rows: slice) -> "TeacherAnswers":
        """Those of some of the N tokens."""
        some: dict[str, Any] = {name: None if all_ is None else all_[rows] for name, all_ in vars(self).items()}
        return TeacherAnswers(**some)


@dataclass
class EOPDObjective:
    """The objective of EOPD and of the strategies it is compared with (Tables 4 and 6).

    `forward_kl_placement="none"` is plain on-policy distillation.
    """

    entropy_threshold: float = 0.8
    forward_kl_placement: str = "entropy"
    forward_kl_random_ratio: float = 0.2
    clip_epsilon: float = 0.2
    entropy_bonus: float = 0.0
    advantage_shaping: float = 0.0

    unit = "tokens"

    def __call__(
        self, head: Head, sampled_ids: Tensor, answers: TeacherAnswers, sampler_logps: Tensor | None = None
    ) -> ObjectiveOutput:
        """Sums over the tokens of a micro-batch.

        Args:
            head: answers about the student's distributions at the N response tokens.
            sampled_ids: `[N]`, the response tokens.
            answers: the stored answers for the same N tokens.
            sampler_logps: `[N]`, log-probabilities under the engine that sampled them, nats, for the log.
        """
        own = OwnTokenLoss(self._weights(), lambda tokens, rows: self._terms(tokens, answers.of(rows)))
        ids = torch.cat([sampled_ids.unsqueeze(-1), answers.topk_ids], dim=-1)
        tokens = head(Request(entropy=True, ids=ids), own)
        metrics = self._metrics(tokens, answers) | sampling_metrics(tokens.logps[:, 0], sampler_logps)
        return ObjectiveOutput(tokens.own_loss, tokens.own_terms, own.weights, metrics)

    def _weights(self) -> dict[str, float]:
        weights = {"reverse_kl": 1.0}
        if self.forward_kl_placement != "none":
            weights["forward_kl"] = 1.0
        if self.entropy_bonus != 0:
            weights["entropy"] = -self.entropy_bonus
        return weights

    def _terms(self, tokens: TokenStatistics, answers: TeacherAnswers) -> dict[str, Tensor]:
        """Each term of each token: all of EOPD depends on a token's own statistics only."""
        logps, topk_logps = tokens.logps[:, 0], tokens.logps[:, 1:]
        advantages = self._advantages(tokens, answers)
        terms = {"reverse_kl": clipped_policy_loss(logps, answers.old_logps, advantages, self.clip_epsilon)}
        if answers.importance is not None:
            terms["reverse_kl"] = terms["reverse_kl"] * answers.importance
        if self.forward_kl_placement != "none":
            terms["forward_kl"] = forward_kl_on(topk_logps, answers.topk_logps) * self._placement(answers)
        if self.entropy_bonus != 0:
            terms["entropy"] = tokens.entropy
        return terms

    def _advantages(self, tokens: TokenStatistics, answers: TeacherAnswers) -> Tensor:
        advantages = answers.teacher_logps - answers.old_logps
        if self.advantage_shaping != 0:
            # Eq. 11 of EOPD, kappa = 2
            shaping = self.advantage_shaping * tokens.entropy.detach()
            advantages = advantages + torch.minimum(shaping, advantages.abs() / 2)
        return advantages

    def _placement(self, answers: TeacherAnswers) -> Tensor:
        if self.forward_kl_placement == "all":
            return torch.ones_like(answers.teacher_entropy, dtype=torch.bool)
        if self.forward_kl_placement == "random":
            return answers.random_uniform < self.forward_kl_random_ratio
        return answers.teacher_entropy > self.entropy_threshold

    @torch.no_grad()
    def _metrics(self, tokens: TokenStatistics, answers: TeacherAnswers) -> dict[str, tuple[Tensor, Tensor]]:
        advantages = self._advantages(tokens, answers)
        ratio = (tokens.logps[:, 0] - answers.old_logps).exp()
        too_high = (ratio > 1 + self.clip_epsilon) & (advantages > 0)
        too_low = (ratio < 1 - self.clip_epsilon) & (advantages < 0)
        uncertain = answers.teacher_entropy > self.entropy_threshold
        forward_kl = forward_kl_on(tokens.logps[:, 1:], answers.topk_logps)
        return {
            "policy/clip_fraction": mean_of(too_high | too_low),
            "policy/ratio": mean_of(ratio),
            "uncertain/share": mean_of(uncertain),
            "uncertain/forward_kl": mean_of(forward_kl[uncertain]),
            "entropy/student": mean_of(tokens.entropy),
            "entropy/teacher": mean_of(answers.teacher_entropy),
        }

    def state_dict(self) -> dict[str, Any]:
        """EOPD has no state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """EOPD has no state."""
