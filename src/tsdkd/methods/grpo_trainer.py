"""TRL's `GRPOTrainer` with tsdkd's configuration and checkpoints, and a reward for correct answers."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import trl
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import TrainOutput

from ..checkpointing.preemption import PreemptionCallback
from ..checkpointing.trainer_mixin import CheckpointMixin
from ..config.inherited import UNSUPPORTED_OPTIONS
from ..config.user_code import load_grader
from ..data import append_prompt_suffix, missing_column, prepare_dataset, resolve_columns, split_prompt_completion
from ..errors import ConfigError, DataError, install_hint
from ..grading import Grader, extract_answer, is_math_equivalent
from ..models.loading import load_student, resolve_pair
from ..trainer.progress import closing_progress, replace_progress_callback


def make_accuracy_reward(grader: Grader) -> Callable[..., list[float]]:
    """Make a reward function for TRL: 1 for a correct completion, else 0."""

    def accuracy_reward(
        completions: list[Any], answer: list[str], index: Sequence[int | None] | None = None, **columns: Any
    ) -> list[float]:
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        rows = index or [None] * len(texts)
        return [float(grader(*graded)) for graded in zip(texts, map(str, answer), rows, strict=True)]

    return accuracy_reward


class GRPOTrainer(CheckpointMixin, trl.GRPOTrainer):
    """Group relative policy optimization (arXiv 2402.03300).

    Args:
        model: the student: path, hub id or loaded model.
        args: a `tsdkd.methods.GRPOConfig`.
        train_dataset: rows with a prompt and either an answer or a `solution`. The solution contains a boxed answer or
            is a bare answer.
        eval_dataset, processing_class, callbacks, optimizers, peft_config: see TRL's `GRPOTrainer`.
        grader: `(completion, answer)` -> whether it is correct, for the reward; default: `args.grader`, or else
            math-verify.

    Raises:
        ConfigError, DataError, ModelError: the input is invalid. Nothing has been written.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: Any,
        *,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any | None = None,
        grader: Callable[[str, str], bool] | None = None,
    ) -> None:
        if grader is None and args.grader is None:
            _require_math_verify()
        graded_by = load_grader(args.grader, is_math_equivalent) if grader is None else Grader(grader)
        pair = resolve_pair(model, model, args, processing_class, processing_class)
        rows = [
            None if d is None else _prepare_prompts(d, pair.template_tokenizer, args, pair.context_length, source)
            for source, d in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset))
        ]
        super().__init__(
            load_student(model, args),
            reward_funcs=make_accuracy_reward(graded_by),
            args=_to_trl_config(args),
            train_dataset=rows[0],
            eval_dataset=rows[1],
            processing_class=pair.tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )
        self.preemption = PreemptionCallback(self.accelerator)
        self.add_callback(self.preemption)
        replace_progress_callback(self)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """See `CheckpointMixin.train`."""
        with closing_progress(self):
            return super().train(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """See `Trainer`. Also writes TRL's model card for a final model."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call:
            self.create_model_card()

    def _get_extra_state(self) -> dict[str, Any]:
        return {"step": self._step, "buffered": self._buffered_inputs}

    def _set_extra_state(self, state: dict[str, Any]) -> None:
        self._step = state["step"]
        buffered = state["buffered"]
        self._buffered_inputs = None if buffered is None else [self._prepare_input(batch) for batch in buffered]


def _require_math_verify() -> None:
    try:
        import math_verify  # noqa: F401
    except ImportError as error:
        raise ConfigError([f"method: grpo requires math-verify; {install_hint('eval')}"]) from error


def _to_trl_config(args: Any) -> trl.GRPOConfig:
    """Build TRL's configuration from the fields that both have."""
    names = {f.name for f in fields(trl.GRPOConfig) if f.init and hasattr(args, f.name)}
    not_trls = {*UNSUPPORTED_OPTIONS, "beta", "generation_batch_size"}  # they belong to GKD or SFT
    common = {name: getattr(args, name) for name in names - not_trls}
    try:
        return trl.GRPOConfig(**common, generation_batch_size=args.rollout_batch_size * args.num_generations)
    except ValueError as error:
        raise ConfigError([f"rollout_batch_size, num_generations: {' '.join(str(error).split())}"]) from error


def _prepare_prompts(
    rows: Dataset, template: PreTrainedTokenizerBase, args: Any, context: int, source: str
) -> Dataset:
    """Prompts and answers in TRL's format. Prompts that leave no room for a completion are dropped."""
    columns = resolve_columns(rows, args, source, needs_answer=True)
    answer_column = columns.answer or ("solution" if "solution" in rows.column_names else None)
    if answer_column is None:
        raise missing_column("answer_column", source, ("answer", "solution"), rows.column_names)
    if columns.answer is None:
        _require_math_verify()
    kept = prepare_dataset(rows, template, args, context, False, source, needs_answer=True)["index"]

    def prompt_and_answer(row: dict[str, Any], index: int) -> dict[str, Any]:
        prompt = append_prompt_suffix(split_prompt_completion(row, index, columns)[0], index, args.prompt_suffix)
        if isinstance(prompt, str) and args.chat_template_source != "none" and template.chat_template is not None:
            prompt = [{"role": "user", "content": prompt}]
        given = row[answer_column]
        if given is None:
            raise DataError(f"row {index}: no answer: the {answer_column} is empty")
        answer = given if columns.answer else extract_answer(str(given))
        if answer is None:
            raise DataError(
                f"row {index}: no answer: the solution has no \\boxed{{}} and is not a bare answer: {given[-60:]!r}"
            )
        return {"prompt": prompt, "answer": str(answer), "index": index}

    chosen = rows.select(kept)
    return chosen.map(
        lambda row, position: prompt_and_answer(row, kept[position]),
        with_indices=True,
        remove_columns=rows.column_names,
        desc="Prompts",
    )
