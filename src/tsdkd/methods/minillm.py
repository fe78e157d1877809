"""MiniLLM: policy gradient of the future reverse KL, plus each token's reverse KL (Gu et al. 2023, arXiv 2306.08543).

Completions are sampled from a mixture of teacher and student (`tsdkd.rollout.mixed`). The importance ratio is taken
against this mixture. The language modeling loss on a pre-training corpus is not implemented.
"""

from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from ..config.options import AT_LEAST_ONE, FRACTION, OPEN_FRACTION, POSITIVE, option
from ..data import completion_mask
from ..lm_head.statistics import StatisticsRequest, TokenStatistics
from ..losses import REVERSE_KL, clipped_policy_loss
from ..objective import CompletionBatch, Metrics, Objective, PolicyScores, approx_kl, mean_metric
from ..rollout.base import Sampler, TokenChoice
from ..rollout.build import make_sampler
from ..rollout.categorical import sample_tokens
from ..trainer.rollout_buffer import Batch, MicroBatches
from ..trainer.rollout_scores import ScoredRolloutTrainer
from .defaults import SELF_SAMPLING_UNSUPPORTED, TEACHER_SAMPLES_UNSUPPORTED, RolloutConfig


@dataclass
class MiniLLMOptions:
    """Options of MiniLLM; the defaults are those of its public code."""

    epsilon: float = option(0.2, "PPO clipping range.", OPEN_FRACTION)
    teacher_mixture: float = option(
        0.2, "Weight of the teacher in the mixture that completions are sampled from.", FRACTION
    )
    reward_scaling: float = option(0.5, "Divides the rewards.", POSITIVE)
    reward_clip: float = option(100.0, "Maximum absolute value of a scaled reward.", POSITIVE)
    gamma: float = option(0.95, "Discount factor per token.", FRACTION)


@dataclass
class MiniLLMConfig(MiniLLMOptions, RolloutConfig):
    """Policy gradient of the reverse KL, on completions sampled from a mixture of teacher and student."""

    method = "minillm"
    completions_source = "sampled from a mixture of teacher and student; each is trained on num_iterations times"
    paper = "Gu et al. 2023, arXiv 2306.08543"
    has_lmbda = False
    teacher_samples = True
    unsupported_options = {**SELF_SAMPLING_UNSUPPORTED, **TEACHER_SAMPLES_UNSUPPORTED}

    warmup_steps: float = option(0.1, "Number of warmup steps, or a fraction of all steps if below 1.")
    rollout_batch_size: int = option(256)
    num_iterations: int = option(4, "Training passes over each rollout.", AT_LEAST_ONE)

    @property
    def iterations_per_rollout(self) -> int:
        """See `TokenSelectiveConfig`."""
        return self.num_iterations

    def steps_per_rollout(self, processes: int | None = None) -> int:
        """Number of optimizer steps per rollout, over all `num_iterations` passes."""
        return super().steps_per_rollout(processes) * self.num_iterations


