"""Scores each rollout once and trains on it for several optimizer steps (EOPD, Algorithm 1)."""

from typing import Any

import torch
from torch import Tensor, nn

from ..data import completion_mask, target_ids
from ..lm_head.statistics import StatisticsRequest
from ..objective import PolicyScores
from ..rollout.seeding import RandomStream, prompt_generator
from ..selection import token_index
from .forward import teacher_inputs
from .trainer import Batch, TokenSelectiveTrainer


class ScoredRolloutTrainer(TokenSelectiveTrainer):
    """Trainer for methods that score each rollout once. Arguments: see `TokenSelectiveTrainer`."""

    def _postprocess_micro_batch(self, model: nn.Module, batch: Batch, step: int, mode: str) -> None:
        """Score the tokens with the teacher, keeping its top k, and with the policy that sampled."""
        index = token_index(completion_mask(batch), sum(batch["lengths"]))
        sampled = target_ids(batch, index).unsqueeze(-1)
        old_logps: Tensor | None = None
        if self.objective.scores_class is PolicyScores:
            old_logps, ratio = self._score_policy(model, batch, index, sampled)
        with self._time_teacher(batch, mode):
            request = StatisticsRequest(entropy=True, top_k=self.objective.teacher_top_k, ids=sampled)
            inputs = teacher_inputs(batch, index)
            teacher = self.head_forward.compute_statistics(self.teacher_model, *inputs, request)
        teacher_logps = teacher.logps.squeeze(-1)
        scores: dict[str, Any] = {
            "teacher_entropy": teacher.entropy,
            "teacher_per_token_logps": teacher_logps,
            "teacher_topk_ids": teacher.topk_ids,
            "teacher_topk_logps": teacher.topk_logps,
            "random_uniform": self._random_uniform(batch, step),
        }
        if old_logps is not None:
            scores["old_per_token_logps"], scores["importance_sampling_ratio"] = old_logps, ratio
            scores["advantages"] = teacher_logps - old_logps  # EOPD Eq. 6
        batch["scores"] = scores  # a dictionary, because it is part of checkpoints

    def _score_policy(self, model: nn.Module, batch: Batch, index: Tensor, sampled: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities `[N]` under the policy that sampled, and importance sampling ratios `[N]`.

        An engine returns the log-probabilities with its tokens, unless `top_p` < 1. Then no forward pass is needed.
        """
        engine_logps = batch.get("sampling_per_token_logps")
        is_corrected = getattr(self.args, "vllm_importance_sampling_correction", False)
        if engine_logps is not None and not is_corrected and self.args.top_p == 1.0:
            return engine_logps, torch.ones_like(engine_logps)
        request = StatisticsRequest(ids=sampled)
        logps = self.head_forward.compute_statistics(model, batch, index, request).logps.squeeze(-1)
        if engine_logps is None or not is_corrected:
            return logps, torch.ones_like(logps)
        return logps, (logps - engine_logps).exp().clamp(max=self.args.vllm_importance_sampling_clip_max)

    def _random_uniform(self, batch: Batch, step: int) -> Tensor:
        generators = [prompt_generator(self.args.seed, step, i, RandomStream.FORWARD_KL) for i in batch["index"]]
        numbers = [torch.rand(n, generator=g) for g, n in zip(generators, batch["lengths"], strict=True)]
        return torch.cat(numbers).to(batch["input_ids"].device, non_blocking=True)
