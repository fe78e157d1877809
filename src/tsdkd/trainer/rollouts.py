"""Creates the micro-batches of a step: completions from the student or the data set."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import cache, cached_property, partial
from itertools import chain, islice, repeat
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from ..data import Rows, is_packed, pack_sequences, pad_sequences
from ..errors import ModelError
from ..grading import Grader
from ..models.loading import ModelPair
from ..models.served_teacher import find_client
from ..models.teacher_client import TeacherClient
from ..objective import Objective
from ..rollout.base import Completion, Sampler
from ..rollout.build import make_sampler
from ..rollout.seeding import RandomStream, prompt_generator
from .completion_log import CompletionLog, Verdict
from .forward import HeadForward
from .graded import grade_completions
from .metrics import MetricAccumulator
from .micro_batches import MicroBatchPlanner
from .rollout_buffer import Batch, MicroBatches
from .token_records import RecordedCompletion, TokenRecorder
from .weight_check import NUM_CHECKED_COMPLETIONS, check_engine_weights

_CHECKED_TOKENS = 16
EVAL_STEP = 2**62  # for evaluation rollouts: the same random numbers in every evaluation


def column(rows: list[Batch], name: str) -> list[Any]:
    """Return a column of collated rows; empty if they don't have it."""
    return [value for batch in rows for value in batch.get(name, ())]


class PendingRollout:
    """The completions of a rollout, which may be sampled while the student trains.

    Args:
        wait: returns them; all processes must call it.
        weights_step: optimizer steps that the policy that samples has taken.
    """

    def __init__(self, wait: Callable[[], list[Completion]], weights_step: int) -> None:
        self.completions, self.weights_step = cache(wait), weights_step

    def state_dict(self) -> dict[str, Any]:
        """Wait for the completions: the weights that sample them are in no checkpoint."""
        return {"completions": [asdict(c) for c in self.completions()], "weights_step": self.weights_step}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "PendingRollout":
        """Restore the state of `state_dict()`."""
        completions = [Completion(**c) for c in state["completions"]]
        return cls(lambda: completions, state["weights_step"])


@dataclass(frozen=True)
class _Sample:
    """The number that seeds it (`RepeatedRows`), its prompt, and the completion to train on.

    The teacher's prompt is None if it is the same.
    """

    index: int
    prompt: list[int]
    completion: Completion
    teacher_prompt: list[int] | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the longer of both sequences."""
        return max(len(self.prompt), len(self.teacher_prompt or ())) + len(self.completion.ids)

    @property
    def teacher_ids(self) -> list[int]:
        """The teacher's sequence."""
        return [*(self.teacher_prompt or self.prompt), *self.completion.ids]


