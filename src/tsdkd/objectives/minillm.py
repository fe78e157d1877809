"""MiniLLM: a policy gradient of the reverse KL to come, plus the reverse KL at each token (Gu et al. 2023,
arXiv 2306.08543).

The completions come from a mixture of teacher and student (`tsdkd.rollout.together`), which is the policy of the
importance ratio. Left out: the language-modelling loss on a pre-training corpus.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..losses import REVERSE_KL, clipped_policy_loss
from ..options import INSIDE, POSITIVE, SHARE, option
from ..statistics import Head, OwnTokenLoss, Request, TokenStatistics
from . import Objective, ObjectiveOutput, Responses, approx_kl, common_metrics, mean_of


@dataclass
class MiniLLMOptions:
    """Options of MiniLLM, as in its public code."""

    clip_epsilon: float = option(0.2, "PPO's clip.", INSIDE)
    teacher_mixture: float = option(
        0.2, "The teacher's share of the distribution that completions are sampled from.", SHARE
    )
    reward_scaling: float = option(0.5, "Divides the rewards.", POSITIVE)
    reward_clip: float = option(100.0, "Largest magnitude of a scaled reward.", POSITIVE)
    discount: float = option(0.95, "How much less the next token's reward counts.", SHARE)


@dataclass
class MiniLLMObjective(MiniLLMOptions, Objective):
    """A mean over tokens of both terms."""

    asks_once = True
    is_policy = True

    def __call__(self, head: Head, responses: Responses) -> ObjectiveOutput:
        """See `Objective`. The answers' `old_logps` are of the mixture, `advantages` of `returns`, whitened."""
        answers, sampled = responses.answers, responses.ids
        assert answers is not None and sampled is not None

        def losses(tokens: TokenStatistics, rows: slice) -> dict[str, Tensor]:
            some = answers.of(rows)
            assert some.old_logps is not None and some.advantages is not None
            policy = clipped_policy_loss(tokens.logps[:, 0], some.old_logps, some.advantages, self.clip_epsilon)
            return {"policy": policy, "reverse_kl": tokens.divergence}

        own = OwnTokenLoss({"policy": 1.0, "reverse_kl": 1.0}, losses)
        request = Request(entropy=True, teacher_entropy=True, divergence=REVERSE_KL, ids=sampled.unsqueeze(-1))
        tokens = head(request, own)
        assert answers.old_logps is not None
        log_ratio = tokens.logps[:, 0].detach() - answers.old_logps
        metrics = common_metrics(tokens, responses)
        metrics |= {"policy/ratio": mean_of(log_ratio.exp()), "policy/approx_kl": approx_kl(log_ratio)}
        return ObjectiveOutput(tokens.own_loss, tokens.own_terms, own.weights, metrics)

    def mixture_logps(self, student_logps: Tensor, teacher_logps: Tensor) -> Tensor:
        """Log-probabilities of tokens under the distribution that they were sampled from, nats."""
        share = student_logps.new_full((), self.teacher_mixture)
        return torch.logaddexp(share.log() + teacher_logps, (1 - share).log() + student_logps)

    def returns(self, student_logps: Tensor, teacher_logps: Tensor, mask: Tensor) -> Tensor:
        """The discounted rewards to come, over the number of tokens to come.

        Args:
            student_logps, teacher_logps: `[N]`, of the sampled tokens, nats.
            mask: `[B, T]` bool with N true entries, a row a response, without holes.

        Returns:
            `[N]`.
        """
        reward = ((teacher_logps - student_logps) / self.reward_scaling).clamp(-self.reward_clip, self.reward_clip)
        rewards = reward.new_zeros(mask.shape).masked_scatter(mask, reward)
        total, sums = torch.zeros_like(rewards[:, 0]), []
        for t in reversed(range(mask.shape[1])):
            total = rewards[:, t] + self.discount * total
            sums.append(total)
        left = mask.flip(-1).cumsum(-1).flip(-1).clamp(min=1)
        return (torch.stack(sums[::-1], dim=-1) / left)[mask]
