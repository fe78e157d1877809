"""`TSDKDTrainer`: the teacher answers with full logits, one micro-batch at a time."""

from dataclasses import fields

from torch import Tensor

from .config import TSDKDConfig
from .objectives import ObjectiveOutput
from .objectives.tsd_kd import TSDKDObjective
from .trainer import Batch, TokenSelectiveTrainer


class TSDKDTrainer(TokenSelectiveTrainer):
    """Token-selective dual knowledge distillation (ICLR 2026). Arguments: see `TokenSelectiveTrainer`.

    Example:
        >>> trainer = TSDKDTrainer(
        ...     model="Qwen/Qwen2.5-1.5B-Instruct",
        ...     teacher_model="Qwen/Qwen2.5-14B-Instruct",
        ...     args=TSDKDConfig(output_dir="student"),
        ...     train_dataset=load_dataset("json", data_files="prompts.jsonl", split="train"),
        ... )
        >>> trainer.train()
    """

    config_class = TSDKDConfig
    unit = TSDKDObjective.unit
    _name = "TSD-KD"
    _tag_names = ["tsdkd", "tsd-kd"]

    def _make_objective(self) -> TSDKDObjective:
        names = [f.name for f in fields(TSDKDObjective) if f.name != "window"]
        return TSDKDObjective(**{name: getattr(self.args, name) for name in names})

    def _micro_batch_objective(self, student_logits: Tensor, batch: Batch, mask: Tensor, mode: str) -> ObjectiveOutput:
        teacher_logits = self._teacher_logits(batch, mask, mode)
        return self.objective(student_logits, teacher_logits, mask, training=mode == "train")
