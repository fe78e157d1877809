"""Skips optimizer steps with a non-finite loss or gradient on any process, on all processes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..config.base import TokenSelectiveConfig
from ..config.logs import get_logger
from ..errors import NonFiniteError

logger = get_logger(__name__)


class NonFiniteGuard:
    """Checks the micro-batches of each step.

    Args:
        accelerator: the run's accelerator.
        args: output_dir, to which the completions of a non-finite step are written; max_nonfinite_steps,
            num_generations.
        decode: token ids -> text.

    Attributes:
        num_skipped: number of steps skipped so far.
    """

    def __init__(self, accelerator: Accelerator, args: TokenSelectiveConfig, decode: Callable[[Any], str]) -> None:
        self.accelerator, self.args, self.decode = accelerator, args, decode
        self.output_dir = Path(str(args.output_dir))
        self.num_skipped = 0
        self._micro_batches: list[tuple[dict[str, Any], Tensor]] = []

    def add_micro_batch(self, batch: dict[str, Any], loss: Tensor) -> None:
        """Store a micro-batch and its loss until the step ends, without device synchronization."""
        self._micro_batches.append((batch, loss.detach().isfinite()))

    def is_step_finite(self, grad_norm: float | Tensor, step: int) -> bool:
        """Return whether to take the step. All processes must call it.

        If not, write the suspect completions and count the skipped step.

        Args:
            grad_norm: norm of the full gradient.
            step: number of the step, for file names and messages.

        Raises:
            NonFiniteError: the step is not finite, and no more steps may be skipped.
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
        # if all losses are finite, any response of the step may have caused the non-finite gradient
        suspects = [batch for (batch, _), ok in zip(seen, flags[:-1].tolist(), strict=True) if not (ok and counts[0])]
        if suspects:
            self._write(path, suspects)
        self.num_skipped += 1
        what = f"the loss of {counts[0]} micro-batches" if counts[0] else "the gradient"
        text = f"step {step}: {what} is not finite; the completions are in {path.parent}/nonfinite_step_{step}_*.jsonl"
        if self.num_skipped > self.args.max_nonfinite_steps:
            raise NonFiniteError(
                f"{text}; the step was not taken. Resume with a higher max_nonfinite_steps to skip such steps, or "
                "start from the last checkpoint's weights in a new output_dir with a lower learning_rate"
            )
        logger.warning(f"{text}; skipped the step ({self.num_skipped} of {self.args.max_nonfinite_steps})")
        return False

    def _write(self, path: Path, batches: list[dict[str, Any]]) -> None:
        """Write one row per response: its row number in the data set, prompt and completion."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            for batch in batches:
                columns = (batch[k].tolist() for k in ("input_ids", "prompt_lengths"))
                for index, completion, ids, prompt in zip(batch["index"], batch["lengths"], *columns, strict=True):
                    texts = {"prompt": ids[:prompt], "completion": ids[prompt : prompt + completion]}
                    row = {
                        "index": index // self.args.num_generations,
                        **{name: self.decode(part) for name, part in texts.items()},
                    }
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