@dataclass
class MiniLLMObjective(MiniLLMOptions, Objective):
    """Mean of both terms over tokens."""

    scores_class = PolicyScores

    @property
    def term_weights(self) -> dict[str, float]:
        """See `Objective`."""
        return {"policy": 1.0, "reverse_kl": 1.0}

    def request(self, completions: CompletionBatch) -> StatisticsRequest:
        """See `Objective`."""
        return StatisticsRequest(
            entropy=True, teacher_entropy=True, divergence=REVERSE_KL, ids=completions.ids.unsqueeze(-1)
        )

    def per_token_terms(
        self, completions: CompletionBatch, statistics: TokenStatistics, rows: slice
    ) -> dict[str, Tensor]:
        """See `Objective`.

        `old_per_token_logps` are log-probabilities under the mixture; `advantages` are the whitened returns.
        """
        scores = completions.scores.select(rows)
        logps, old_logps = statistics.logps[:, 0], scores.old_per_token_logps
        policy = clipped_policy_loss(logps, old_logps, scores.advantages, self.epsilon)
        return {"policy": policy, "reverse_kl": statistics.divergence}

    def metrics(self, statistics: TokenStatistics, completions: CompletionBatch) -> Metrics:
        """See `Objective`."""
        log_ratio = statistics.logps[:, 0].detach() - completions.scores.old_per_token_logps
        policy = {"policy/ratio": mean_metric(log_ratio.exp()), "policy/approx_kl": approx_kl(log_ratio)}
        return super().metrics(statistics, completions) | policy

    def compute_mixture_logps(self, student_logps: Tensor, teacher_logps: Tensor) -> Tensor:
        """Log-probabilities of the sampled tokens under the mixture, nats."""
        share = student_logps.new_full((), self.teacher_mixture)
        return torch.logaddexp(share.log() + teacher_logps, (1 - share).log() + student_logps)

    def compute_returns(self, student_logps: Tensor, teacher_logps: Tensor, mask: Tensor) -> Tensor:
        """Discounted sum of the rewards from each token on, divided by the number of tokens left.

        Args:
            student_logps, teacher_logps: `[N]`, log-probabilities of the sampled tokens, nats.
            mask: `[B, T]` bool with N true entries, one response per row, contiguous.

        Returns:
            `[N]`.
        """
        reward = ((teacher_logps - student_logps) / self.reward_scaling).clamp(-self.reward_clip, self.reward_clip)
        rewards = reward.new_zeros(mask.shape).masked_scatter(mask, reward)
        total, sums = torch.zeros_like(rewards[:, 0]), []
        for t in reversed(range(mask.shape[1])):
            total = rewards[:, t] + self.gamma * total
            sums.append(total)
        left = mask.flip(-1).cumsum(-1).flip(-1).clamp(min=1)
        return (torch.stack(sums[::-1], dim=-1) / left)[mask]


class MiniLLMTrainer(ScoredRolloutTrainer):
    """MiniLLM (arXiv 2306.08543). Arguments: see `TokenSelectiveTrainer`."""

    config_class = MiniLLMConfig
    objective_class = MiniLLMObjective
    objective: MiniLLMObjective

    def _make_sampler(self) -> Sampler:
        mixed_with = (self.teacher_model, mixture_choice(self.args.teacher_mixture, self.args.temperature))
        return make_sampler(
            self.model, self.accelerator, self.args, self.pair, self.stop_token_ids, mixed_with=mixed_with
        )

    def _postprocess_micro_batch(self, model: nn.Module, batch: Batch, step: int, mode: str) -> None:
        """Score the rollout, replace the student's log-probabilities by the mixture's, and compute the returns."""
        super()._postprocess_micro_batch(model, batch, step, mode)
        scores = batch["scores"]
        logps = (scores["old_per_token_logps"], scores["teacher_per_token_logps"])
        scores["advantages"] = self.objective.compute_returns(*logps, completion_mask(batch))
        scores["old_per_token_logps"] = self.objective.compute_mixture_logps(*logps)

    def _roll_out(self, model: nn.Module, parts: list[list[Batch]], step: int, mode: str) -> list[MicroBatches]:
        entries = super()._roll_out(model, parts, step, mode)
        self._whiten_advantages(list(chain.from_iterable(entries)))
        return entries

    def _whiten_advantages(self, batches: list[Batch]) -> None:
        """Normalize to mean 0 and variance 1 over the tokens of all processes.

        The result does not depend on how the batch is split over processes.
        """
        values = [batch["scores"]["advantages"].double() for batch in batches]
        own = torch.cat([*values, torch.zeros(0, dtype=torch.float64, device=self.accelerator.device)])
        sums = torch.stack([own.new_tensor(len(own)), own.sum(), own.square().sum()])
        count, total, squares = self.accelerator.reduce(sums, reduction="sum")
        mean = total / count.clamp(min=1)
        scale = (squares / count.clamp(min=1) - mean.square()).clamp(min=0).add(1e-8).rsqrt()
        for batch, value in zip(batches, values, strict=True):
            batch["scores"]["advantages"] = ((value - mean) * scale).float()


def mixture_choice(teacher_share: float, temperature: float) -> TokenChoice:
    """Sample from `teacher_share P + (1 - teacher_share) Q` (MiniLLM, Eq. 5)."""

    def choose(logits: list[Tensor], uniform: Tensor) -> Tensor:
        student, teacher = ((x / temperature).softmax(-1) for x in logits)
        return sample_tokens((teacher_share * teacher + (1 - teacher_share) * student).log(), uniform[:, 0])[0]

    return choose
