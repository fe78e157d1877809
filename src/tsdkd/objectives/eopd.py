"""EOPD: clipped reverse KL, plus top-k forward KL where the teacher is uncertain (Eq. 9), a mean over tokens."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..losses import clipped_policy_loss, forward_kl_on, token_entropy
from . import ObjectiveOutput, mean_of


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
    """

    old_logps: Tensor
    teacher_logps: Tensor
    teacher_entropy: Tensor
    topk_ids: Tensor
    topk_logps: Tensor
    random_uniform: Tensor


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

    def __call__(self, student_logits: Tensor, sampled_ids: Tensor, answers: TeacherAnswers) -> ObjectiveOutput:
        """Sums over the tokens of a micro-batch.

        Args:
            student_logits: `[N, V]`, temperature applied.
            sampled_ids: `[N]`, the response tokens.
            answers: the stored answers for the same N tokens.
        """
        logps_NV = student_logits.float().log_softmax(-1)
        logps = logps_NV.gather(-1, sampled_ids.unsqueeze(-1)).squeeze(-1)
        with torch.set_grad_enabled(self.entropy_bonus != 0 and torch.is_grad_enabled()):
            entropy = token_entropy(student_logits)

        advantages = answers.teacher_logps - answers.old_logps
        if self.advantage_shaping != 0:
            # Eq. 11 of EOPD, kappa = 2
            advantages = advantages + torch.minimum(self.advantage_shaping * entropy.detach(), advantages.abs() / 2)
        forward_kl = forward_kl_on(logps_NV.gather(-1, answers.topk_ids), answers.topk_logps)

        terms = {"reverse_kl": clipped_policy_loss(logps, answers.old_logps, advantages, self.clip_epsilon).sum()}
        weights = {"reverse_kl": 1.0}
        if self.forward_kl_placement != "none":
            terms["forward_kl"] = (forward_kl * self._placement(answers)).sum()
            weights["forward_kl"] = 1.0
        if self.entropy_bonus != 0:
            terms["entropy"] = entropy.sum()
            weights["entropy"] = -self.entropy_bonus
        return ObjectiveOutput(terms, weights, self._metrics(logps, advantages, forward_kl, entropy, answers))

    def _placement(self, answers: TeacherAnswers) -> Tensor:
        if self.forward_kl_placement == "all":
            return torch.ones_like(answers.teacher_entropy, dtype=torch.bool)
        if self.forward_kl_placement == "random":
            return answers.random_uniform < self.forward_kl_random_ratio
        return answers.teacher_entropy > self.entropy_threshold

    def _metrics(
        self, logps: Tensor, advantages: Tensor, forward_kl: Tensor, entropy: Tensor, answers: TeacherAnswers
    ) -> dict[str, tuple[Tensor, Tensor]]:
        ratio = (logps.detach() - answers.old_logps).exp()
        too_high = (ratio > 1 + self.clip_epsilon) & (advantages > 0)
        too_low = (ratio < 1 - self.clip_epsilon) & (advantages < 0)
        uncertain = answers.teacher_entropy > self.entropy_threshold
        return {
            "policy/clip_fraction": mean_of(too_high | too_low),
            "policy/ratio": mean_of(ratio),
            "uncertain/share": mean_of(uncertain),
            "uncertain/forward_kl": mean_of(forward_kl[uncertain]),
            "entropy/student": mean_of(entropy),
            "entropy/teacher": mean_of(answers.teacher_entropy),
        }

    def state_dict(self) -> dict[str, Any]:
        """EOPD has no state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """EOPD has no state."""
