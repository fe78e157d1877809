"""`ScoredRolloutTrainer`: one rollout, one query of the teacher, several optimizer steps (EOPD's Algorithm 1)."""

from typing import Any

import torch
from torch import Tensor, nn

from ..data import completion_mask, target_ids
from ..lm_head.statistics import StatisticsRequest
from ..objective import RolloutScores
from ..rollout.seeding import prompt_generator
from ..selection import token_index
from .trainer import Batch, TokenSelectiveTrainer

FORWARD_KL_STREAM = 1  # stream of `prompt_generator`


class ScoredRolloutTrainer(TokenSelectiveTrainer):
    """For methods that ask the teacher once a rollout. Arguments: see `TokenSelectiveTrainer`."""

    def _postprocess_micro_batch(self, model: nn.Module, batch: Batch, step: int, mode: str) -> None:
        """Query the policy that sampled and the teacher, once; keep the teacher's top-k only."""
        index = token_index(completion_mask(batch), sum(batch["lengths"]))
        sampled = target_ids(batch, index).unsqueeze(-1)
        policy: dict[str, Any] = (
            self._score_policy(model, batch, index, sampled) if self.objective.needs_old_per_token_logps else {}
        )
        with self._time_teacher(batch, mode):
            request = StatisticsRequest(entropy=True, top_k=self.objective.teacher_top_k, ids=sampled)
            teacher = self.head_forward.compute_statistics(self.teacher_model, batch, index, request)
        batch["scores"] = vars(
            RolloutScores(
                teacher_entropy=teacher.entropy,
                teacher_per_token_logps=teacher.logps.squeeze(-1),
                teacher_topk_ids=teacher.topk_ids,
                teacher_topk_logps=teacher.topk_logps,
                random_uniform=self._forward_kl_uniform(batch, step),
                **policy,
            )
        )

    def _score_policy(self, model: nn.Module, batch: Batch, index: Tensor, sampled: Tensor) -> dict[str, Tensor]:
        """Log-probabilities under the policy that sampled, and importance weights if they are asked for.

        An engine has told them, unless it samples from a nucleus: no forward pass is needed.
        """
        sampling_per_token_logps = batch.get("sampling_per_token_logps")
        corrects_sampling = getattr(self.args, "vllm_importance_sampling_correction", False)
        if sampling_per_token_logps is not None and not corrects_sampling and self.args.top_p == 1.0:
            return {"old_per_token_logps": sampling_per_token_logps}
        logps = self.head_forward.compute_statistics(
            model, batch, index, StatisticsRequest(ids=sampled)
        ).logps.squeeze(-1)
        if sampling_per_token_logps is None or not corrects_sampling:
            return {"old_per_token_logps": logps}
        weights = (logps - sampling_per_token_logps).exp().clamp(max=self.args.vllm_importance_sampling_clip_max)
        return {"old_per_token_logps": logps, "importance": weights}

    def _forward_kl_uniform(self, batch: Batch, step: int) -> Tensor:
        generators = [prompt_generator(self.args.seed, step, i, FORWARD_KL_STREAM) for i in batch["index"]]
        numbers = [torch.rand(n, generator=g) for g, n in zip(generators, batch["lengths"], strict=True)]
        return torch.cat(numbers).to(batch["input_ids"].device, non_blocking=True)
