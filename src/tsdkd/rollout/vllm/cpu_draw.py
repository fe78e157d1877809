"""Seeded sampling in a vLLM engine on a CPU.

For seeded requests, vLLM draws a random number for every token of the vocabulary, one request at a time. On a CPU,
this takes longer than the model. Here, a logits processor draws each token with one random number and sets its logit
to infinity, so that vLLM's greedy sampling chooses it.
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
_logps: dict[str, dict[int, float]] = {}  # request_id -> position -> log-probability, for active requests


def seeded_sampling_params(
    request_id: str, seed: int, limit: int, sampling: SamplingConfig, **others: Any
) -> SamplingParams:
    """Return the parameters of a request whose tokens are drawn here. `pop_logps` returns their log-probabilities."""
    settings = {"request_id": request_id, "seed": seed, "sampling": sampling}
    ends = {"max_tokens": limit, "ignore_eos": True, "stop_token_ids": sorted(sampling.stop_token_ids)}
    return SamplingParams(temperature=0.0, extra_args={_EXTRA_ARG: settings}, **ends, **others)


def pop_logps(request_id: str, count: int) -> list[float] | None:
    """Return and remove the log-probabilities of a finished request; None if the engine runs in another process."""
    found = _logps.pop(request_id, None)
    return None if found is None else [found[position] for position in range(count)]


@dataclass
class _RequestState:
    request_id: str
    uniform: list[float]
    output_ids: list[int]  # vLLM's list, which grows with each token


class SeededLogitsProcessor(LogitsProcessor):
    """Draws the tokens of requests made by `seeded_sampling_params`; does not affect other requests."""

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
        self.sampling = settings["sampling"]  # the same for all requests
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
