"""Shows some completions: printed, in a file for the report, and as tables in W&B, trackio and TensorBoard."""

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.trainer_callback import CallbackHandler
from trl.trainer.utils import print_prompt_completions_sample

from ..errors import escape_controls
from ..files import write_atomically
from ..rollout.base import Completion

COMPLETIONS_DIR = "completions"
_TRAINING = "train"
_NUM_PRINTED = 5
_NUM_IN_TABLE = 64

Verdict = tuple[str, bool]
"""The right answer, and whether the completion has it."""

LoggedCompletion = tuple[Sequence[int], Completion, Verdict | None]
"""A prompt, its completion, and the verdict if it was graded."""


class CompletionLog(TrainerCallback):
    """Logs completions of the last rollout at each logging step, and the first of each evaluation.

    Args:
        decode: token ids -> text; keywords as in transformers.
        callbacks: the trainer's callbacks. The trackers' get the tables `completions` and `eval/completions`.
    """

    def __init__(self, decode: Callable[..., str], callbacks: CallbackHandler) -> None:
        self.decode, self.callbacks = decode, callbacks
        self._rollout: list[LoggedCompletion] = []
        self._evaluated: list[LoggedCompletion] = []
        self._evaluation = "eval"

    def start_evaluation(self, name: str) -> None:
        """Forget what an evaluation that did not end has left. `name`: the prefix of the metrics, such as "eval"."""
        self._evaluation, self._evaluated = name, []

    def keep(self, mode: str, completions: Iterable[LoggedCompletion]) -> None:
        """Keep the first completions of a rollout, "train" or "eval", until they are logged."""
        if mode == "eval":
            self._evaluated += islice(completions, _NUM_IN_TABLE - len(self._evaluated))
        else:
            self._rollout = [*islice(completions, _NUM_IN_TABLE)]

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            kept, self._rollout = self._rollout, []
            self._log(_TRAINING, kept, args, state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kept, self._evaluated = self._evaluated, []
        self._log(self._evaluation, kept, args, state)

    def _log(self, name: str, kept: Sequence[LoggedCompletion], args: Any, state: Any) -> None:
        if not kept or not state.is_world_process_zero:
            return
        columns, step = self._make_columns(kept), state.global_step
        prompts, completions, *others = ([*column[:_NUM_PRINTED]] for column in columns.values())
        titles = [title.capitalize() for title in [*columns][2:]]
        extra = dict(zip(titles, others, strict=True))
        print_prompt_completions_sample(prompts, completions, {}, None, step, extra=extra)
        table = pd.DataFrame({"step": [step] * len(kept), **columns})
        path = Path(args.output_dir, COMPLETIONS_DIR, re.sub(r"[^\w.-]", "_", f"{name}-{step:08d}.jsonl"))
        write_atomically(path, table.to_json(orient="records", lines=True, force_ascii=False))
        self._send("completions" if name == _TRAINING else f"{name}/completions", table, step)

    def _make_columns(self, kept: Sequence[LoggedCompletion]) -> dict[str, list[Any]]:
        prompts, completions, verdicts = zip(*kept, strict=True)
        columns: dict[str, list[Any]] = {
            "prompt": [escape_controls(self.decode(prompt)) for prompt in prompts],
            "completion": [escape_controls(self.decode(c.ids, skip_special_tokens=True)) for c in completions],
            "tokens": [len(c.ids) for c in completions],
            "ended": ["stop token" if c.stopped else "limit" for c in completions],
        }
        if verdicts[0] is not None:
            columns |= {"answer": [escape_controls(v[0]) for v in verdicts], "correct": [v[1] for v in verdicts]}
        return columns

    def _send(self, name: str, table: pd.DataFrame, step: int) -> None:
        for callback in self.callbacks.callbacks:
            if isinstance(callback, WandbCallback | TrackioCallback):
                tracker = callback._wandb if isinstance(callback, WandbCallback) else callback._trackio
                tracker.log({name: tracker.Table(dataframe=table), "train/global_step": step})
            elif isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_text(name, _to_markdown(table), step)


def _to_markdown(table: pd.DataFrame) -> str:
    """Markdown for TensorBoard. Texts are code blocks in it, since the cells of a table have no lines."""
    blocks = []
    for row in table.drop(columns="step").to_dict("records"):
        facts = ", ".join(f"{key}: {row.pop(key)}" for key in ("tokens", "ended", "correct") if key in row)
        texts = (f"**{key}**\n\n    " + str(value).replace("\n", "\n    ") for key, value in row.items())
        blocks.append("\n\n".join([*texts, facts]))
    return "\n\n---\n\n".join(blocks)
