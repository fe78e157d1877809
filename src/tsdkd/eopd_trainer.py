"""`EOPDTrainer`: one rollout, one query of the teacher, several optimizer steps (Algorithm 1)."""

from dataclasses import fields

import torch
from torch import Tensor, nn

from .config import EOPDConfig
from .data import completion_mask
from .objectives import ObjectiveOutput
from .objectives.eopd import EOPDObjective, TeacherAnswers
from .rollout import prompt_generator
from .statistics import Head, Request
from .trainer import Batch, TokenSelectiveTrainer

_PLACEMENT = 1  # stream of `prompt_generator`


class EOPDTrainer(TokenSelectiveTrainer):
    """Entropy-aware on-policy distillation (arXiv 2603.07079). Arguments: see `TokenSelectiveTrainer`.

    Example:
        >>> trainer = EOPDTrainer(
        ...     model="Qwen/Qwen3-0.6B-Base",
        ...     teacher_model="Qwen/Qwen3-8B",
        ...     args=EOPDConfig(output_dir="student", chat_template_source="teacher"),
        ...     train_dataset=load_dataset("json", data_files="prompts.jsonl", split="train"),
        ... )
        >>> trainer.train()
    """

    config_class = EOPDConfig
    unit = EOPDObjective.unit
    _name = "EOPD"
    _tag_names = ["tsdkd", "eopd"]

    def _make_objective(self) -> EOPDObjective:
        return EOPDObjective(**{f.name: getattr(self.args, f.name) for f in fields(EOPDObjective)})

    def _annotate(self, model: nn.Module, batch: Batch, step: int, mode: str) -> None:
        """Query the policy that sampled and the teacher, once; keep the teacher's top-k only."""
        mask = completion_mask(batch)
        sampled = batch["input_ids"][:, 1:][mask].unsqueeze(-1)
        old_logps, importance = self._old_logps(model, batch, mask, sampled)
        with self._teacher_time(batch, mode):
            wanted = Request(entropy=True, top_k=self.args.forward_kl_top_k, ids=sampled)
            teacher = self.heads.query(self.teacher_model, batch, mask, wanted)
        batch["answers"] = vars(
            TeacherAnswers(
                old_logps=old_logps,
                teacher_logps=teacher.logps.squeeze(-1),
                teacher_entropy=teacher.entropy,
                topk_ids=teacher.top_ids,
                topk_logps=teacher.top_logps,
                random_uniform=self._placement_numbers(batch, step),
                importance=importance,
            )
        )

    def _old_logps(
        self, model: nn.Module, batch: Batch, mask: Tensor, sampled: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities under the policy that sampled, and importance weights if they are asked for.

        An engine has told them, unless it samples from a nucleus: no forward pass is needed.
        """
        sampler_logps = batch.get("sampler_logps")
        corrected = self.args.vllm_importance_sampling_correction
        if sampler_logps is not None and not corrected and self.args.top_p == 1.0:
            return sampler_logps, None
        logps = self.heads.query(model, batch, mask, Request(ids=sampled)).logps.squeeze(-1)
        if sampler_logps is None or not corrected:
            return logps, None
        return logps, (logps - sampler_logps).exp().clamp(max=self.args.vllm_importance_sampling_clip_max)

    def _placement_numbers(self, batch: Batch, step: int) -> Tensor:
        generators = [prompt_generator(self.args.seed, step, int(i), _PLACEMENT) for i in batch["index"]]
        lengths = batch["completion_lengths"].tolist()
        numbers = [torch.rand(n, generator=g) for g, n in zip(generators, lengths, strict=True)]
        return torch.cat(numbers).to(batch["input_ids"].device)

    def _objective_output(
        self, model: nn.Module, batch: Batch, mask: Tensor, mode: str, own_in_forward: bool
    ) -> ObjectiveOutput:
        def question(head: Head) -> ObjectiveOutput:
            sampled, answers = batch["input_ids"][:, 1:][mask], TeacherAnswers(**batch["answers"])
            return self.objective(head, sampled, answers, batch.get("sampler_logps"))

        return self.heads.ask(model, batch, mask, question, own_in_forward=own_in_forward)
