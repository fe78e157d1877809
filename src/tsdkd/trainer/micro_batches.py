"""Divides the sequences of a rollout into micro-batches, and lays out their forward passes."""

from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import nn

from ..config.base import TokenSelectiveConfig
from ..config.logs import get_logger
from ..data import Rows, divide, first_fit_decreasing, one_per_row, pack_rows, split_to_count
from ..errors import ConfigError, ModelError
from ..models.loading import unwrap_peft
from ..objective import Objective
from .forward import uses_flash_attention
from .packing_check import explain_unpackable

logger = get_logger(__name__)
Sample = TypeVar("Sample")


class MicroBatchPlanner:
    """Decides which sequences form a micro-batch, and how they lie in the rows of a forward pass.

    Args:
        accelerator: the run's accelerator.
        args: padding_free, max_tokens_per_micro_batch, per_device_train_batch_size, fused_head.
        objective: the method's objective, which may restrict the choice (`Objective.micro_batching`).
        longest_sequence: length of the longest possible sequence, tokens.

    Raises:
        ConfigError: `padding_free` or `max_tokens_per_micro_batch` is set, but micro-batches must stay as they are.
    """

    def __init__(
        self, accelerator: Accelerator, args: TokenSelectiveConfig, objective: Objective, longest_sequence: int
    ) -> None:
        self.accelerator, self.args, self.objective = accelerator, args, objective
        self.budget = args.max_tokens_per_micro_batch or args.per_device_train_batch_size * longest_sequence
        reason = self._reason_for_fixed_batches()
        for field in ("padding_free", "max_tokens_per_micro_batch"):
            if reason and getattr(args, field):
                raise ConfigError([f"{field}: {reason}"])
        self.is_fixed = bool(reason) or args.padding_free is False
        self._packs: bool | None = False if self.is_fixed else None
        self._packs_into_one_row = False
        self._max_width, self._linear_cost = self.budget, 0.0

    def _reason_for_fixed_batches(self) -> str:
        """Return why micro-batches must be those of the data loader, or ""."""
        if self.objective.micro_batching == "fixed" or self.objective.unit == "micro-batches":
            return f"{self.args.method} depends on padding or on the split into micro-batches"
        if self.args.neftune_noise_alpha:
            return "the noise of neftune_noise_alpha depends on the width of the rows"
        if self.accelerator.num_processes > 1 and not self.accelerator.even_batches:
            return "with even_batches: false, processes can have different numbers of rows"
        return ""

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
        self._packs_into_one_row = self._packs and all(map(uses_flash_attention, configs))
        self._max_width = min(self.budget, *map(_widest_row, configs))
        self._linear_cost = 6.0 * min(getattr(config.get_text_config(), "hidden_size", 1024) for config in configs)
        if problem and self.args.padding_free:
            raise ModelError(f"padding_free: {problem}; remove padding_free: true to train on padded micro-batches")
        if problem:
            logger.warning(f"micro-batches are padded, because packing isn't possible: {problem}")

    def exchange(self, samples: list[Sample], lengths: Sequence[int], mode: str, group: Any = None) -> list[Sample]:
        """Exchange a window's sequences between processes, so that none waits for one with longer sequences.

        Deals them out by length, forward and backward in turn. All processes must call it and have the same number of
        sequences, which doesn't change.

        Args:
            samples: this process's sequences, with everything that belongs to them.
            lengths: their tokens, prompt plus completion.
            mode: "train" or "eval". Evaluation exchanges nothing.
            group: the processes that exchange, by default all, in the main thread.
        """
        processes, own = self.accelerator.num_processes, self.accelerator.process_index
        if processes == 1 or mode == "eval" or self.is_fixed or self.objective.micro_batching == "in order":
            return samples
        gathered: list[Any] = [None] * processes
        torch.distributed.all_gather_object(gathered, list(zip(lengths, samples, strict=True)), group=group)
        everyone: list[tuple[int, Sample]] = list(chain.from_iterable(gathered))
        order = sorted(range(len(everyone)), key=lambda i: -everyone[i][0])
        rounds = (order[i : i + processes] for i in range(0, len(order), processes))
        dealt = [round_ if number % 2 == 0 else round_[::-1] for number, round_ in enumerate(rounds)]
        return [everyone[i][1] for i in sorted(i for round_ in dealt for i in round_[own : own + 1])]

    def plan(self, sizes: Sequence[int], lengths: Sequence[int], mode: str) -> list[list[Rows]]:
        """Divide the sequences of a window, or of a part of it, into micro-batches. All processes must call it.

        Args:
            sizes: number of sequences in each batch of the data loader.
            lengths: tokens of each sequence, prompt plus completion.
            mode: "train" or "eval". Evaluation keeps the data loader's batches.

        Returns:
            For each batch of the data loader, the micro-batches to run in its place: none or several, but at least one
            for the last.
        """
        if self.is_fixed or mode == "eval":
            starts = accumulate(sizes, initial=0)
            return [[_shift(self._lay_out(lengths[i : i + n]), i)] for i, n in zip(starts, sizes, strict=False)]
        in_order = self.objective.micro_batching == "in order"
        micro_batches = divide(lengths, self.budget, self._lay_out, in_order)
        micro_batches = split_to_count(micro_batches, lengths, self._largest(len(micro_batches)))
        # the first one, whose gradients are logged, must not always have the longest sequences
        micro_batches.sort(key=lambda rows: min(chain.from_iterable(rows)))
        ends = [len(micro_batches) * i // len(sizes) for i in range(len(sizes) + 1)]
        return [micro_batches[start:end] for start, end in pairwise(ends)]

    def _lay_out(self, lengths: Sequence[int]) -> Rows:
        """Return a layout for sequences of these lengths."""
        if self._packs_into_one_row:
            return first_fit_decreasing(lengths, self._max_width)
        if self._packs:
            return pack_rows(lengths, self._max_width, self._linear_cost)
        return one_per_row(range(len(lengths)))

    def _largest(self, count: int) -> int:
        """Return the maximum over all processes, whose collective calls must match."""
        if self.accelerator.num_processes == 1:
            return count
        return int(self.accelerator.gather(torch.tensor([count], device=self.accelerator.device)).max())


def _shift(rows: Rows, start: int) -> Rows:
    return [[start + i for i in row] for row in rows]


def _widest_row(config: Any) -> int:
    """Return how wide a row may be: some models have a mask or a scale for each place in it."""
    names = ("max_position_embeddings", "attention_chunk_size", "floor_scale")  # of GPT-Neo; of Llama 4
    limits = (getattr(config.get_text_config(), name, None) for name in names)
    return min((int(limit) for limit in limits if limit), default=2**62)
