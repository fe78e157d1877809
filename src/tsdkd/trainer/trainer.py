"""The training loop shared by all methods.

A step: next window -> counts -> forward pass to hidden states -> statistics -> objective -> loss.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from trl.experimental.gkd import GKDTrainer
from trl.trainer.utils import disable_dropout_in_model

from ..checkpointing.preemption import PreemptionCallback
from ..checkpointing.run_lock import on_main_process
from ..checkpointing.trainer_mixin import CheckpointMixin
from ..config.base import TokenSelectiveConfig, require_config
from ..config.user_code import load_grader
from ..data import (
    RepeatedRows,
    RepeatSampler,
    collate,
    completion_mask,
    find_longest_sequence,
    hash_rows,
    is_prepared,
    prepare_for_pair,
    target_ids,
)
from ..errors import ConfigError, DataError, ResumeError
from ..files import resolve_path
from ..grading import Grader
from ..models.identity import identify_model
from ..models.loading import get_model_id, load_student, resolve_pair
from ..models.teacher import load_teacher, prepare_teacher
from ..objective import CompletionBatch, Objective, ObjectiveOutput
from ..rollout.vllm import require_vllm
from ..selection import token_index
from . import model_card
from .completion_log import CompletionLog
from .forward import HeadForward, TeacherOutput, get_forward_ids, teacher_inputs
from .metrics import MetricAccumulator, term_gradient_norms
from .micro_batches import MicroBatchPlanner
from .nonfinite import NonFiniteGuard
from .progress import closing_progress, replace_progress_callback
from .rollout_buffer import Batch, MicroBatches, RolloutBuffer, Window
from .rollouts import EVAL_STEP, PendingRollout, RolloutMixin
from .step_timer import StepTimer
from .token_records import TokenRecorder


class TokenSelectiveTrainer(RolloutMixin, CheckpointMixin, GKDTrainer):
    """Base trainer for distillation. Each method has a subclass, which may change how completions are generated.

    A drop-in replacement for TRL's `GKDTrainer`. It reuses the initialization of `SFTTrainer` (model, PEFT) and the
    loop of `Trainer`, but none of `GKDTrainer`'s own methods, for these reasons: `__init__` rejects models whose
    vocabularies are padded differently; `training_step` generates completions after the token count of the data set
    has been taken as the divisor of the loss, and samples from the global random generator; `compute_loss` needs the
    full logits and ignores the number of processes.

    Args:
        model: the student: path, hub id or loaded model.
        teacher_model: the teacher: path, hub id or loaded model.
        args: the method's configuration, an instance of `config_class`.
        train_dataset: rows in the format described in `tsdkd.data`.
        eval_dataset: held-out rows. If they have answers, accuracy is logged too.
        processing_class: the student's tokenizer; default: the tokenizer of `model`.
        teacher_processing_class: the teacher's tokenizer; default: the tokenizer of `teacher_model`.
        callbacks, optimizers, peft_config: see `GKDTrainer`.
        grader: `(completion, answer)` -> whether it is correct, for the accuracy; default: `args.grader`.

    Raises:
        TokenizerMismatchError: the tokenizers differ.
        DataError, ModelError, ConfigError: the input is invalid. Nothing has been written.
    """

    config_class: ClassVar[type[TokenSelectiveConfig]]
    objective_class: ClassVar[type[Objective]]
    objective: Objective

    def __init__(
        self,
        model: str | PreTrainedModel,
        teacher_model: str | PreTrainedModel,
        args: TokenSelectiveConfig | None = None,
        *,
        train_dataset: Dataset,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any | None = None,
        grader: Callable[[str, str], bool] | None = None,
    ) -> None:
        model, teacher_model = resolve_path(model), resolve_path(teacher_model)
        args = args or self.config_class(f"{Path(get_model_id(model)).name}-{self.config_class.method}")
        self._check_args(args)
        self.grader = load_grader(args.grader) if grader is None else Grader(grader)
        self._tag_names = ["tsdkd", args.method]
        self.objective = self.make_objective(args)
        self.rollout_buffer = RolloutBuffer(
            args.gradient_accumulation_steps, args.steps_per_rollout(), args.iterations_per_rollout
        )
        self.pair = resolve_pair(model, teacher_model, args, processing_class, teacher_processing_class)
        train_dataset = self._tokenize_dataset(train_dataset, args, "train_dataset")
        if eval_dataset is not None:
            eval_dataset = self._tokenize_dataset(eval_dataset, args, "eval_dataset")
            _require_answers(eval_dataset, args)
        frozen: dict[str, tuple[Any, ...]] = {}
        if peft_config is not None:
            frozen["model_name_or_path"] = (model, self.pair.student_config, args.model_init_kwargs)
        if self._needs_teacher:
            teacher_source = (teacher_model, self.pair.teacher_config, args.teacher_model_init_kwargs)
            frozen["teacher_model_name_or_path"] = teacher_source
        model = load_student(model, args)
        if self._needs_teacher:
            teacher_model = load_teacher(teacher_model, self.pair.teacher_config, args)
        # the files have been downloaded by now
        self._frozen_models = on_main_process(
            lambda: {
                field: [source[0], identify_model(*source)]
                for field, source in frozen.items()
                if isinstance(source[0], str)
            }
        )

        args.dataset_kwargs = {"skip_prepare_dataset": True}
        padding_free, args.padding_free = args.padding_free, None  # TRL's is its collator's
        try:
            super(GKDTrainer, self).__init__(
                model,
                args=args,
                data_collator=collate,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=self.pair.tokenizer,
                callbacks=callbacks,
                optimizers=optimizers,
                peft_config=peft_config,
            )
        finally:
            args.padding_free = padding_free
        self.model_accepts_loss_kwargs = True  # we divide by the global count; `Trainer` must not divide again
        if args.disable_dropout:
            disable_dropout_in_model(self.model)
        self._build_components(teacher_model)

    def _check_args(self, args: TokenSelectiveConfig) -> None:
        require_config(args, self.config_class, type(self).__name__)
        if args.use_vllm:
            require_vllm()
        has_positions = type(self)._position_mask is not TokenSelectiveTrainer._position_mask
        for option, is_set in (
            ("teacher_chat_template_kwargs", args.teacher_chat_template_kwargs is not None),
            ("teacher_placement", args.teacher_placement == "server"),
        ):
            if has_positions and is_set:
                raise ConfigError([f"{option}: {type(self).__name__} chooses positions of its own"])
        hooks = ("_make_sampler", "_select_completions")
        if args.rollout_ahead and any(getattr(type(self), n) is not getattr(RolloutMixin, n) for n in hooks):
            raise ConfigError([f"rollout_ahead: {type(self).__name__} chooses completions of its own"])

    @classmethod
    def make_objective(cls, args: TokenSelectiveConfig) -> Objective:
        """Build the method's objective from its options."""
        names = [f.name for f in fields(cls.objective_class) if f.init]  # type: ignore[arg-type]
        return cls.objective_class(**{name: getattr(args, name) for name in names})

    def _build_components(self, teacher_model: str | PreTrainedModel) -> None:
        """Build the components that need the loaded models."""
        args, accelerator, decode = self.args, self.accelerator, self.pair.tokenizer.decode
        self.stop_token_ids = self._set_stop_token_ids()
        self.teacher_name = get_model_id(teacher_model)
        if self._needs_teacher:
            self.teacher_model = prepare_teacher(teacher_model, accelerator, args)
        self.head_forward = HeadForward(accelerator, args, self.pair.shared_vocab_size)
        self.planner = MicroBatchPlanner(accelerator, args, self.objective, find_longest_sequence(self.train_dataset))
        self.token_recorder = TokenRecorder(self.head_forward, args, decode)
        self.sampler = self._make_sampler()
        self.nonfinite_guard = NonFiniteGuard(accelerator, args, decode)
        self.metric_accumulators = {mode: MetricAccumulator(accelerator) for mode in ("train", "eval")}
        self.preemption = PreemptionCallback(accelerator)
        self.step_timer = StepTimer(self.metric_accumulators["train"])
        self.completion_log = CompletionLog(decode, self.callback_handler)
        for callback in (self.preemption, self.step_timer, self.completion_log):
            self.add_callback(callback)
        replace_progress_callback(self)
        self._is_first_micro_batch = False
        self._rollout_ahead = None
        self._weights_step = 0
        self._weights_version = 0  # number of weight changes other than optimizer steps

    # A step

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[Window, Tensor | None]:
        """Return the next accumulation window with completions, and the number of units in the global batch."""
        step, steps_left = self.state.global_step, self.state.max_steps - self.state.global_step
        if steps_left <= 0:  # resumed after the last step; `Trainer` would take another one
            self.control.should_training_stop = True
            return [], None
        self.step_timer.start()
        roll_out = partial(self._roll_out, self.model_wrapped, step=step, mode="train")
        ahead = partial(self._roll_out_ahead, self.model_wrapped, step=step + 1) if self.args.rollout_ahead else None
        window = self.rollout_buffer.next(epoch_iterator, num_batches, steps_left, roll_out, ahead)
        if not window:
            return [], None
        if ahead is not None:
            self.metric_accumulators["train"].add("policy/weights_behind", step - self._weights_step, 1)
        self._is_first_micro_batch = True
        micro_batches = list(chain.from_iterable(window))
        self.step_timer.count(sum(sum(batch["lengths"]) for batch in micro_batches))
        num_units = torch.tensor(sum(map(self._count_units, micro_batches))).to(device, non_blocking=True)
        return window, self.accelerator.reduce(num_units, reduction="sum")

    def training_step(
        self, model: nn.Module, inputs: MicroBatches, num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """Run the forward and backward passes of the micro-batches in one entry of the window; return the loss."""
        losses = []
        for batch in inputs:
            with self._accumulate_only(model) if batch is not inputs[-1] else nullcontext():
                losses.append(self._train_micro_batch(model, batch, num_items_in_batch))
        return torch.stack(losses).sum() if losses else torch.zeros((), device=self.args.device)

    def _train_micro_batch(self, model: nn.Module, batch: Batch, num_items_in_batch: Tensor | None) -> Tensor:
        metrics, num_positions = self.metric_accumulators["train"], get_forward_ids(batch).numel()
        metrics.add("padding", num_positions - batch["num_tokens"], num_positions)
        with metrics.time_block("student", batch["num_tokens"], excluding="teacher"):
            return super(GKDTrainer, self).training_step(model, batch, num_items_in_batch)

    @contextmanager
    def _accumulate_only(self, model: nn.Module) -> Iterator[None]:
        """Don't synchronize gradients, because another micro-batch follows.

        `Trainer` does the same between the entries of a window. DeepSpeed's engine learns it from `gradient_state`.
        """
        state, is_deepspeed = self.accelerator.gradient_state, self.is_deepspeed_enabled
        was_syncing = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            with nullcontext() if is_deepspeed else self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(was_syncing)

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """Return this process's part of the global mean, times the number of processes.

        The factor compensates for DDP and ZeRO, which average gradients over processes.
        """
        mode = "eval" if num_items_in_batch is None else "train"
        log_term_gradients = mode == "train" and self._should_log_term_gradients()
        completions = self._completion_batch(inputs, mode)
        statistics = self.head_forward.forward(
            model,
            inputs,
            completions.index,
            self.objective.request(completions),
            self.objective.per_token_loss(completions),
            self._teacher_forward(inputs, completions.index, mode),
            loss_in_forward=not log_term_gradients,
        )
        output = self.objective.loss(statistics, completions)
        num_units = self._count_units(inputs)
        self._accumulate_metrics(output, num_units, mode)
        if num_items_in_batch is None:
            return output.loss / max(num_units, 1)
        self.nonfinite_guard.add_micro_batch(inputs, output.loss)
        if log_term_gradients:
            for name, norm in term_gradient_norms(output, num_units, model).items():
                self.metric_accumulators["train"].add(f"grad_norm/{name}", norm, 1)
        return output.loss * (self.accelerator.num_processes / num_items_in_batch.clamp(min=1))

    def _teacher_forward(self, batch: Batch, index: Tensor, mode: str) -> TeacherOutput | None:
        if not self.objective.needs_teacher_distribution:
            return None
        with self._time_teacher(batch, mode):
            return self.head_forward.teacher_forward(self.teacher_model, *teacher_inputs(batch, index))

    def _count_units(self, batch: Batch) -> int:
        """Count the items that the loss is averaged over: completions, tokens or micro-batches."""
        lengths: list[int] = batch["lengths"]
        completions = sum(length > 0 for length in lengths)
        counts = {"completions": completions, "tokens": sum(lengths), "micro-batches": min(completions, 1)}
        return counts[self.objective.unit]

    def _accumulate_metrics(self, output: ObjectiveOutput, num_units: int, mode: str) -> None:
        # transfer all values to the host at once, because each transfer synchronizes
        sums = [value for pair in output.metrics.values() for value in pair]
        sums += [term.detach() for term in (*output.terms.values(), output.loss)]
        numbers = iter(torch.stack([value.double() for value in sums]).tolist())
        accumulator = self.metric_accumulators[mode]
        for name in output.metrics:
            accumulator.add(name, next(numbers), next(numbers))
        for name in output.terms:
            accumulator.add(f"loss/{name}", next(numbers), num_units)
        if mode == "eval":
            accumulator.add("loss", next(numbers), num_units)

    def _should_log_term_gradients(self) -> bool:
        every = self.args.log_term_gradients
        is_first, self._is_first_micro_batch = self._is_first_micro_batch, False
        is_sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled  # no process has the full gradient
        return not is_sharded and is_first and every > 0 and self.state.global_step % every == 0

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Check the gradient right before the optimizer step. DeepSpeed has already skipped a non-finite step."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        is_scaled = self.accelerator.mixed_precision == "fp16"  # the scaler skips steps that overflow
        is_finite = self.nonfinite_guard.is_step_finite(0.0 if is_scaled else grad_norm, self.state.global_step + 1)
        if not is_finite and not is_scaled:
            self.optimizer.zero_grad()
        return grad_norm

    def _time_teacher(self, batch: Batch, mode: str) -> AbstractContextManager[None]:
        return self.metric_accumulators[mode].time_block("teacher", batch.get("teacher", batch)["num_tokens"])

    # Hooks that a method's trainer may override

    def _position_mask(self, batch: Batch) -> Tensor:
        """`[B, S - 1]` bool, the positions whose statistics the objective requests.

        An objective that requests them outside of the sequences sets `micro_batching = "fixed"`. An override rules
        out `teacher_chat_template_kwargs`, with which the teacher's positions differ.
        """
        return completion_mask(batch)

    def _completion_batch(self, batch: Batch, mode: str) -> CompletionBatch:
        """Convert a micro-batch to the input of the objective."""
        mask = self._position_mask(batch)
        index, scores_class = token_index(mask), self.objective.scores_class
        return CompletionBatch(
            mask,
            target_ids(batch, index),
            is_training=mode == "train",
            sampling_per_token_logps=batch.get("sampling_per_token_logps"),
            scores=None if scores_class is None else scores_class(**batch["scores"]),
            index=index,
        )

    def floating_point_ops(self, inputs: MicroBatches) -> int:
        """See `Trainer`. Counts the positions of the forward passes."""
        return sum(int(super(GKDTrainer, self).floating_point_ops(_as_forward_inputs(batch))) for batch in inputs)

    def _track_num_input_tokens(self, inputs: MicroBatches) -> None:
        for batch in inputs:
            super()._track_num_input_tokens(_as_forward_inputs(batch))

    # Data and models

    def get_train_dataloader(self) -> DataLoader[Any]:
        """See `Trainer`. Each prompt is there `num_generations` times in succession."""
        args = self.args
        if args.num_generations == 1:
            return super().get_train_dataloader()
        rows = RepeatedRows(self.train_dataset, args.num_generations)
        seed = args.seed if args.data_seed is None else args.data_seed
        sampler = RepeatSampler(rows, seed, shuffle=args.train_sampling_strategy == "random")
        loader: Any = self._get_dataloader(
            rows, "Training", self._train_batch_size, lambda _: sampler, is_training=True
        )
        loader.set_sampler(sampler)  # with several processes, a resumed run sets its epoch by this reference
        return loader

    def _tokenize_dataset(
        self, rows: Dataset | dict[str, Dataset], args: TokenSelectiveConfig, source: str
    ) -> Dataset | dict[str, Dataset]:
        if isinstance(rows, dict):
            return {name: self._tokenize_dataset(part, args, source) for name, part in rows.items()}
        if is_prepared(rows):
            return rows
        needs_answer = source == "eval_dataset"
        return prepare_for_pair(rows, self.pair, args, args.needs_completions, source, needs_answer)

    def _set_stop_token_ids(self) -> frozenset[int]:
        """Set the stop token ids and chat template on the student, to save them with it; return the ids."""
        if self.pair.template_role == "teacher":
            self.pair.tokenizer.chat_template = self.pair.teacher_tokenizer.chat_template
        ids = self.pair.stop_token_ids(generation_config=self.model.generation_config)
        self.model.generation_config.eos_token_id = sorted(ids) or None
        return ids

    # Evaluation and logging

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate the same loss terms on held-out prompts, and the accuracy if rows have answers."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._tokenize_dataset(eval_dataset, self.args, "eval_dataset")
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """See `Trainer.evaluation_loop`. Adds metrics computed from sums over all processes, divided once."""
        self.completion_log.start_evaluation(metric_key_prefix)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update(
            {f"{metric_key_prefix}_{k}": v for k, v in self.metric_accumulators["eval"].reduce_and_reset().items()}
        )
        return output

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """Generate completions, then compute the loss without gradient."""
        with torch.no_grad(), self.compute_loss_context_manager():
            ((batch,),) = self._roll_out(model, [[inputs]], EVAL_STEP, "eval")
            return self.compute_loss(model, batch), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the method's metrics to a training log line."""
        if "loss" in logs:
            logs.update(self.metric_accumulators["train"].reduce_and_reset())
        super().log(logs, start_time)

    # Checkpoints

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """See `CheckpointMixin.train`."""
        self._weights_version += 1  # the step count restarts at 0 or at a checkpoint's step
        self.rollout_buffer.load_state_dict([])  # what is left after a run that was stopped early
        self._rollout_ahead = None
        with closing_progress(self):
            return super().train(*args, **kwargs)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._weights_version += 1

    def _get_extra_state(self) -> dict[str, Any]:
        return {
            "rows": self._train_dataset_hash,
            "num_generations": self.args.num_generations,
            "frozen_models": self._frozen_models,
            "skipped": self.nonfinite_guard.num_skipped,
            "objective": self.objective.state_dict(),
            "rollout_buffer": self.rollout_buffer.state_dict(),
            "rollout_ahead": None if self._rollout_ahead is None else self._rollout_ahead.state_dict(),
            "weights_step": self._weights_step,
        }

    def _set_extra_state(self, state: dict[str, Any]) -> None:
        if state["rows"] != self._train_dataset_hash:
            raise ResumeError(
                "resume: the rows of train_dataset (dataset_name) or their tokens have changed since the checkpoint"
            )
        if (before := state.get("num_generations", 1)) != self.args.num_generations:
            raise ResumeError(f"resume: num_generations was {before}, now {self.args.num_generations}")
        self._check_frozen_models(state.get("frozen_models", {}))
        self.nonfinite_guard.num_skipped = state["skipped"]
        self.objective.load_state_dict(state["objective"])
        self.rollout_buffer.load_state_dict(state["rollout_buffer"])
        ahead = state.get("rollout_ahead")
        self._rollout_ahead = None if ahead is None else PendingRollout.from_state_dict(ahead)
        self._weights_step = state.get("weights_step", 0)

    def _check_frozen_models(self, before: dict[str, list[str]]) -> None:
        """Check that frozen models, which checkpoints do not contain, are unchanged. Ignores already loaded models."""
        for field in before.keys() & self._frozen_models.keys():
            (old_name, old), (name, new) = before[field], self._frozen_models[field]
            if old != new:
                raise ResumeError(
                    f"resume: {field}: the weights or the config.json of {name} have changed since the checkpoint: "
                    f"expected those of {old_name} ({old}), found {new}"
                )

    @cached_property
    def _train_dataset_hash(self) -> str:
        """Hash of the training rows. Checkpoints depend on the order of the rows."""
        return hash_rows(self.train_dataset)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save student, tokenizer and generation config, and the model card of a final model."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call:
            self.create_model_card()

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write README.md with method, teacher, data and papers to the output directory."""
        if not self.is_world_process_zero():
            return
        model_card.write_model_card(
            Path(self.args.output_dir) / "README.md",
            self.args,
            model_name=model_name or Path(self.args.output_dir).name,
            student=get_model_id(self.model),
            teacher=self.teacher_name,
            dataset=dataset_name or getattr(self, "dataset_name", None) or self.train_dataset.info.dataset_name or "",
            tags=[*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])],
        )


def _require_answers(rows: Dataset | dict[str, Dataset], args: TokenSelectiveConfig) -> None:
    """Raise `DataError` if `eval_samples` can't be graded."""
    for part in rows.values() if isinstance(rows, dict) else [rows]:
        if args.eval_samples > 1 and "answer" not in part.column_names:
            raise DataError("eval_samples: the rows of eval_dataset have no answers to grade the samples by")


def _as_forward_inputs(batch: Batch) -> Batch:
    return {"input_ids": get_forward_ids(batch)}
