"""Each row several times in succession, for several completions of a prompt."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler


class RepeatedRows(TorchDataset[dict[str, Any]]):
    """Tokenized rows, each `num_repeats` times in succession.

    Their `index` tells the repetitions apart: it is `index * num_repeats + repetition`.
    """

    def __init__(self, rows: Dataset, num_repeats: int) -> None:
        self.rows, self.num_repeats = rows, num_repeats

    def __len__(self) -> int:
        return len(self.rows) * self.num_repeats

    def __getitem__(self, i: int) -> dict[str, Any]:
        row: dict[str, Any] = self.rows[i // self.num_repeats]
        return {**row, "index": row["index"] * self.num_repeats + i % self.num_repeats}


class RepeatSampler(Sampler[int]):
    """Shuffles `RepeatedRows`, or takes them in order; the repetitions of a row stay together.

    The order depends on the seed and the epoch alone, so a resumed run continues it.
    """

    def __init__(self, rows: RepeatedRows, seed: int, shuffle: bool) -> None:
        self.rows, self.seed, self.shuffle, self.epoch = rows, seed, shuffle, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[int]:
        count, repeats = len(self.rows.rows), self.rows.num_repeats
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order: Sequence[int] = torch.randperm(count, generator=generator).tolist() if self.shuffle else range(count)
        return (row * repeats + repetition for row in order for repetition in range(repeats))

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch."""
        self.epoch = epoch
