"""`TSDKDTrainer`: the teacher answers one micro-batch at a time, over the whole vocabulary."""

from dataclasses import fields

from torch import Tensor, nn

from .config import TSDKDConfig
from .objectives import ObjectiveOutput
from .objectives.tsd_kd import TSDKDObjective
from .statistics import Head
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

    def _objective_output(
        self, model: nn.Module, batch: Batch, mask: Tensor, mode: str, own_in_forward: bool
    ) -> ObjectiveOutput:
        def question(head: Head) -> ObjectiveOutput:
            return self.objective(
                head,
                mask,
                training=mode == "train",
                sampled_ids=batch["input_ids"][:, 1:][mask],
                sampler_logps=batch.get("sampler_logps"),
            )

        with self._teacher_time(batch, mode):
            teacher = self.heads.teacher(self.teacher_model, batch, mask)
        return self.heads.ask(model, batch, mask, question, teacher, own_in_forward)
