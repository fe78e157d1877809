"""The training loop both methods share: roll out an accumulation window, count its tokens, query the teacher, step.

It subclasses TRL's `GKDTrainer` and replaces what can't be right there: `GKDTrainer` counts tokens before the rollout
exists, refuses pairs with differently padded vocabularies, and samples from the ambient RNG.
"""

import hashlib
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import fields
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from trl.experimental.gkd import GKDTrainer
from trl.trainer.utils import disable_dropout_in_model, print_prompt_completions_sample

from ..checkpointing.preemption import PreemptionCallback
from ..checkpointing.trainer_mixin import CheckpointMixin
from ..config.base import TokenSelectiveConfig
from ..config.options import enum_value
from ..data import collate, completion_mask, max_sequence_length, pad_sequences, prepare_dataset, target_ids
from ..errors import ConfigError, ResumeError
from ..grading import is_exact_match
from ..models.loading import collect_stop_token_ids, get_model_id, load_generation_config, load_student, resolve_pair
from ..models.teacher import load_teacher, prepare_teacher
from ..objective import CompletionBatch, Objective, ObjectiveOutput, RolloutScores
from ..rollout.base import Completion, Sampler, SamplingConfig
from ..rollout.hf import HuggingFaceSampler
from ..rollout.seeding import prompt_generator
from ..rollout.vllm import require_vllm
from ..selection import token_index
from . import model_card
from .forward import HeadForward
from .metrics import MetricAccumulator
from .nonfinite import NonFiniteGuard
from .token_records import RecordedCompletion, TokenRecorder
from .weight_check import check_engine_weights

Batch = dict[str, Any]
_EVAL_STEP = 2**62  # evaluation rollouts: the same random numbers at every evaluation
ON_POLICY_STREAM = 2  # stream of `prompt_generator`


