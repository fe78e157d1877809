"""For how long a step computes on A100s, from the models' configurations alone; nothing of it was measured by us."""

import math

from .memory import ModelSize, Workload, split_engine_memory

# What an A100 computes and reads in practice: about 40 % and 60 % of its 312 TFLOP/s and 2 TB/s.
_GPU_FLOPS, _GPU_BANDWIDTH = 125e12, 1.2e12
# A token that a transformers model decodes waits for its host to launch kernels: about 50 a layer (1,580 counted for
# 28 layers). Qwen's own speed benchmark of Qwen2.5 on an A100 gives 0.9 ms a layer at 0.5B and 1.5B alike.
_KERNELS_PER_LAYER, _KERNEL_LAUNCH_SECONDS = 50, 18e-6
# vLLM replays a graph instead; its scheduler and sampler take the rest of what the same benchmark gives (0.5B 3.2 ms,
# 1.5B 5.5 ms a token).
_VLLM_SECONDS_PER_TOKEN = 2.5e-3
# The fused head's elementwise passes, bytes for a (token, vocabulary word).
_HEAD_BYTES_PER_LOGIT = 400


def estimate_step_seconds(student: ModelSize, teacher: ModelSize | None, work: Workload) -> dict[str, float]:
    """Seconds of a step, by what takes them, for completions of full length, without communication between GPUs."""
    rows = work.micro_batch_size * work.gradient_accumulation_steps * work.sequence_length
    passes = 8 if work.uses_gradient_checkpointing else 6
    products = passes * student.num_parameters * rows / _GPU_FLOPS
    return {
        "rollout": _estimate_rollout_seconds(student, teacher, work) / max(1, work.steps_per_rollout),
        "teacher": 2 * teacher.num_parameters * rows / _GPU_FLOPS if teacher else 0.0,
        "student": products,
        "head": rows * student.vocab_size * _HEAD_BYTES_PER_LOGIT / _GPU_BANDWIDTH,
    }


def _estimate_rollout_seconds(student: ModelSize, teacher: ModelSize | None, work: Workload) -> float:
    """Of a whole rollout, which is as long as its longest completion."""
    if not work.rollout_size:
        return 0.0
    models = [student, teacher] if work.needs_teacher_in_rollout and teacher else [student]
    engine, at_once = work.engine, work.rollout_size
    if engine is not None:
        fits = work.rollout_size
        if engine.memory_bytes:
            room = split_engine_memory(student, engine, work.sequence_length)
            fits = int(room.kv_cache // room.kv_cache_per_sequence)
        at_once = max(1, min(work.rollout_size, fits, engine.max_num_seqs))
    token = 0.0
    for model in models:
        cache = (
            at_once * work.sequence_length / 2 * model.num_hidden_layers * model.kv_cache_numbers * work.compute_bytes
        )
        reads = (model.num_parameters * work.compute_bytes + cache) / _GPU_BANDWIDTH
        products = 2 * model.num_parameters * at_once / _GPU_FLOPS
        launches = model.num_hidden_layers * _KERNELS_PER_LAYER * _KERNEL_LAUNCH_SECONDS
        token += max(reads, products, launches) if engine is None else _VLLM_SECONDS_PER_TOKEN + max(reads, products)
    return token * work.sequence_length * math.ceil(work.rollout_size / at_once)
