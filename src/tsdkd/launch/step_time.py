"""Estimates the compute time of a step on A100s from the models' configurations. Not checked on A100s."""

import math

from .model_size import ModelSize
from .vllm_memory import split_engine_memory
from .workload import Workload

# What an A100 computes and reads in practice: about 40 % and 60 % of its 312 TFLOP/s and 2 TB/s.
GPU_FLOPS, GPU_BANDWIDTH = 125e12, 1.2e12
# The CUDA graph of a transformers model's decoding step: on an H200, 1,700 small kernels take 5.4 ms for 28 layers.
_KERNELS_PER_LAYER, _KERNEL_SECONDS = 61, 3.2e-6
# What vLLM's scheduler and sampler take in Qwen's speed benchmark of Qwen2.5 on an A100 (in all, 3.2 ms per token at
# 0.5B and 5.5 ms at 1.5B).
_VLLM_SECONDS_PER_TOKEN = 2.5e-3
# What the fused head's kernels move, in bytes per (token, vocabulary id), counted by benchmarks/device_counts.py. Its
# matrix products are counted with the models' layers.
_HEAD_BYTES_PER_LOGIT = 32


def estimate_step_seconds(student: ModelSize, teacher: ModelSize | None, workload: Workload) -> dict[str, float]:
    """Estimate the seconds of each part of a step, for full-length completions, without communication between GPUs."""
    rows = workload.samples_per_step * workload.sequence_length
    passes = 8 if workload.uses_gradient_checkpointing else 6
    matmul_seconds = passes * student.num_active_parameters * rows / GPU_FLOPS
    return {
        "rollout": _estimate_rollout_seconds(student, teacher, workload) / max(1, workload.steps_per_rollout),
        "teacher": 2 * teacher.num_active_parameters * rows / GPU_FLOPS if teacher else 0.0,
        "student": matmul_seconds,
        "head": rows * student.vocab_size * _HEAD_BYTES_PER_LOGIT / GPU_BANDWIDTH,
    }


def _estimate_rollout_seconds(student: ModelSize, teacher: ModelSize | None, workload: Workload) -> float:
    """Estimate the seconds of a rollout, which takes as long as its longest completion."""
    if not workload.rollout_size:
        return 0.0
    models = [student, teacher] if workload.needs_teacher_in_rollout and teacher else [student]
    engine, concurrent_sequences = workload.engine, workload.rollout_size
    if engine is not None:
        fits = workload.rollout_size
        if engine.memory_bytes:
            engine_memory = split_engine_memory(student, engine, workload.sequence_length)
            fits = int(engine_memory.kv_cache // engine_memory.kv_cache_per_sequence)
        concurrent_sequences = max(1, min(workload.rollout_size, fits, engine.max_num_seqs))
    token = sum(decode_seconds(m, workload, concurrent_sequences, workload.sequence_length / 2) for m in models)
    return token * workload.sequence_length * math.ceil(workload.rollout_size / concurrent_sequences)


def decode_seconds(model: ModelSize, workload: Workload, sequences: int, context: float) -> float:
    """Estimate the seconds in which a GPU decodes one token of each of `sequences`, after `context` tokens each."""
    cache = sequences * context * model.num_hidden_layers * model.kv_cache_numbers * workload.compute_itemsize
    reads = (model.num_parameters * workload.compute_itemsize + cache) / GPU_BANDWIDTH
    matmul_seconds = 2 * model.num_active_parameters * sequences / GPU_FLOPS
    overhead = _VLLM_SECONDS_PER_TOKEN
    if workload.engine is None:
        overhead = model.num_hidden_layers * _KERNELS_PER_LAYER * _KERNEL_SECONDS
    return max(reads, matmul_seconds) + overhead
