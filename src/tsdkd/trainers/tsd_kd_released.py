"""`TSDKDReleasedTrainer`: micro-batches laid out as TSD-KD's public code does."""

from torch import Tensor, nn

from ..data import completion_mask
from ..objectives import Responses
from ..trainer import Batch, TokenSelectiveTrainer


class TSDKDReleasedTrainer(TokenSelectiveTrainer):
    """Asks about every row's completion and its padding, up to the longest. See `TokenSelectiveTrainer`."""

    def _annotate(self, model: nn.Module, batch: Batch, step: int, mode: str) -> None:
        """Pad until every row has room for the longest completion; the padding is end-of-sequence."""
        width = int(batch["prompt_lengths"].max() + batch["completion_lengths"].max())
        missing = width - batch["input_ids"].shape[1]
        for name in ("input_ids", "attention_mask"):
            batch[name] = nn.functional.pad(batch[name], (0, missing))
        batch["input_ids"][batch["attention_mask"] == 0] = self._end

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
