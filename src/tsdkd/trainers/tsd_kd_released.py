"""`TSDKDReleasedTrainer`: micro-batches laid out as TSD-KD's public code does."""

import torch
from torch import Tensor, nn

from ..data import completion_mask
from ..objectives import Responses
from ..trainer import Batch, TokenSelectiveTrainer


class TSDKDReleasedTrainer(TokenSelectiveTrainer):
    """Asks about every row's completion and its padding, up to the longest. See `TokenSelectiveTrainer`."""

    def _annotate(self, model: nn.Module, batch: Batch, step: int, mode: str) -> None:
        """Pad until every row has room for the longest completion; the padding is end-of-sequence, which the models
        don't see."""
        width = int(batch["prompt_lengths"].max() + batch["completion_lengths"].max())
        ids = nn.functional.pad(batch["input_ids"], (0, width - batch["input_ids"].shape[1]))
        lengths = batch["prompt_lengths"] + batch["completion_lengths"]
        inside = torch.arange(width, device=ids.device) < lengths.unsqueeze(-1)
        batch["input_ids"], batch["attention_mask"] = ids.masked_fill(~inside, self._end), inside.long()

    def _mask(self, batch: Batch) -> Tensor:
        longest = batch["completion_lengths"].max()
        return completion_mask({**batch, "completion_lengths": longest.expand_as(batch["completion_lengths"])})

    def _responses(self, batch: Batch, mask: Tensor, mode: str) -> Responses:
        responses = super()._responses(batch, mask, mode)
        responses.trained = completion_mask(batch) & (batch["input_ids"][:, 1:] != self._end)
        return responses

    @property
    def _end(self) -> int:
        end: int = self.pair.tokenizer.eos_token_id
        return end if end is not None else min(self.stop_ids, default=0)