class TokenSelectiveTrainer(CheckpointMixin, GKDTrainer):
    """Distils by the method that `args` configures; subclasses ask a rollout, or roll out, in their own way.

    Args:
        model: the student: path, hub id or loaded model.
        teacher_model: path, hub id or loaded model.
        args: the method's configuration, one of `tsdkd.methods`.
        train_dataset: rows as `tsdkd.data` describes them.
        eval_dataset: held-out rows; with an `answer` column accuracy is logged too.
        processing_class: the student's tokenizer; by default the one beside `model`.
        teacher_processing_class: the teacher's; by default the one beside `teacher_model`.
        callbacks, optimizers, peft_config: as in `GKDTrainer`.

    Raises:
        TokenizerMismatchError: the tokenizers differ.
        DataError, ModelError, ConfigError: the input can't be used; nothing has been written.
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
    ) -> None:
        args = args or self.config_class(f"{Path(get_model_id(model)).name}-{self.config_class.method}")
        if args.method != self.config_class.method:
            raise ConfigError(
                [f"args: {type(self).__name__} takes a {self.config_class.__name__}, found a {type(args).__name__}"]
            )
        self._tag_names = ["tsdkd", args.method]
        kind: Any = self.objective_class
        self.objective = kind(**{f.name: getattr(args, f.name) for f in fields(kind) if f.init})
        if args.use_vllm:
            require_vllm()
        self.steps_per_rollout = args.steps_per_rollout()
        self.pair = resolve_pair(model, teacher_model, args, processing_class, teacher_processing_class)
        train_dataset = self._tokenize_dataset(train_dataset, args)
        if eval_dataset is not None:
            eval_dataset = self._tokenize_dataset(eval_dataset, args)
        if isinstance(model, str):
            model = load_student(model, args)
        needs_teacher = self.objective.needs_teacher_distribution or self.objective.needs_rollout_scores
        if isinstance(teacher_model, str) and needs_teacher:
            teacher_model = load_teacher(teacher_model, self.pair.teacher_config, args)

        # `GKDTrainer.__init__` would refuse differently padded vocabularies: its parent's is called, and what it does
        # besides is done here
        args.dataset_kwargs = {"skip_prepare_dataset": True}
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
        self.model_accepts_loss_kwargs = True  # the loss is divided by the global count, never by accumulation too
        if args.disable_dropout:
            disable_dropout_in_model(self.model)
        self.stop_token_ids = self._set_stop_token_ids(teacher_model)
        self.teacher_name = get_model_id(teacher_model)
        if needs_teacher:
            self.teacher_model = prepare_teacher(teacher_model, self.accelerator, args)

        self.head_forward = HeadForward(self.accelerator, args, self.pair.shared_vocab_size)
        self.token_recorder = TokenRecorder(self.head_forward, args, self.pair.tokenizer.decode)
        self.sampler = self._make_sampler()
        self.nonfinite_guard = NonFiniteGuard(
            self.accelerator, Path(args.output_dir), args.max_nonfinite_steps, self.pair.tokenizer.decode
        )
        self.preemption = PreemptionCallback(self.accelerator)
        self.add_callback(self.preemption)
        self.metric_accumulators = {mode: MetricAccumulator(self.accelerator) for mode in ("train", "eval")}
        self._rollout_buffer: deque[list[Batch]] = deque()  # rolled out, not yet trained on
        self._batches_to_skip = 0  # batches that the data loader will yield again after a resume
        self._is_first_micro_batch = False
        self._load_count = 0  # how often the weights changed otherwise than by a step
        self._completion_samples: list[tuple[str, str, int, str]] = []  # prompt, completion, tokens, how it ended

    # What a trainer of a method may decide

    def _postprocess_micro_batch(self, model: nn.Module, batch: Batch, step: int, mode: str) -> None:
        """Add to a rolled-out micro-batch what must be known before the student changes."""

    def _position_mask(self, batch: Batch) -> Tensor:
        """`[B, S - 1]` bool, the positions that the objective is asked about."""
        return completion_mask(batch)

    def _completion_batch(self, batch: Batch, mask: Tensor, mode: str) -> CompletionBatch:
        """A micro-batch as the objective sees it."""
        scores, index = batch.get("scores"), token_index(mask)
        return CompletionBatch(
            mask,
            ids=target_ids(batch, index),
            is_training=mode == "train",
            sampling_per_token_logps=batch.get("sampling_per_token_logps"),
            scores=None if scores is None else RolloutScores(**scores),
            index=index,
        )

    def _select_completions(
        self, model: nn.Module, rows: list[Batch], step: int, mode: str
    ) -> tuple[list[list[int]], list[Completion]]:
        """Prompts and completions to train on: the student's, or the data set's, by a coin a rollout."""
        on_policy = bool(
            torch.rand(1, generator=prompt_generator(self.args.seed, step, 0, ON_POLICY_STREAM)) < self.args.lmbda
        )
        prompts = [ids for batch in rows for ids in batch["prompt_ids"]]
        if on_policy:
            return prompts, self._generate(model, rows, prompts, step, mode)
        return prompts, [Completion(ids, True) for batch in rows for ids in batch["completion_ids"]]

    # Construction

    def _tokenize_dataset(
        self, rows: Dataset | dict[str, Dataset], args: TokenSelectiveConfig
    ) -> Dataset | dict[str, Dataset]:
        if isinstance(rows, dict):
            return {name: self._tokenize_dataset(part, args) for name, part in rows.items()}
        if "prompt_ids" in rows.column_names:
            return rows
        return prepare_dataset(
            rows, self.pair.template_tokenizer, args, self.pair.context_length, args.needs_completions
        )

    def _set_stop_token_ids(self, teacher: str | PreTrainedModel) -> set[int]:
        """Where a completion ends. The saved student gets them, and the template it was trained with, too."""
        sources = [self.model.generation_config, self.pair.tokenizer]
        if self.args.chat_template_source == "teacher":
            if isinstance(teacher, str):  # not loaded, as its method doesn't ask it
                own = load_generation_config(teacher, self.pair.teacher_config, None)
            else:
                own = teacher.generation_config
            sources += [own, self.pair.teacher_tokenizer]
            self.pair.tokenizer.chat_template = self.pair.teacher_tokenizer.chat_template
        ids = {i for i in collect_stop_token_ids(*sources) if i < self.pair.shared_vocab_size}
        self.model.generation_config.eos_token_id = sorted(ids) or None
        return ids

    def _make_sampler(self) -> Sampler:
        args = self.args
        sampling = SamplingConfig(
            frozenset(self.stop_token_ids), self.pair.shared_vocab_size, args.temperature, args.top_p
        )
        if not args.use_vllm:
            return HuggingFaceSampler(self.accelerator, sampling, args.gradient_checkpointing_kwargs)
        from ..rollout.vllm.sampler import VLLMSampler  # vLLM is an extra

        longest = max_sequence_length(args, self.pair.context_length)
        if args.vllm_mode == "colocate":
            self.accelerator.print("starting vLLM's engine, which takes a minute or two", flush=True)
        return VLLMSampler(self.model, self.accelerator, args, sampling, self.pair.tokenizer, longest)

    # Rollouts

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | None]:
        """The next accumulation window, rolled out, and the number of completions or tokens in the global batch."""
        if self.state.global_step >= self.state.max_steps:  # resumed at its end; `Trainer` would take a step more
            self.control.should_training_stop = True
            return [], None
        deque(islice(epoch_iterator, self._batches_to_skip), maxlen=0)
        self._batches_to_skip = 0
        if not self._rollout_buffer:
            steps = max(1, min(self.steps_per_rollout, self.state.max_steps - self.state.global_step))
            size = self.args.gradient_accumulation_steps
            rows = list(islice(epoch_iterator, num_batches if steps == 1 else size * steps))
            sizes = [len(rows[i : i + size]) for i in range(0, len(rows), size)]  # the last of an epoch may be smaller
            # whole windows are rolled out; the rows that are left out belong to the steps of a rollout's other epochs
            epochs = getattr(self.args, "epochs_per_rollout", 1)
            some = rows[: size * -(-len(sizes) // epochs)]
            batches = self._roll_out(self.model_wrapped, some, self.state.global_step, "train")
            windows = [batches[i : i + size] for i in range(0, len(batches), size)] * epochs
            self._rollout_buffer.extend(window[:n] for window, n in zip(windows, sizes, strict=False))
            for batch in batches[size:]:
                batch.pop("sampling_per_token_logps", None)  # the student will have moved on from them
        if not self._rollout_buffer:
            return [], None
        window = self._rollout_buffer.popleft()
        self._is_first_micro_batch = True
        count = torch.tensor(sum(self._count_units(batch) for batch in window)).to(device, non_blocking=True)
        return window, self.accelerator.reduce(count, reduction="sum")

    def _roll_out(self, model: nn.Module, rows: list[Batch], step: int, mode: str) -> list[Batch]:
        """Collated rows -> padded micro-batches with the student's or the data set's completions."""
        if not rows:
            return []
        prompts, completions = self._select_completions(model, rows, step, mode)
        self.metric_accumulators[mode].add(
            "completions/mean_length", sum(len(c.ids) for c in completions), len(completions)
        )
        if self.token_recorder.is_due(step, mode):
            indices = [i for batch in rows for i in batch["index"]]
            samples = [RecordedCompletion(i, p, c.ids) for i, p, c in zip(indices, prompts, completions, strict=True)]
            self.token_recorder.record(model, self.teacher_model, samples, step)

        batches, position = [], 0
        for batch in rows:
            here = slice(position, position + len(batch["prompt_ids"]))
            position = here.stop
            micro = self._prepare_inputs(pad_sequences(prompts[here], [c.ids for c in completions[here]]))
            # on the host, which would otherwise have to wait for the device to learn them
            micro |= {"index": batch["index"], "lengths": [len(c.ids) for c in completions[here]]}
            micro["num_tokens"] = sum(micro["lengths"]) + sum(len(prompt) for prompt in prompts[here])
            logps = [c.logps for c in completions[here] if c.logps is not None]
            if len(logps) == len(completions[here]):
                micro["sampling_per_token_logps"] = torch.tensor(list(chain(*logps)), device=micro["input_ids"].device)
            self._postprocess_micro_batch(model, micro, step, mode)
            batches.append(micro)
        return batches

    def _generate(
        self, model: nn.Module, rows: list[Batch], prompts: list[list[int]], step: int, mode: str
    ) -> list[Completion]:
        indices = [i for batch in rows for i in batch["index"]]
        limits = [limit for batch in rows for limit in batch["limit"]]
        metric_accumulators = self.metric_accumulators[mode]
        start = time.perf_counter()
        if self.sampler.update((self.state.global_step, self._load_count)):
            metric_accumulators.add("speed/weight_sync_seconds", time.perf_counter() - start, 1)
        start = time.perf_counter()
        completions = self.sampler.generate(model, prompts, limits, [(self.args.seed, step, i) for i in indices])
        metric_accumulators.add(
            "speed/rollout_tokens_per_second", sum(len(c.ids) for c in completions), time.perf_counter() - start
        )
        if self.sampler.needs_weight_check:
            check_engine_weights(self.head_forward, self.accelerator, model, prompts, completions, self.args.top_p)
            self.sampler.needs_weight_check = False
        metric_accumulators.add("completions/eos_share", sum(c.stopped for c in completions), len(completions))
        self._log_completions(prompts, completions, [a for b in rows for a in b.get("answer", [])], mode)
        return completions

    def _log_completions(
        self, prompts: list[list[int]], completions: list[Completion], answers: list[str], mode: str
    ) -> None:
        """Accuracy (evaluation only: decoding costs) and the table of completions."""
        to_decode = completions if mode == "eval" and answers else completions[:5] if self.args.log_completions else []
        decode = self.pair.tokenizer.decode
        texts = [decode(c.ids, skip_special_tokens=True) for c in to_decode]
        if mode == "eval" and answers:
            right = sum(is_exact_match(text, str(answer)) for text, answer in zip(texts, answers, strict=True))
            self.metric_accumulators[mode].add("accuracy", right, len(answers))
        if self.args.log_completions:
            shown = list(zip(prompts, to_decode, texts, strict=False))[:5]
            self._completion_samples = [
                (decode(p), text, len(c.ids), "stop token" if c.stopped else "limit") for p, c, text in shown
            ]

    # Loss

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | None = None) -> Tensor:
        """One micro-batch, forward and backward. `GKDTrainer`'s own would roll out again."""
        with self.metric_accumulators["train"].track_throughput(
            "speed/student_tokens_per_second", inputs["num_tokens"], excluding="speed/teacher_tokens_per_second"
        ):
            return super(GKDTrainer, self).training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """This process's share of the global mean, times the number of processes (DDP and ZeRO average gradients)."""
        mode = "eval" if num_items_in_batch is None else "train"
        completions = self._completion_batch(inputs, self._position_mask(inputs), mode)
        log_terms = mode == "train" and self._should_log_term_gradients()
        output = self._compute_objective(model, inputs, completions, mode, loss_in_forward=not log_terms)
        units = self._count_units(inputs)
        # one transfer to the host for all of them: each would wait for the device
        sums = [value for pair in output.metrics.values() for value in pair]
        sums += [term.detach() for term in (*output.terms.values(), output.loss)]
        numbers = iter(torch.stack([value.double() for value in sums]).tolist())
        for name in output.metrics:
            self.metric_accumulators[mode].add(name, next(numbers), next(numbers))
        for name in output.terms:
            self.metric_accumulators[mode].add(f"loss/{name}", next(numbers), units)
        if num_items_in_batch is None:
            self.metric_accumulators[mode].add("loss", next(numbers), units)
            return output.loss / max(units, 1)
        self.nonfinite_guard.add_micro_batch(inputs, output.loss)
        if log_terms:
            self._log_term_gradients(model, output, units)
        return output.loss * (self.accelerator.num_processes / num_items_in_batch.clamp(min=1))

    def _compute_objective(
        self, model: nn.Module, batch: Batch, completions: CompletionBatch, mode: str, loss_in_forward: bool
    ) -> ObjectiveOutput:
        teacher, index = None, completions.index
        assert index is not None
        if self.objective.needs_teacher_distribution:
            with self._time_teacher(batch, mode):
                teacher = self.head_forward.teacher_forward(self.teacher_model, batch, index)
        return self.head_forward.forward(
            model, batch, index, lambda head: self.objective(head, completions), teacher, loss_in_forward
        )

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Trainer's last call before the optimizer's step. DeepSpeed has then left out a step that isn't finite."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        scaled = self.accelerator.mixed_precision == "fp16"  # overflows belong to it, its scaler leaves them out
        if (
            not self.nonfinite_guard.is_step_finite(0.0 if scaled else grad_norm, self.state.global_step + 1)
            and not scaled
        ):
            self.optimizer.zero_grad()
        return grad_norm

    def _count_units(self, batch: Batch) -> int:
        lengths: list[int] = batch["lengths"]
        completions = sum(length > 0 for length in lengths)
        counts = {"completions": completions, "tokens": sum(lengths), "micro-batches": min(completions, 1)}
        return counts[self.objective.unit]

    def _time_teacher(self, batch: Batch, mode: str) -> AbstractContextManager[None]:
        return self.metric_accumulators[mode].track_throughput("speed/teacher_tokens_per_second", batch["num_tokens"])

    def _should_log_term_gradients(self) -> bool:
        every = self.args.log_term_gradients
        first, self._is_first_micro_batch = self._is_first_micro_batch, False
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled  # no whole gradient to look at
        return not sharded and first and every > 0 and self.state.global_step % every == 0

    def _log_term_gradients(self, model: nn.Module, output: ObjectiveOutput, units: int) -> None:
        """Gradient norm of each weighted term, as if this micro-batch were the batch."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        for name, term in output.terms.items():
            weighted = output.weights[name] * term / max(units, 1)
            gradients = torch.autograd.grad(weighted, parameters, retain_graph=True, allow_unused=True)
            norms = [g.float().norm() for g in gradients if g is not None]
            del gradients  # as large as the student: the next term's must not come beside them
            self.metric_accumulators["train"].add(
                f"grad_norm/{name}", float(torch.stack(norms).norm()) if norms else 0.0, 1
            )

    # Evaluation and logging

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The same terms on held-out prompts, and accuracy where rows carry an `answer`."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._tokenize_dataset(eval_dataset, self.args)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Trainer's loop; its metrics become sums over all processes, divided once."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update(
            {f"{metric_key_prefix}_{k}": v for k, v in self.metric_accumulators["eval"].reduce_and_reset().items()}
        )
        return output

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """Roll out, then the loss without a gradient."""
        with torch.no_grad(), self.compute_loss_context_manager():
            (batch,) = self._roll_out(model, [inputs], _EVAL_STEP, "eval")
            return self.compute_loss(model, batch), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the method's metrics to a training log line."""
        if "loss" in logs:
            logs.update(self.metric_accumulators["train"].reduce_and_reset())
            if self._completion_samples and self.accelerator.is_main_process:
                prompts, completions, lengths, endings = map(list, zip(*self._completion_samples, strict=True))
                columns = {"Tokens": lengths, "Ended": endings}
                print_prompt_completions_sample(prompts, completions, {}, None, self.state.global_step, extra=columns)
        super().log(logs, start_time)

    # Checkpoints

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """See `Resumable.train`."""
        self._load_count += 1  # steps are counted from 0 again, or from a checkpoint's
        return super().train(*args, **kwargs)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_count += 1

    def _get_extra_state(self) -> dict[str, Any]:
        state = {"objective": self.objective.state_dict(), "windows": list(self._rollout_buffer)}
        return {"rows": self._train_dataset_hash, "skipped": self.nonfinite_guard.num_skipped, **state}

    def _set_extra_state(self, state: dict[str, Any]) -> None:
        if state["rows"] != self._train_dataset_hash:
            raise ResumeError(
                "resume: train_dataset (dataset_name) has other rows, or other tokens of them, than at the checkpoint"
            )
        self.nonfinite_guard.num_skipped = state["skipped"]
        self.objective.load_state_dict(state["objective"])
        self._rollout_buffer = deque(state["windows"])
        self._batches_to_skip = sum(len(window) for window in self._rollout_buffer)

    @cached_property
    def _train_dataset_hash(self) -> str:
        """Of the training rows as they are trained on: their places in the data set are part of a checkpoint."""
        digest = hashlib.sha256()
        for rows in self.train_dataset.select_columns(["prompt_ids", "completion_ids", "limit"]).iter(1000):
            digest.update(repr(rows).encode())
        return digest.hexdigest()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save student, tokenizer, generation config and, for a final model, the model card."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call:
            self.create_model_card()

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write README.md into the output directory: method, teacher, data, the method's papers."""
        if not self.is_world_process_zero():
            return
        names = [n for n in self.args.method_options() if n not in ("max_length", "warmup_steps")]
        names += ["learning_rate", "lr_scheduler_type", "num_train_epochs", "temperature", "top_p", "lmbda"]
        names = list(dict.fromkeys([*names, "max_new_tokens"]))
        model_card.write_model_card(
            Path(self.args.output_dir) / "README.md",
            method=self.args.method,
            paper=self.args.paper,
            model_name=model_name or Path(self.args.output_dir).name,
            student=get_model_id(self.model),
            teacher=self.teacher_name,
            dataset=dataset_name or getattr(self, "dataset_name", None) or self.train_dataset.info.dataset_name or "",
            tags=[*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])],
            settings={name: enum_value(getattr(self.args, name)) for name in names},
        )
