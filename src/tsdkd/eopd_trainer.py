"""`EOPDTrainer`: one rollout, one query of the teacher, several optimizer steps (Algorithm 1)."""

from dataclasses import fields

import torch
from torch import Tensor, nn

from .config import EOPDConfig
from .data import completion_mask
from .losses import token_entropy
from .objectives import ObjectiveOutput
from .objectives.eopd import EOPDObjective, TeacherAnswers
from .rollout import prompt_generator
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

    @torch.no_grad()
    def _annotate(self, model: nn.Module, batch: Batch, step: int, mode: str) -> None:
        """Query the policy that sampled and the teacher, once; keep the teacher's top-k only."""
        mask = completion_mask(batch)
        sampled = batch["input_ids"][:, 1:][mask].unsqueeze(-1)
        was_training = model.training
        model.eval()
        with self.compute_loss_context_manager():
            old_logps = self._logits(model, batch, mask).float().log_softmax(-1).gather(-1, sampled).squeeze(-1)
            teacher_logits = self._teacher_logits(batch, mask, mode)
        model.train(was_training)
        teacher_logps = teacher_logits.float().log_softmax(-1)
        topk_logps, topk_ids = teacher_logps.topk(min(self.args.forward_kl_top_k, self.pair.shared_vocab_size), dim=-1)
        batch["answers"] = vars(
            TeacherAnswers(
                old_logps=old_logps,
                teacher_logps=teacher_logps.gather(-1, sampled).squeeze(-1),
                teacher_entropy=token_entropy(teacher_logits),
                topk_ids=topk_ids,
                topk_logps=topk_logps,
                random_uniform=self._placement_numbers(batch, step),
            )
        )

    def _placement_numbers(self, batch: Batch, step: int) -> Tensor:
        generators = [prompt_generator(self.args.seed, step, int(i), _PLACEMENT) for i in batch["index"]]
        lengths = batch["completion_lengths"].tolist()
        numbers = [torch.rand(n, generator=g) for g, n in zip(generators, lengths, strict=True)]
        return torch.cat(numbers).to(batch["input_ids"].device)

    def _micro_batch_objective(self, student_logits: Tensor, batch: Batch, mask: Tensor, mode: str) -> ObjectiveOutput:
        sampled = batch["input_ids"][:, 1:][mask]
        return self.objective(student_logits, sampled, TeacherAnswers(**batch["answers"]))
