"""The training loop both methods share: roll out an accumulation window, count its tokens, query the teacher, step.

It subclasses TRL's `GKDTrainer` and replaces what can't be right there: `GKDTrainer` counts tokens before the rollout
exists, refuses pairs with differently padded vocabularies, and samples from the ambient RNG.
"""

import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput
from trl.experimental.gkd import GKDTrainer
from trl.models import prepare_deepspeed
from trl.models.utils import unwrap_model_for_generation
from trl.trainer.utils import disable_dropout_in_model

from . import model_card
from .answers import is_correct
from .completions import CompletionSample, print_completions
from .config import TokenSelectiveConfig
from .data import collate, completion_mask, pad_sequences, prepare_rows
from .errors import ConfigError, DataError
from .models import (
    check_same_tokenizer,
    context_length,
    load_config,
    load_teacher,
    load_tokenizer,
    shared_vocab_size,
    stop_token_ids,
)
from .objectives import ObjectiveOutput
from .rollout import Completion, prompt_generator
from .rollout.hf import sample

Batch = dict[str, Any]
_EVAL_STEP = 2**62  # evaluation rollouts: the same random numbers at every evaluation
_COIN = 2  # stream of `prompt_generator`


class TokenSelectiveTrainer(GKDTrainer):
    """Base of `TSDKDTrainer` and `EOPDTrainer`; subclasses say what a micro-batch is asked and what the objective is.

    Args:
        model: the student: path, hub id or loaded model.
        teacher_model: path, hub id or loaded model.
        args: the method's configuration.
        train_dataset: rows as `tsdkd.data` describes them.
        eval_dataset: held-out rows; with an `answer` column accuracy is logged too.
        processing_class: the student's tokenizer; by default the one beside `model`.
        teacher_processing_class: the teacher's; by default the one beside `teacher_model`.
        callbacks, optimizers, peft_config: as in `GKDTrainer`.

    Raises:
        TokenizerMismatchError: the tokenizers differ.
        DataError, ModelError, ConfigError: the input can't be used; nothing has been written.
    """

    config_class: type[TokenSelectiveConfig]
    loss_is_scaled_for_ga = True
    unit: str  # what the loss is a mean of: "responses" or "tokens"

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
        args = args or self.config_class(f"{Path(_name_of(model)).name}-{self._name}")
        trust = args.trust_remote_code
        init_kwargs = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
        teacher_kwargs = args.teacher_model_init_kwargs if isinstance(args.teacher_model_init_kwargs, dict) else {}
        revisions = [{"revision": kw["revision"]} if "revision" in kw else {} for kw in (init_kwargs, teacher_kwargs)]
        student_config = (
            load_config(model, "model", trust_remote_code=trust, **revisions[0]) if isinstance(model, str) else model.config
        )
        tokenizer = processing_class or load_tokenizer(
            _name_of(model), "model", trust_remote_code=trust, **revisions[0]
        )
        teacher_tokenizer = teacher_processing_class or self._find_teacher_tokenizer(
            teacher_model, tokenizer, trust_remote_code=trust, **revisions[1]
        )
        check_same_tokenizer(tokenizer, teacher_tokenizer)
        if isinstance(teacher_model, str):
            teacher_model = load_teacher(teacher_model, trust, **teacher_kwargs)

        self._template = teacher_tokenizer if args.chat_template_source == "teacher" else tokenizer
        self._context = context_length(student_config, teacher_model.config)
        if args.chat_template_source == "teacher":
            tokenizer.chat_template = teacher_tokenizer.chat_template  # it is saved with the student
        train_dataset = self._tokenized(train_dataset, args)
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: self._tokenized(rows, args) for name, rows in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self._tokenized(eval_dataset, args)

        # `GKDTrainer.__init__` would refuse differently padded vocabularies: its parent's is called, and what it does
        # besides is done below
        args.dataset_kwargs = {"skip_prepare_dataset": True}
        super(GKDTrainer, self).__init__(
            model,
            args=args,
            data_collator=collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )
        if args.disable_dropout:
            disable_dropout_in_model(self.model)
        self.vocab_size = shared_vocab_size(self.model.config, teacher_model.config)
        sources = [self.model.generation_config, tokenizer]
        if args.chat_template_source == "teacher":
            sources += [teacher_model.generation_config, teacher_tokenizer]
        self.stop_ids = {i for i in stop_token_ids(*sources) if i < self.vocab_size}
        self.model.generation_config.eos_token_id = sorted(self.stop_ids) or None  # the saved student stops there too
        self.teacher_name = _name_of(teacher_model)
        teacher_model.requires_grad_(False).eval()
        if self.is_deepspeed_enabled:
            self.teacher_model = prepare_deepspeed(teacher_model, self.accelerator)
        else:
            self.teacher_model = self.accelerator.prepare_model(teacher_model, evaluation_mode=True)

        self.objective = self._make_objective()
        self.steps_per_rollout = self._count_steps_per_rollout()
        self._windows: deque[list[Batch]] = deque()  # rolled out, not yet trained on
        self._already_rolled_out = 0  # batches that the data loader will yield again after a resume
        self._first_of_step = False
        self._sums: dict[str, dict[str, list[float]]] = {"train": defaultdict(_zeros), "eval": defaultdict(_zeros)}
        self._samples: list[CompletionSample] = []

    # What a method decides

    def _make_objective(self) -> Any:
        raise NotImplementedError

    def _micro_batch_objective(self, student_logits: Tensor, batch: Batch, mask: Tensor, training: bool) -> ObjectiveOutput:
        raise NotImplementedError

    def _annotate(self, model: nn.Module, batch: Batch, step: int, mode: str) -> None:
        """Add to a rolled-out micro-batch what must be known before the student changes."""

    def _count_steps_per_rollout(self) -> int:
        return 1

    # Construction

    @staticmethod
    def _find_teacher_tokenizer(
        teacher: str | PreTrainedModel, fallback: PreTrainedTokenizerBase, **kwargs: Any
    ) -> PreTrainedTokenizerBase:
        name = _name_of(teacher)
        if not isinstance(teacher, str) and not name:
            return fallback  # a model built in memory: nothing to compare with
        return load_tokenizer(name, "teacher_model", **kwargs)

    def _tokenized(self, rows: Dataset, args: TokenSelectiveConfig) -> Dataset:
        if "prompt_ids" in rows.column_names:
            return rows
        prepared = prepare_rows(rows, self._template, args, self._context, needs_completion=args.lmbda < 1)
        if len(prepared) < len(rows) and args.process_index == 0:
            dropped = len(rows) - len(prepared)
            print(f"dropped {dropped} of {len(rows)} prompts: they leave no room for a completion", flush=True)
        return prepared

    # Rollouts

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | None]:
        """The next accumulation window, rolled out, and the number of responses or tokens in the global batch."""
        deque(islice(epoch_iterator, self._already_rolled_out), maxlen=0)
        self._already_rolled_out = 0
        if not self._windows:
            steps = max(1, min(self.steps_per_rollout, self.state.max_steps - self.state.global_step))
            size = self.args.gradient_accumulation_steps
            rows = list(islice(epoch_iterator, num_batches if steps == 1 else size * steps))
            batches = self._roll_out(self.model_wrapped, rows, self.state.global_step)
            self._windows.extend(batches[i : i + size] for i in range(0, len(batches), size))
        if not self._windows:
            return [], None
        window = self._windows.popleft()
        lengths = torch.cat([batch["completion_lengths"] for batch in window])
        count = (lengths > 0).sum() if self.unit == "responses" else lengths.sum()
        self._first_of_step = True
        return window, self.accelerator.reduce(count.to(device), reduction="sum")

    def _roll_out(self, model: nn.Module, rows: list[Batch], step: int, mode: str = "train") -> list[Batch]:
        """Collated rows -> padded micro-batches with the student's or the data set's completions."""
        if not rows:
            return []
        on_policy = bool(torch.rand(1, generator=prompt_generator(self.args.seed, step, 0, _COIN)) < self.args.lmbda)
        prompts = [ids for batch in rows for ids in batch["prompt_ids"]]
        if on_policy:
            completions = self._generate(model, rows, prompts, step, mode)
        else:
            completions = [Completion(ids, True) for batch in rows for ids in batch["completion_ids"]]
        self._add(mode, "completions/mean_length", sum(len(c.ids) for c in completions), len(completions))
        answers = [a for batch in rows for a in batch.get("answer", [])]
        if on_policy and (mode == "eval" and answers or self.args.log_completions):
            self._read_completions(prompts, completions, answers, mode)

        batches, position = [], 0
        for batch in rows:
            here = slice(position, position + len(batch["prompt_ids"]))
            position = here.stop
            micro = self._prepare_inputs(pad_sequences(prompts[here], [c.ids for c in completions[here]]))
            micro["index"] = batch["index"]
            self._annotate(model, micro, step, mode)
            batches.append(micro)
        return batches

    def _generate(
        self, model: nn.Module, rows: list[Batch], prompts: list[list[int]], step: int, mode: str
    ) -> list[Completion]:
        indices = [int(i) for batch in rows for i in batch["index"]]
        limits = [limit for batch in rows for limit in batch["limit"]]
        generators = [prompt_generator(self.args.seed, step, index) for index in indices]
        start = time.perf_counter()
        was_training = model.training
        model.eval()
        with unwrap_model_for_generation(
            model, self.accelerator, gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs
        ) as unwrapped:
            completions = sample(
                unwrapped,
                prompts,
                limits,
                generators,
                stop_ids=self.stop_ids,
                vocab_size=self.vocab_size,
                temperature=self.args.temperature,
                top_p=self.args.top_p,
            )
        model.train(was_training)
        tokens = sum(len(c.ids) for c in completions)
        self._add(mode, "speed/rollout_tokens_per_second", tokens, time.perf_counter() - start)
        self._add(mode, "completions/eos_share", sum(c.stopped for c in completions), len(completions))
        return completions

    def _read_completions(
        self, prompts: list[list[int]], completions: list[Completion], answers: list[str], mode: str
    ) -> None:
        texts = self.processing_class.batch_decode([c.ids for c in completions], skip_special_tokens=True)
        if mode == "eval" and answers:
            right = sum(is_correct(text, str(answer)) for text, answer in zip(texts, answers, strict=True))
            self._add(mode, "accuracy", right, len(answers))
        shown = list(zip(prompts, completions, texts, strict=True))[:5]
        self._samples = [
            CompletionSample(self.processing_class.decode(p), text, len(c.ids), c.stopped) for p, c, text in shown
        ]

    # Loss

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | None = None) -> Tensor:
        """One micro-batch, forward and backward. `GKDTrainer`'s own would roll out again."""
        teacher_before = self._sums["train"]["speed/teacher_tokens_per_second"][1]
        start = time.perf_counter()
        loss = super(GKDTrainer, self).training_step(model, inputs, num_items_in_batch)
        self._synchronize()
        teacher = self._sums["train"]["speed/teacher_tokens_per_second"][1] - teacher_before
        seconds = time.perf_counter() - start - teacher
        self._add("train", "speed/student_tokens_per_second", float(inputs["attention_mask"].sum()), seconds)
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """This process's share of the global mean, times the number of processes (DDP and ZeRO average gradients)."""
        training = num_items_in_batch is not None
        mask = completion_mask(inputs)
        student_logits = self._logits(model, inputs, mask)
        output = self._micro_batch_objective(student_logits, inputs, mask, training)
        mode = "train" if training else "eval"
        for name, (total, count) in output.metrics.items():
            self._add(mode, name, total.item(), count.item())
        lengths = inputs["completion_lengths"]
        local = int((lengths > 0).sum() if self.unit == "responses" else lengths.sum())
        for name, term in output.terms.items():
            self._add(mode, f"loss/{name}", term.item(), local)
        if not training:
            self._add(mode, "loss", output.loss.item(), local)
            return output.loss / max(local, 1)
        self._log_term_gradients(model, output, local)
        return output.loss * (self.accelerator.num_processes / num_items_in_batch.clamp(min=1))

    def _logits(self, model: nn.Module, batch: Batch, mask: Tensor) -> Tensor:
        """`[N, V]`: the logits that predict the completion's tokens, over the shared ids, temperature applied."""
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        logits = output.logits[:, :-1][mask][:, : self.vocab_size]
        return logits if self.args.temperature == 1.0 else logits / self.args.temperature

    @torch.no_grad()
    def _teacher_logits(self, batch: Batch, mask: Tensor, mode: str = "train") -> Tensor:
        start = time.perf_counter()
        logits = self._logits(self.teacher_model, batch, mask)
        self._synchronize()
        self._add(
            mode, "speed/teacher_tokens_per_second", float(batch["attention_mask"].sum()), time.perf_counter() - start
        )
        return logits

    def _log_term_gradients(self, model: nn.Module, output: ObjectiveOutput, local: int) -> None:
        """Gradient norm of each weighted term, as if this micro-batch were the batch."""
        every = self.args.log_term_gradients
        first, self._first_of_step = self._first_of_step, False
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled  # no whole gradient to look at
        if not (first and every and self.state.global_step % every == 0) or sharded:
            return
        parameters = [p for p in model.parameters() if p.requires_grad]
        for name, term in output.terms.items():
            weighted = output.weights[name] * term / max(local, 1)
            gradients = torch.autograd.grad(weighted, parameters, retain_graph=True, allow_unused=True)
            norms = [g.float().norm() for g in gradients if g is not None]
            self._add("train", f"grad_norm/{name}", float(torch.stack(norms).norm()) if norms else 0.0, 1)

    # Evaluation

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The same terms on held-out prompts, and accuracy where rows carry an `answer`."""
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: self._tokenized(rows, self.args) for name, rows in eval_dataset.items()}
        elif isinstance(eval_dataset, Dataset):
            eval_dataset = self._tokenized(eval_dataset, self.args)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Trainer's loop; its metrics become sums over all processes divided once."""
        self._sums["eval"].clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update({f"{metric_key_prefix}_{k}": v for k, v in self._drain("eval").items()})
        return output

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """Roll out, then the loss without a gradient."""
        with torch.no_grad(), self.compute_loss_context_manager():
            (batch,) = self._roll_out(model, [inputs], _EVAL_STEP, "eval")
            return self.compute_loss(model, batch), None, None

    # Logging

    def _add(self, mode: str, name: str, total: float, count: float) -> None:
        sums = self._sums[mode][name]
        sums[0] += total
        sums[1] += count

    def _drain(self, mode: str) -> dict[str, float]:
        """Sum over count of every metric, over all processes; those with no count are left out."""
        names = sorted(self._sums[mode])
        if not names:
            return {}
        local = torch.tensor([self._sums[mode][n] for n in names], dtype=torch.float64, device=self.accelerator.device)
        self._sums[mode].clear()
        sums = self.accelerator.reduce(local, reduction="sum").tolist()
        return {name: total / count for name, (total, count) in zip(names, sums, strict=True) if count > 0}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the method's metrics to a training log line."""
        if "loss" in logs:
            logs.update(self._drain("train"))
            if self._samples and self.accelerator.is_main_process:
                print_completions(self._samples, self.state.global_step)
        super().log(logs, start_time)

    def _synchronize(self) -> None:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()

    # Checkpoints

    def _save_rng_state(self, output_dir: str) -> None:
        """Each process's own state goes beside its RNG state."""
        super()._save_rng_state(output_dir)
        state = {"objective": self.objective.state_dict(), "windows": list(self._windows)}
        torch.save(state, self._state_file(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = self._state_file(checkpoint)
        if not path.is_file():
            raise ConfigError(
                [f"resume_from_checkpoint: {path} is missing; was it written by tsdkd, with as many processes?"]
            )
        state = torch.load(path, weights_only=True, map_location=self.accelerator.device)
        self.objective.load_state_dict(state["objective"])
        self._windows = deque(state["windows"])
        self._already_rolled_out = sum(len(window) for window in self._windows)

    def _state_file(self, folder: str) -> Path:
        return Path(folder) / f"tsdkd_state_{self.args.process_index}.pt"

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save student, tokenizer, generation config and, for a final model, the model card."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call:
            self.create_model_card()

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write README.md into the output directory: method, teacher, data, both papers."""
        if not self.is_world_process_zero():
            return
        model_card.write(
            Path(self.args.output_dir) / "README.md",
            method=self._name,
            model_name=model_name or Path(self.args.output_dir).name,
            student=getattr(self.model.config, "_name_or_path", ""),
            teacher=self.teacher_name,
            dataset=dataset_name or getattr(self, "dataset_name", None) or self.train_dataset.info.dataset_name or "",
            tags=[*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])],
            settings=self._card_settings(),
        )

    def _card_settings(self) -> Mapping[str, Any]:
        names = ["learning_rate", "lr_scheduler_type", "num_train_epochs", "temperature", "lmbda", "max_new_tokens"]
        own = [n for n in vars(self.objective) if hasattr(self.args, n)]
        values = {name: getattr(self.args, name) for name in [*own, *names]}
        return {name: getattr(value, "value", value) for name, value in values.items()}


def _zeros() -> list[float]:
    return [0.0, 0.0]


def _name_of(model: str | PreTrainedModel) -> str:
    return model if isinstance(model, str) else getattr(model.config, "_name_or_path", "") or ""