def run_in_background(work: Callable[[], Any]) -> Callable[[], Any]:
    """Start a thread, which doesn't keep the program from ending. Returns a function that waits for its result."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # for the thread that waits
            future.set_exception(error)

    threading.Thread(target=run, name="tsdkd-ahead", daemon=True).start()
    return future.result


class RolloutMixin:
    """The part of a trainer that creates rollouts. Trainers of methods may override its hooks.

    Attributes:
        args: the method's configuration.
        model: the student.
        accelerator, state: see `Trainer`.
        teacher_model: the teacher, if the method has one.
        pair: configurations and tokenizers of student and teacher.
        stop_token_ids: ids that end a completion.
        sampler: samples the student's completions.
        grader: says whether an evaluation's completions are right.
        objective: the method's objective.
        head_forward: runs forward passes of both models.
        planner: divides rollouts into micro-batches.
        token_recorder: records the tokens of some rollouts.
        completion_log: shows some completions.
        metric_accumulators: "train" or "eval" -> its metrics.
    """

    args: Any
    model: Any
    accelerator: Any
    state: Any
    teacher_model: Any
    pair: ModelPair
    stop_token_ids: frozenset[int]
    sampler: Sampler
    grader: Grader
    objective: Objective
    head_forward: HeadForward
    planner: MicroBatchPlanner
    token_recorder: TokenRecorder
    completion_log: CompletionLog
    metric_accumulators: dict[str, MetricAccumulator]
    _prepare_inputs: Any  # defined by `Trainer`
    _weights_version: int
    _rollout_ahead: PendingRollout | None
    _weights_step: int  # optimizer steps that the policy that sampled the present rollout had taken

    # Hooks that a method's trainer may override

    def _make_sampler(self) -> Sampler:
        return make_sampler(self.model, self.accelerator, self.args, self.pair, self.stop_token_ids)

    def _select_completions(
        self, model: nn.Module, rows: list[Batch], step: int, mode: str
    ) -> tuple[list[list[int]], list[Completion]]:
        """Return prompts and completions to train on, from the student or the data set, chosen once per rollout."""
        uniform = torch.rand(1, generator=prompt_generator(self.args.seed, step, 0, RandomStream.ON_POLICY))
        prompts = column(rows, "prompt_ids")
        if bool(uniform < self.args.lmbda):
            return prompts, self._generate(model, rows, prompts, step, mode)
        return prompts, [Completion(ids, True) for ids in column(rows, "completion_ids")]

    def _postprocess_micro_batch(self, model: nn.Module, batch: Batch, step: int, mode: str) -> None:
        """Add data to a micro-batch that must be computed before the student changes."""

    # Helpers

    @property
    def _needs_teacher(self) -> bool:
        return self.objective.needs_teacher_distribution or self.objective.scores_class is not None

    @cached_property
    def _thread_group(self) -> Any:
        """All processes, for collective calls from a thread beside the training; None if there is only one."""
        return torch.distributed.new_group(backend="gloo") if self.accelerator.num_processes > 1 else None

    @property
    def _teacher_client(self) -> TeacherClient | None:
        """If the teacher's layers run on servers."""
        return find_client(self.accelerator.unwrap_model(self.teacher_model)) if self._needs_teacher else None

    def _roll_out(self, model: nn.Module, parts: list[list[Batch]], step: int, mode: str) -> list[MicroBatches]:
        """Convert collated rows to micro-batches with completions from the student or the data set.

        Args:
            parts: batches of the data loader; each part is divided into micro-batches separately.

        Returns:
            One entry for each batch of the data loader.
        """
        rows = list(chain.from_iterable(parts))
        if not rows:
            return []
        client = self._teacher_client
        runs_teacher = self._needs_teacher and client is None
        self.planner.check_models([model, self.teacher_model] if runs_teacher else [model])
        prompts, completions = self._select_completions(model, rows, step, mode)
        num_tokens = sum(len(c.ids) for c in completions)
        self.metric_accumulators[mode].add("completions/mean_length", num_tokens, len(completions))
        samples = self._make_samples(rows, prompts, completions)
        if self.token_recorder.is_due(step, mode):
            repeats = self.args.num_generations
            records = [
                RecordedCompletion(s.index // repeats, s.prompt, s.completion.ids, s.teacher_prompt)
                for s in sorted(samples, key=lambda s: s.index % repeats)  # different prompts first
            ]
            self.token_recorder.record(model, self.teacher_model, records, step)
        entries = []
        own = self._exchange(parts, samples, mode)
        if client is not None:
            client.prefetch([s.teacher_ids for some in own for s in some], takes_ahead=mode == "train")
        for part, some in zip(parts, own, strict=True):
            sizes = [len(row["prompt_ids"]) for row in part]
            for layouts in self.planner.plan(sizes, [s.num_tokens for s in some], mode):
                entries.append([self._micro_batch(some, layout) for layout in layouts])
                for batch in entries[-1]:
                    self._run_postprocessing(model, batch, step, mode)
        return entries

    def _make_samples(
        self, rows: list[Batch], prompts: list[list[int]], completions: list[Completion]
    ) -> list["_Sample"]:
        teacher_prompts = column(rows, "teacher_prompt_ids")
        if teacher_prompts and prompts != column(rows, "prompt_ids"):
            raise ModelError(
                f"{type(self).__name__} trains on other prompts than those of the rows, for which it has no teacher's "
                "prompts; remove teacher_chat_template_kwargs"
            )
        fields = (column(rows, "index"), prompts, completions, teacher_prompts or [None] * len(prompts))
        return [_Sample(*values) for values in zip(*fields, strict=True)]

    def _exchange(
        self, parts: list[list[Batch]], samples: list["_Sample"], mode: str, group: Any = None
    ) -> list[list["_Sample"]]:
        """Return for each part the samples that this process trains on; see `MicroBatchPlanner.exchange`."""
        left = iter(samples)
        own = [list(islice(left, sum(len(row["prompt_ids"]) for row in part))) for part in parts]
        return [self.planner.exchange(some, [s.num_tokens for s in some], mode, group) for some in own]

    def _run_postprocessing(self, model: nn.Module, batch: Batch, step: int, mode: str) -> None:
        """Call the hook, which must leave the inputs of a packed forward pass as they are."""
        ids = batch["input_ids"]
        self._postprocess_micro_batch(model, batch, step, mode)
        if "packed" in batch and (batch["input_ids"] is not ids or "attention_mask" in batch):
            raise ModelError(
                f"{type(self).__name__} changes input_ids or attention_mask of packed micro-batches; set "
                f'micro_batching = "fixed" in {type(self.objective).__name__}'
            )

    def _micro_batch(self, samples: list["_Sample"], layout: Rows) -> Batch:
        """Build the micro-batch of the samples in a layout; their order in it is that of `samples`."""
        order = sorted(chain.from_iterable(layout))
        chosen = [samples[i] for i in order]
        completions = [sample.completion for sample in chosen]
        place = {i: number for number, i in enumerate(order)}
        rows = [[place[i] for i in row] for row in layout]
        batch = self._model_inputs([s.prompt for s in chosen], completions, rows)
        if teacher_prompts := [s.teacher_prompt for s in chosen if s.teacher_prompt is not None]:
            batch["teacher"] = self._model_inputs(teacher_prompts, completions, rows)
        # keep these on the host; reading them from the device would synchronize
        batch |= {"index": [s.index for s in chosen], "lengths": [len(c.ids) for c in completions]}
        logps = [c.logps for c in completions if c.logps is not None]
        if len(logps) == len(completions):
            batch["sampling_per_token_logps"] = torch.tensor(list(chain(*logps)), device=batch["input_ids"].device)
        return batch

    def _model_inputs(self, prompts: list[list[int]], completions: list[Completion], rows: Rows) -> Batch:
        """Build what a model reads: padded sequences, and packed ones if the layout packs them."""
        batch: Batch = self._prepare_inputs(pad_sequences(prompts, [c.ids for c in completions]))
        sequences = [[*prompt, *c.ids] for prompt, c in zip(prompts, completions, strict=True)]
        if is_packed(rows):
            packed = pack_sequences(sequences, rows)
            batch["packed"] = send_to_device(packed, self.accelerator.device, non_blocking=True)
        batch["num_tokens"] = sum(map(len, sequences))
        return batch

    def _generate(
        self, model: nn.Module, rows: list[Batch], prompts: list[list[int]], step: int, mode: str
    ) -> list[Completion]:
        """Sample a completion for each prompt. In evaluation, also grade them, and `eval_samples` of each prompt."""
        indices, limits = column(rows, "index"), column(rows, "limit")
        answers = column(rows, "answer") if mode == "eval" else []
        samples = self.args.eval_samples if answers else 1
        keys = [(self.args.seed, step + sample, i) for sample in range(samples) for i in indices]
        pending = self._rollout_ahead if mode == "train" else None
        if pending is None:
            self._update_engine(mode)
            generate = partial(self.sampler.generate, model, prompts * samples, limits * samples, keys)
            pending = PendingRollout(generate, self.state.global_step)
        accumulator, start = self.metric_accumulators[mode], time.perf_counter()
        sampled = pending.completions()
        num_tokens, completions = sum(len(c.ids) for c in sampled), sampled[: len(prompts)]
        accumulator.add_seconds("rollout", num_tokens, time.perf_counter() - start)
        if mode == "train":
            self._rollout_ahead, self._weights_step = None, pending.weights_step
        self._check_engine(model, prompts, completions)  # a rollout ahead was checked when it began
        accumulator.add("completions/eos_share", sum(c.stopped for c in completions), len(completions))
        verdicts = self._grade(sampled, list(zip(indices, answers, strict=True))) if answers else []
        if self.args.log_completions:
            repeats = 1 if mode == "eval" else self.args.num_generations
            logged = zip(indices, prompts, completions, verdicts or repeat(None), strict=False)
            by_repetition = sorted(logged, key=lambda fields: fields[0] % repeats)  # different prompts first
            self.completion_log.keep(mode, (fields[1:] for fields in by_repetition))
        return completions

    def _roll_out_ahead(self, model: nn.Module, parts: list[list[Batch]], step: int) -> None:
        """Begin to sample a later step's rollout with the present weights, and to score it, while the student trains.

        Arguments: see `_roll_out`.
        """
        rows = list(chain.from_iterable(parts))
        prompts, limits = column(rows, "prompt_ids"), column(rows, "limit")
        keys = [(self.args.seed, step, i) for i in column(rows, "index")]
        self._update_engine("train")
        if self.sampler.needs_weight_check:  # when the completions arrive, the student has other weights
            few = slice(NUM_CHECKED_COMPLETIONS)
            short = [min(limit, _CHECKED_TOKENS) for limit in limits[few]]
            self._check_engine(model, prompts[few], self.sampler.generate(model, prompts[few], short, keys[few]))
        wait = self.sampler.start(prompts, limits, keys)  # type: ignore[attr-defined]
        client = self._teacher_client
        if client is not None:
            wait = run_in_background(partial(self._score_ahead, client, wait, parts, prompts, self._thread_group))
        self._rollout_ahead = PendingRollout(wait, self.state.global_step)

    def _score_ahead(
        self,
        client: TeacherClient,
        wait: Callable[[Any], list[Completion]],
        parts: list[list[Batch]],
        prompts: list[list[int]],
        group: Any,
    ) -> list[Completion]:
        """Wait for the completions, and ask the servers for what the teacher says of those to train on."""
        completions = wait(group)
        samples = self._make_samples(list(chain.from_iterable(parts)), prompts, completions)
        own = self._exchange(parts, samples, "train", group)
        client.prefetch_ahead([s.teacher_ids for some in own for s in some])
        return completions

    def _update_engine(self, mode: str) -> None:
        start = time.perf_counter()
        if self.sampler.update((self.state.global_step, self._weights_version)):
            seconds = time.perf_counter() - start
            self.metric_accumulators[mode].add("speed/weight_sync_seconds", seconds, 1)

    def _check_engine(self, model: nn.Module, prompts: list[list[int]], completions: list[Completion]) -> None:
        if self.sampler.needs_weight_check:
            check_engine_weights(self.head_forward, self.accelerator, model, prompts, completions, self.args.top_p)
            self.sampler.needs_weight_check = False

    def _grade(self, sampled: list[Completion], answers: list[tuple[int, Any]]) -> list[Verdict]:
        """Log the accuracy, and avg@n and pass@n of several samples; return the verdicts on the first samples.

        Args:
            sampled: the first completion of each prompt, then the second of each, and so on.
            answers: row number and answer of each prompt.
        """
        texts = [self.pair.tokenizer.decode(c.ids, skip_special_tokens=True) for c in sampled]
        prompts, samples = len(answers), len(sampled) // len(answers)
        right = grade_completions(self.grader, texts, answers * samples)
        accumulator = self.metric_accumulators["eval"]
        accumulator.add("accuracy", sum(right[:prompts]), prompts)
        if samples > 1:
            num_correct = [sum(right[i::prompts]) for i in range(prompts)]
            accumulator.add(f"avg@{samples}", sum(right) / samples, prompts)
            accumulator.add(f"pass@{samples}", sum(count > 0 for count in num_correct), prompts)
        return [(str(answer), is_right) for (_, answer), is_right in zip(answers, right, strict=False)]
