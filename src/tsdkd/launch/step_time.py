"""For how long a step computes on A100s, from the models' configurations alone; nothing of it was measured by us."""

import math

from .memory import ModelSize, Workload, split_engine_memory

# What an A100 computes and reads in practice: about 40 % and 60 % of its 312 TFLOP/s and 2 TB/s.
_FLOPS, _BYTES = 125e12, 1.2e12
# A token that a transformers model decodes waits for its host to launch kernels: about 50 a layer (1,580 counted for
# 28 layers). Qwen's own speed benchmark of Qwen2.5 on an A100 gives 0.9 ms a layer at 0.5B and 1.5B alike.
_KERNELS, _LAUNCH = 50, 18e-6
# vLLM replays a graph instead; its scheduler and sampler take the rest of what the same benchmark gives (0.5B 3.2 ms,
# 1.5B 5.5 ms a token).
_ENGINE_TOKEN = 2.5e-3
# The fused head's elementwise passes, bytes for a (token, vocabulary word).
_HEAD_BYTES = 400


def estimate_step_seconds(student: ModelSize, teacher: ModelSize | None, work: Workload) -> dict[str, float]:
    """Seconds of a step, by what takes them, for completions of full length, without communication between GPUs."""
    rows = work.batch * work.accumulated * work.tokens
    passes = 8 if work.checkpointing else 6
    products = passes * student.parameters * rows / _FLOPS
    return {
        "rollout": _estimate_rollout_seconds(student, teacher, work) / max(1, work.served),
        "teacher": 2 * teacher.parameters * rows / _FLOPS if teacher else 0.0,
        "student": products,
        "head": rows * student.vocab * _HEAD_BYTES / _BYTES,
    }


def _estimate_rollout_seconds(student: ModelSize, teacher: ModelSize | None, work: Workload) -> float:
    """Of a whole rollout, which is as long as its longest completion."""
    if not work.rollout:
        return 0.0
    models = [student, teacher] if work.with_teacher and teacher else [student]
    engine, at_once = work.engine, work.rollout
    if engine is not None:
        fits = work.rollout
        if engine.share:
            room = split_engine_memory(student, engine, work.tokens)
            fits = int(room.cache // room.sequence)
        at_once = max(1, min(work.rollout, fits, engine.slots))
    token = 0.0
    for model in models:
        cache = at_once * work.tokens / 2 * model.layers * model.cached * work.compute_bytes
        reads = (model.parameters * work.compute_bytes + cache) / _BYTES
        products = 2 * model.parameters * at_once / _FLOPS
        launches = model.layers * _KERNELS * _LAUNCH
        token += max(reads, products, launches) if engine is None else _ENGINE_TOKEN + max(reads, products)
    return token * work.tokens * math.ceil(work.rollout / at_once)
