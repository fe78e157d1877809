"""`MiniLLMTrainer`: completions from a mixture of teacher and student, advantages whitened over a rollout."""

import torch
from torch import nn

from ..data import completion_mask
from ..methods import MiniLLMConfig
from ..objectives.minillm import MiniLLMObjective
from ..rollout import Sampler, Sampling
from ..rollout.together import TogetherSampler, mixed
from ..trainer import Batch
from .policy import PolicyTrainer


class MiniLLMTrainer(PolicyTrainer):
    """MiniLLM (arXiv 2306.08543). Arguments: see `TokenSelectiveTrainer`."""

    config_class = MiniLLMConfig
    objective: MiniLLMObjective

    def _make_sampler(self) -> Sampler:
        sampling = Sampling(frozenset(self.stop_ids), self.pair.shared_vocab_size)
        choose = mixed(self.args.teacher_mixture, self.args.temperature)
        return TogetherSampler(self.accelerator, self.args, sampling, self.teacher_model, choose)

    def _annotate(self, model: nn.Module, batch: Batch, step: int, mode: str) -> None:
        """Also the mixture's log-probabilities, in place of the student's, and the returns."""
        super()._annotate(model, batch, step, mode)
        answers = batch["answers"]
        logps = (answers["old_logps"], answers["teacher_logps"])
        answers["advantages"] = self.objective.returns(*logps, completion_mask(batch))
        answers["old_logps"] = self.objective.mixture_logps(*logps)

    def _roll_out(self, model: nn.Module, rows: list[Batch], step: int, mode: str) -> list[Batch]:
        batches = super()._roll_out(model, rows, step, mode)
        self._whiten(batches)
        return batches

    def _whiten(self, batches: list[Batch]) -> None:
        """Mean 0 and variance 1 over the tokens of all processes' rollouts: any split gives the same advantages."""
        values = [batch["answers"]["advantages"].double() for batch in batches]
        own = torch.cat([*values, torch.zeros(0, dtype=torch.float64, device=self.accelerator.device)])
        sums = torch.stack([own.new_tensor(len(own)), own.sum(), own.square().sum()])
        count, total, squares = self.accelerator.reduce(sums, reduction="sum")
        mean = total / count.clamp(min=1)
        scale = (squares / count.clamp(min=1) - mean.square()).clamp(min=0).add(1e-8).rsqrt()
        for batch, value in zip(batches, values, strict=True):
            batch["answers"]["advantages"] = ((value - mean) * scale).float()
