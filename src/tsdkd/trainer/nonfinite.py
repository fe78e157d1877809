"""A step whose loss or gradient is not finite, on whichever process, is taken by none."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..config.logs import get_logger
from ..errors import NonFiniteError

logger = get_logger(__name__)


class NonFiniteGuard:
    """Watches the micro-batches of a step.

    Args:
        accelerator: the run's.
        output_dir: where the completions of a bad step are written.
        max_nonfinite_steps: how many bad steps are left out before the run stops.
        decode: token ids -> text.

    Attributes:
        num_skipped: how many have been left out.
    """

    def __init__(
        self, accelerator: Accelerator, output_dir: Path, max_nonfinite_steps: int, decode: Callable[[Any], str]
    ) -> None:
        self.accelerator, self.output_dir, self.max_nonfinite_steps, self.decode = (
            accelerator,
            output_dir,
            max_nonfinite_steps,
            decode,
        )
        self.num_skipped = 0
        self._micro_batches: list[tuple[dict[str, Any], Tensor]] = []

    def add_micro_batch(self, batch: dict[str, Any], loss: Tensor) -> None:
        """Remember a micro-batch and its loss until the step ends; nothing waits for the device."""
        self._micro_batches.append((batch, loss.detach().isfinite()))

    def is_step_finite(self, grad_norm: float | Tensor, step: int) -> bool:
        """Return whether to take the step. Collective: all processes must call it.

        On failure it writes the suspect completions and counts the skipped step.

        Args:
            grad_norm: of the whole gradient.
            step: the step's number, for file names and messages.

        Raises:
            NonFiniteError: it may not, and no more are allowed.
        """
        seen, self._micro_batches = self._micro_batches, []
        flags = torch.stack(
            [ok for _, ok in seen] + [torch.as_tensor(grad_norm, device=self.accelerator.device).isfinite()]
        )
        bad_losses, bad_norms = (~flags[:-1]).sum(), (~flags[-1]).long()
        counts = self.accelerator.reduce(torch.stack([bad_losses, bad_norms]), reduction="sum").tolist()
        if not any(counts):
            return True
        path = self.output_dir / f"nonfinite_step_{step}_process_{self.accelerator.process_index}.jsonl"
        # with finite losses, any response of the step may have the gradient that isn't
        suspects = [batch for (batch, _), ok in zip(seen, flags[:-1].tolist(), strict=True) if not (ok and counts[0])]
        if suspects:
            self._write(path, suspects)
        self.num_skipped += 1
        what = f"the loss of {counts[0]} micro-batches" if counts[0] else "the gradient"
        text = f"step {step}: {what} is not finite; the completions are in {path.parent}/nonfinite_step_{step}_*.jsonl"
        if self.num_skipped > self.max_nonfinite_steps:
            raise NonFiniteError(
                f"{text}; the step was not taken. Resume with max_nonfinite_steps to leave such steps out, or start "
                "from the last checkpoint's weights, in a new output_dir, with a lower learning_rate"
            )
        logger.warning(f"{text}; left out ({self.num_skipped} of {self.max_nonfinite_steps})")
        return False

    def _write(self, path: Path, batches: list[dict[str, Any]]) -> None:
        """A row a response: its place in the data set, prompt and completion."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            for batch in batches:
                columns = (batch[k].tolist() for k in ("input_ids", "prompt_lengths"))
                for index, completion, ids, prompt in zip(batch["index"], batch["lengths"], *columns, strict=True):
                    texts = {"prompt": ids[:prompt], "completion": ids[prompt : prompt + completion]}
                    row = {"index": index, **{name: self.decode(part) for name, part in texts.items()}}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
