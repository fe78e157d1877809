"""Shows some completions: printed, in a file for the report, and as tables in W&B, trackio and TensorBoard."""

from collections.abc import Callable, Sequence
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
_TABLE_NAMES = {"train": "completions", "eval": "eval/completions"}
_NUM_PRINTED = 5
_NUM_IN_TABLE = 64

Verdict = tuple[str, bool]
"""The right answer, and whether the completion has it."""


class CompletionLog(TrainerCallback):
    """Logs completions of the last rollout at each logging step, and an evaluation's first ones.

    Args:
        decode: token ids -> text; keywords as in transformers.
        callbacks: the trainer's callbacks, of which the trackers' get the tables `completions` and `eval/completions`.
    """

    def __init__(self, decode: Callable[..., str], callbacks: CallbackHandler) -> None:
        self.decode, self.callbacks = decode, callbacks
        self._kept: dict[str, list[tuple[Sequence[int], Completion, Verdict | None]]] = {"train": [], "eval": []}

    def keep(
        self,
        mode: str,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Completion],
        verdicts: Sequence[Verdict] = (),
    ) -> None:
        """Keep the first completions of a rollout, "train" or "eval", until they are logged."""
        graded: Sequence[Verdict | None] = verdicts or [None] * len(prompts)
        before = self._kept["eval"] if mode == "eval" else []
        self._kept[mode] = [*before, *zip(prompts, completions, graded, strict=True)][:_NUM_IN_TABLE]

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self._log("train", args, state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._log("eval", args, state)

    def _log(self, mode: str, args: Any, state: Any) -> None:
        kept, self._kept[mode] = self._kept[mode], []
        if not kept or not state.is_world_process_zero:
            return
        prompts, completions, verdicts = zip(*kept, strict=True)
        columns: dict[str, list[Any]] = {
            "prompt": [escape_controls(self.decode(prompt)) for prompt in prompts],
            "completion": [escape_controls(self.decode(c.ids, skip_special_tokens=True)) for c in completions],
            "tokens": [len(c.ids) for c in completions],
            "ended": ["stop token" if c.stopped else "limit" for c in completions],
        }
        if verdicts[0] is not None:
            columns |= {"answer": [escape_controls(v[0]) for v in verdicts], "correct": [v[1] for v in verdicts]}
        prompt, completion, *extra = ([*column[:_NUM_PRINTED]] for column in columns.values())
        titles = [title.capitalize() for title in [*columns][2:]]
        print_prompt_completions_sample(
            prompt, completion, {}, None, state.global_step, extra=dict(zip(titles, extra, strict=True))
        )
        table = pd.DataFrame({"step": [state.global_step] * len(kept), **columns})
        path = Path(args.output_dir, COMPLETIONS_DIR, f"{mode}-{state.global_step:08d}.jsonl")
        write_atomically(path, table.to_json(orient="records", lines=True, force_ascii=False))
        self._send(_TABLE_NAMES[mode], table, state.global_step)

    def _send(self, name: str, table: pd.DataFrame, step: int) -> None:
        for callback in self.callbacks.callbacks:
            if isinstance(callback, WandbCallback | TrackioCallback):
                tracker = callback._wandb if isinstance(callback, WandbCallback) else callback._trackio
                tracker.log({name: tracker.Table(dataframe=table), "train/global_step": step})
            elif isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_text(name, _to_markdown(table), step)


def _to_markdown(table: pd.DataFrame) -> str:
    """TensorBoard's text is Markdown. Completions are code blocks in it, since a table's cells have no lines."""
    parts = []
    for row in table.drop(columns="step").to_dict("records"):
        texts = {key: str(row.pop(key)).replace("\n", "\n    ") for key in ("prompt", "completion")}
        facts = ", ".join(f"{key}: {value}" for key, value in row.items())
        parts.append(f"**prompt**\n\n    {texts['prompt']}\n\n**completion** ({facts})\n\n    {texts['completion']}")
    return "\n\n---\n\n".join(parts)
