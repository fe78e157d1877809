"""Starts a vLLM engine in this process, sends it requests and converts its errors."""

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ...config.base import TokenSelectiveConfig
from ...errors import EngineError, first_line
from ..base import Completion, SamplingConfig

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # run the engine in this process
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from vllm import LLM, SamplingParams
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind

from .cpu_draw import SeededLogitsProcessor, pop_logps, seeded_sampling_params

_MAX_LOGIT_BIASES = 1024  # vLLM's limit per request
_draw_ids = itertools.count()


def extra_engine_args() -> dict[str, Any]:
    """Return additional engine arguments."""
    return {"logits_processors": [SeededLogitsProcessor]} if current_platform.is_cpu() else {}


def start_engine(name: str, revision: str | None, args: TokenSelectiveConfig, max_model_length: int) -> LLM:
    """Start an engine that loads its own model. Raises `EngineError`."""
    with wrap_engine_errors("vLLM can't start", args):
        return LLM(
            model=name,
            revision=revision,
            tensor_parallel_size=args.vllm_tensor_parallel_size,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            max_model_len=max_model_length,
            model_impl=args.vllm_model_impl,
            trust_remote_code=args.trust_remote_code,
            logprobs_mode="processed_logprobs",
            **extra_engine_args(),
        )


def iter_completions(
    llm: LLM, requests: Sequence[dict[str, Any]], sampling: SamplingConfig
) -> Iterator[tuple[int, Completion]]:
    """Yield the position and completion of each request, in order of completion.

    All requests are submitted at once, so that the others keep the engine busy while the longest ones finish.

    Args:
        llm: an engine created with `extra_engine_args()`.
        requests: dictionaries with `prompt` (token ids), `max_tokens` and `seed`.
        sampling: sampling parameters.
    """
    engine, draw_ids = llm.llm_engine, [f"{next(_draw_ids)}" for _ in requests]
    with wrap_engine_errors("vLLM failed during a rollout"):
        for position, (request, request_id) in enumerate(zip(requests, draw_ids, strict=True)):
            prompt = {"prompt_token_ids": request["prompt"]}
            engine.add_request(str(position), prompt, _sampling_params(request, request_id, llm, sampling))
        while engine.has_unfinished_requests():
            for finished in engine.step():
                position, (output,) = int(finished.request_id), finished.outputs
                ids = list(output.token_ids)
                if output.logprobs is None:
                    logps = pop_logps(draw_ids[position], len(ids))
                else:
                    logps = [at[i].logprob for i, at in zip(ids, output.logprobs, strict=True)]
                yield position, Completion(ids, output.finish_reason == "stop", logps)


def _sampling_params(request: dict[str, Any], request_id: str, llm: LLM, sampling: SamplingConfig) -> SamplingParams:
    common: dict[str, Any] = {"detokenize": False, "output_kind": RequestOutputKind.FINAL_ONLY}
    if current_platform.is_cpu():
        return seeded_sampling_params(request_id, request["seed"], request["max_tokens"], sampling, **common)
    parameters = shared_sampling_params(sampling, llm.model_config.get_vocab_size())
    own = {"max_tokens": request["max_tokens"], "seed": request["seed"]}
    return SamplingParams(logprobs=0, **own, **parameters, **common)


def shared_sampling_params(sampling: SamplingConfig, vocab_size: int) -> dict[str, Any]:
    """Return vLLM's sampling parameters shared by all requests. `vocab_size` is the model's number of logits."""
    parameters = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,  # otherwise a server uses the checkpoint's generation config
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "ignore_eos": True,  # the checkpoint's end token; the pair may have more stop tokens
        "stop_token_ids": sorted(sampling.stop_token_ids),
    }
    surplus = range(sampling.vocab_size, vocab_size)
    if len(surplus) > _MAX_LOGIT_BIASES:
        raise EngineError(
            f"the model has {vocab_size} logits, {len(surplus)} more than the shared vocabulary; vLLM can exclude at "
            f"most {_MAX_LOGIT_BIASES}; set use_vllm: false"
        )
    if surplus:
        parameters["logit_bias"] = dict.fromkeys(surplus, -100.0)
    return parameters


@contextmanager
def wrap_engine_errors(what: str, args: TokenSelectiveConfig | None = None) -> Iterator[None]:
    """Convert an exception of a library into a one-line `EngineError`."""
    try:
        yield
    except EngineError:
        raise
    except Exception as error:  # vLLM, torch, requests and safetensors have no common exception
        line = first_line(error)
        hint = ""
        if args is not None and "memory" in line:
            hint = f" (vllm_gpu_memory_utilization is {args.vllm_gpu_memory_utilization})"
        raise EngineError(f"{what}{hint}: {line}") from error
