"""Derives sizes and precisions of a training step on one GPU from a configuration."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from ..config.base import TokenSelectiveConfig
from ..data.packing import MAX_STRETCH

GIB = 2**30
_DENSE_BYTES_PER_LOGIT = 46  # bytes per (token, vocabulary id) without the fused head, bfloat16 (docs/performance.md)
_PROMPT_TOKENS = 256  # assumed prompt length if only completions have an effective limit
_LARGE_GPU_GIB = 70  # from here on vLLM samples 1024 sequences at once, otherwise 256 (also on an 80 GiB A100)


@dataclass
class VllmMemoryConfig:
    """Settings of the vLLM engine that determine its memory.

    Attributes:
        memory_bytes: memory share on each training GPU; 0 for a server on other GPUs.
        enable_sleep_mode: whether the engine frees its memory while the student trains.
        tensor_parallel_size: number of processes that share one engine.
        max_model_len: context length, tokens.
        max_num_seqs: maximum number of sequences sampled at once.
    """

    memory_bytes: float
    enable_sleep_mode: bool = False
    tensor_parallel_size: int = 1
    max_model_len: int = 0
    max_num_seqs: int = 256


@dataclass
class Workload:
    """Sizes and precisions that determine a training step's memory and time on one GPU.

    Attributes:
        samples_per_step: completions per step.
        micro_batch_tokens: positions per micro-batch, padding included.
        micro_batches_per_step: micro-batches per step.
        rollout_size: completions per rollout; 0 if nothing is generated.
        steps_per_rollout: optimizer steps per rollout.
        sequence_length: length of prompt plus completion, tokens.
        row_width: positions per row of a forward pass, which may hold several sequences.
        weight_itemsize: bytes per parameter of the student outside DeepSpeed.
        compute_itemsize: bytes per number in matrix products.
        teacher_bytes_per_parameter: bytes per parameter of the teacher.
        uses_gradient_checkpointing: whether the backward pass recomputes the layers.
        uses_eager_attention: whether attention stores its full matrices.
        head_gib: GiB of one chunk of the fused head, or of the full logits.
        needs_teacher_in_rollout: whether the teacher is needed to sample each token.
        engine: the vLLM engine; None if transformers generates the completions.
    """

    samples_per_step: int
    micro_batch_tokens: int
    micro_batches_per_step: int
    rollout_size: int
    steps_per_rollout: int
    sequence_length: int
    row_width: int
    weight_itemsize: int
    compute_itemsize: int
    teacher_bytes_per_parameter: int
    uses_gradient_checkpointing: bool
    uses_eager_attention: bool
    head_gib: float
    needs_teacher_in_rollout: bool
    engine: VllmMemoryConfig | None


def build_workload(
    cls: type[TokenSelectiveConfig],
    values: dict[str, Any],
    models: Sequence[PretrainedConfig],
    gpus: int,
    gpu_gib: float,
) -> Workload:
    """Derive the workload of one GPU from a method and its configuration.

    Args:
        cls: the method's configuration class.
        values: all values of the configuration, by name.
        models: the configurations of student and teacher.
        gpus: number of GPUs.
        gpu_gib: memory of one GPU, GiB.
    """
    samples_per_step = values["per_device_train_batch_size"] * values["gradient_accumulation_steps"]
    rollout = max(samples_per_step, -(-values.get("rollout_batch_size", 0) * values["num_generations"] // gpus))
    steps_per_rollout = rollout / samples_per_step * values.get("num_iterations", 1)
    generates = values["lmbda"] > 0 or cls.always_needs_completions
    half = values["fp16"] or values["bf16"] is not False  # TRL's default is bf16
    weight_itemsize = _itemsize(values["dtype"], values["model_init_kwargs"], models[0])
    longest = _max_sequence_length(values, models)
    tokens = min(longest, values["max_completion_length"] + _PROMPT_TOKENS)
    step_tokens = samples_per_step * tokens
    budget = values["max_tokens_per_micro_batch"] or values["per_device_train_batch_size"] * tokens
    micro_batch_tokens = min(max(budget, tokens), step_tokens)
    packs = values["padding_free"] is not False and "padding_free" not in cls.unsupported_options
    logits = micro_batch_tokens * models[0].get_text_config().vocab_size
    chunk_gib = values["head_chunk_gib"] or 1.0
    return Workload(
        samples_per_step=samples_per_step,
        micro_batch_tokens=micro_batch_tokens,
        micro_batches_per_step=-(-step_tokens // micro_batch_tokens),
        rollout_size=rollout if generates else 0,
        steps_per_rollout=int(steps_per_rollout),
        sequence_length=tokens,
        row_width=min(int(tokens * MAX_STRETCH), micro_batch_tokens) if packs else tokens,
        weight_itemsize=weight_itemsize,
        compute_itemsize=2 if half else weight_itemsize,
        teacher_bytes_per_parameter=_itemsize("auto", values["teacher_model_init_kwargs"], models[1]),
        uses_gradient_checkpointing=bool(values["gradient_checkpointing"]),
        uses_eager_attention=values["attn_implementation"] == "eager",
        head_gib=chunk_gib if values["fused_head"] else logits * _DENSE_BYTES_PER_LOGIT / GIB,
        needs_teacher_in_rollout=cls.teacher_samples,
        engine=_build_engine_config(values, longest, gpu_gib) if values["use_vllm"] else None,
    )


def _build_engine_config(values: dict[str, Any], longest: int, gpu_gib: float) -> VllmMemoryConfig:
    slots = 1024 if gpu_gib >= _LARGE_GPU_GIB else 256
    if values["vllm_mode"] == "server":
        return VllmMemoryConfig(memory_bytes=0.0, max_num_seqs=slots)
    return VllmMemoryConfig(
        memory_bytes=values["vllm_gpu_memory_utilization"] * gpu_gib * GIB,
        enable_sleep_mode=values["vllm_enable_sleep_mode"],
        tensor_parallel_size=values["vllm_tensor_parallel_size"],
        max_model_len=longest,
        max_num_seqs=slots,
    )


def _max_sequence_length(values: dict[str, Any], models: Sequence[PretrainedConfig]) -> int:
    """Maximum length of prompt plus completion, tokens; corresponds to `data.max_sequence_length`."""
    contexts = [getattr(m.get_text_config(), "max_position_embeddings", None) for m in models]
    limits = [values["max_length"], values["vllm_max_model_length"] if values["use_vllm"] else None, *contexts]
    return min([limit for limit in limits if limit], default=2**31)


def _itemsize(dtype: str, init_kwargs: dict[str, Any] | None, config: PretrainedConfig) -> int:
    """Bytes per number of a model loaded in `dtype`, or in its checkpoint's dtype."""
    name = (init_kwargs or {}).get("dtype", dtype)
    given = config.dtype or torch.float32 if name == "auto" else name
    return torch.empty(0, dtype=getattr(torch, given) if isinstance(given, str) else given).element_size()
