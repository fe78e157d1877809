"""Seeded sampling in a vLLM engine on a CPU.

vLLM seeds a request by drawing a random number for every word of the vocabulary, one request at a time, which on a CPU
takes longer than the model. Here a logits processor draws each request's token from one number and leaves vLLM the
choice of the largest logit.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, process_dict_updates

from ..base import SamplingConfig
from ..categorical import sample_tokens

_EXTRA_ARG = "tsdkd_draw"
_logps: dict[str, dict[int, float]] = {}  # request_id -> position -> log-probability, of the requests under way


def seeded_sampling_params(
    request_id: str, seed: int, limit: int, sampling: SamplingConfig, **others: Any
) -> SamplingParams:
    """Parameters of a request whose tokens are drawn here; `pop_logps(request_id)` gives their log-probabilities."""
    settings = {"request_id": request_id, "seed": seed, "sampling": sampling}
    ends = {"max_tokens": limit, "ignore_eos": True, "stop_token_ids": sorted(sampling.stop_token_ids)}
    return SamplingParams(temperature=0.0, extra_args={_EXTRA_ARG: settings}, **ends, **others)


def pop_logps(request_id: str, count: int) -> list[float] | None:
    """The log-probabilities of a finished request's tokens; None where the engine runs in another process."""
    found = _logps.pop(request_id, None)
    return None if found is None else [found[position] for position in range(count)]


@dataclass
class _RequestState:
    request_id: str
    uniform: list[float]
    output_ids: list[int]  # vLLM's own list, which grows


class SeededLogitsProcessor(LogitsProcessor):
    """Draws for requests of `seeded_sampling_params`, and leaves others alone."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.requests: dict[int, _RequestState] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self.requests, batch_update, self._make_state)

    def _make_state(
        self, params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]
    ) -> _RequestState | None:
        settings = (params.extra_args or {}).get(_EXTRA_ARG)
        if settings is None:
            return None
        self.sampling = settings["sampling"]  # the same for a whole batch
        generator = torch.Generator().manual_seed(settings["seed"])
        uniform = torch.rand(params.max_tokens, dtype=torch.float64, generator=generator).tolist()
        _logps.setdefault(settings["request_id"], {})
        return _RequestState(settings["request_id"], uniform, output_ids)

    def apply(self, logits: Tensor) -> Tensor:
        if not self.requests:
            return logits
        places = sorted(self.requests)
        requests = [self.requests[place] for place in places]
        positions = [len(request.output_ids) for request in requests]
        uniform = [request.uniform[position] for request, position in zip(requests, positions, strict=True)]
        active_logits = logits if len(places) == len(logits) else logits[places]
        active_logits = active_logits[:, : self.sampling.vocab_size]
        if self.sampling.temperature != 1.0:
            active_logits = active_logits / self.sampling.temperature
        ids, logps = sample_tokens(active_logits, torch.tensor(uniform, dtype=torch.float64), self.sampling.top_p)
        for request, position, logp in zip(requests, positions, logps.tolist(), strict=True):
            _logps[request.request_id][position] = logp
        logits[places, ids] = torch.inf
        return logits
