"""Lays out the forward passes of a rollout's micro-batches."""

from collections.abc import Sequence

from accelerate import Accelerator
from torch import nn

from ..config.base import TokenSelectiveConfig
from ..config.logs import get_logger
from ..data import Rows, one_per_row, pack_rows
from ..errors import ModelError
from ..models.loading import unwrap_peft
from ..objective import Objective
from .forward import uses_flash_attention
from .packing_check import explain_unpackable

logger = get_logger(__name__)


class MicroBatchPlanner:
    """Decides how the sequences of a micro-batch lie in the rows of a forward pass.

    Args:
        accelerator: the run's accelerator.
        args: padding_free, fused_head.
        objective: the method's objective, which may require fixed micro-batches.
    """

    def __init__(self, accelerator: Accelerator, args: TokenSelectiveConfig, objective: Objective) -> None:
        self.accelerator, self.args = accelerator, args
        self.is_fixed = args.padding_free is False or objective.micro_batching == "fixed"
        self._packs: bool | None = False if self.is_fixed else None
        self._packs_into_one_row = False

    def check_models(self, models: Sequence[nn.Module]) -> None:
        """Check once whether all models that run over the micro-batches support packing. All processes must call it.

        Raises:
            ModelError: a model doesn't, although `padding_free` is true.
        """
        if self._packs is not None:
            return
        problems = (explain_unpackable(self.accelerator, self.args, model) for model in models)
        problem = next((text for text in problems if text), None)
        self._packs = problem is None
        configs = [unwrap_peft(self.accelerator.unwrap_model(model)).config for model in models]
        self._packs_into_one_row = all(map(uses_flash_attention, configs))
        if problem and self.args.padding_free:
            raise ModelError(f"padding_free: {problem}; remove padding_free: true to train on padded micro-batches")
        if problem:
            logger.warning(f"micro-batches are padded, because packing isn't possible: {problem}")

    def lay_out(self, lengths: Sequence[int]) -> Rows:
        """Return the layout of a micro-batch of sequences of these lengths, tokens."""
        if not self._packs:
            return one_per_row(range(len(lengths)))
        return [list(range(len(lengths)))] if self._packs_into_one_row else pack_rows(lengths)
