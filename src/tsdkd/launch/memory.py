"""Estimates the memory of a run on each GPU from the models' configurations alone.

Buffer sizes are those of deepspeed 0.19, torch 2.13 and trl 1.16. `benchmarks/plan.py` verifies them as far as a CPU
allows.
"""

from typing import NamedTuple

from .model_size import ModelSize
from .vllm_memory import SAMPLING_BYTES_PER_LOGIT, SLEEPING_ENGINE_BYTES
from .workload import GIB, VllmMemoryConfig, Workload

MEMORY_COMPONENTS = (
    "student",
    "optimizer",
    "gradients",
    "buckets",
    "activations",
    "head",
    "rollout",
    "teacher",
    "vLLM",
)
"""Components of the memory: the student's weights, gathered or sharded; AdamW's state, with ZeRO's float32 weights;
gradients; communication buffers; activations, including autocast's copies of the weights; a chunk of logits and the
output layer's gradient; rollouts without an engine; the teacher; a colocated engine."""

# Numbers of elements, not bytes. accelerate does not set these in DeepSpeed's configuration, so DeepSpeed's defaults
# apply, not the smaller values that "auto" in a DeepSpeed configuration file would give.
_REDUCE_BUCKET_SIZE = 500_000_000  # reduce_bucket_size: fully allocated, even for a small model
_MAX_LIVE_PARAMETERS = 1_000_000_000  # stage3_max_live_parameters: gathered at the same time


class Sharding(NamedTuple):
    """How the student is distributed over the GPUs.

    Attributes:
        zero_stage: ZeRO stage; 0 for DDP or a single process.
        is_offloaded: whether weights and optimizer state are in host memory.
        is_single_process: whether there is one process regardless of the number of GPUs.
    """

    zero_stage: int
    is_offloaded: bool = False
    is_single_process: bool = False


def estimate_memory(
    student: ModelSize,
    teacher: ModelSize | None,
    workload: Workload,
    launch: Sharding,
    teacher_placement: str,
    gpus: int,
) -> dict[str, float]:
    """Estimate GiB per GPU for each of `MEMORY_COMPONENTS`. `teacher` is None if it is not loaded.

    Some components do not exist at the same time. Only those of the phase with the highest memory are counted: a
    backward pass, a step of ZeRO's optimizer, or a rollout.
    """
    always = {
        **_student_bytes(student, workload, launch, gpus),
        "teacher": _teacher_bytes(teacher, workload, teacher_placement, gpus),
    }
    if teacher_placement == "server":
        teacher = None  # its layers and their activations are elsewhere
    engine = workload.engine or VllmMemoryConfig(memory_bytes=0.0)
    idle = min(engine.memory_bytes, SLEEPING_ENGINE_BYTES) if engine.enable_sleep_mode else engine.memory_bytes
    phases = (
        {**_backward_bytes(student, teacher, workload, launch, gpus), "vLLM": idle},
        {**_optimizer_step_bytes(student, workload, launch, gpus), "vLLM": idle},
        {"rollout": _rollout_bytes(student, teacher, workload, launch), "vLLM": engine.memory_bytes},
    )
    parts = always | max(phases, key=lambda phase: sum(phase.values()))
    return {name: parts.get(name, 0.0) / GIB for name in MEMORY_COMPONENTS}


def _student_bytes(student: ModelSize, workload: Workload, launch: Sharding, gpus: int) -> dict[str, float]:
    bytes_per_weight, bytes_per_trained_weight = _bytes_per_weight(student, workload, launch)
    weights: float = student.num_parameters * bytes_per_weight + student.adapter_parameters * bytes_per_trained_weight
    if launch.zero_stage == 3:
        gathered = min(student.num_parameters, _MAX_LIVE_PARAMETERS + student.embedding_parameters) * bytes_per_weight
        weights = gathered + (0 if launch.is_offloaded else weights / gpus)
    # ZeRO keeps its own float32 weights; without ZeRO, AdamW's two states have the weights' precision
    state = student.num_trainable_parameters * (12 / gpus if launch.zero_stage else 2 * bytes_per_trained_weight)
    return {"student": weights, "optimizer": 0.0 if launch.is_offloaded else state}


def _teacher_bytes(teacher: ModelSize | None, workload: Workload, placement: str, gpus: int) -> float:
    if teacher is None:
        return 0.0
    if placement == "replica":
        return teacher.num_parameters * workload.teacher_bytes_per_parameter
    if placement == "server":  # the output layer alone
        return teacher.embedding_parameters * workload.teacher_bytes_per_parameter
    gathered = min(teacher.num_parameters, _MAX_LIVE_PARAMETERS + teacher.embedding_parameters)
    shard = teacher.num_parameters / gpus if placement == "zero3" else 0
    return (gathered + shard) * workload.teacher_bytes_per_parameter


def _bytes_per_weight(student: ModelSize, workload: Workload, launch: Sharding) -> tuple[int, int]:
    """Bytes per weight and per trained weight. DeepSpeed casts all weights; PEFT keeps adapters in float32."""
    bytes_per_weight = workload.compute_itemsize if launch.zero_stage else workload.weight_itemsize
    return bytes_per_weight, bytes_per_weight if launch.zero_stage or not student.adapter_parameters else 4


def _gradient_bytes(student: ModelSize, workload: Workload, launch: Sharding, gpus: int) -> tuple[float, float]:
    """Bytes of the gradients and of their communication buffers."""
    _, bytes_per_weight = _bytes_per_weight(student, workload, launch)
    whole = student.num_trainable_parameters * bytes_per_weight
    if launch.zero_stage == 0:
        # DDP's buckets are a second copy. When each term's gradients are logged, the step's own do not exist yet.
        return whole, whole if gpus > 1 else 0
    bucket, copy = (
        _REDUCE_BUCKET_SIZE * bytes_per_weight,
        min(_REDUCE_BUCKET_SIZE, student.num_trainable_parameters) * bytes_per_weight,
    )  # the copy is the communication buffer
    # parameters that lie in two partitions are counted fully in each
    partition = whole / gpus + min(student.embedding_parameters, student.num_trainable_parameters) * bytes_per_weight
    if launch.zero_stage == 1 and workload.micro_batches_per_step > 1:
        # not partitioned until the last micro-batch, whose backward pass moves them through the bucket
        return whole, bucket + max(0.0, copy + partition - whole)
    if launch.zero_stage in (1, 2):
        # from the second micro-batch on, ZeRO-2 has the sum and the next gradients
        return partition * (min(2, workload.micro_batches_per_step) if launch.zero_stage == 2 else 1), bucket + copy
    return 0.0 if launch.is_offloaded else whole / gpus, bucket + copy


def _backward_bytes(
    student: ModelSize, teacher: ModelSize | None, workload: Workload, launch: Sharding, gpus: int
) -> dict[str, float]:
    bytes_per_weight, bytes_per_trained_weight = _bytes_per_weight(student, workload, launch)
    gradients, buckets = _gradient_bytes(student, workload, launch, gpus)
    rows = workload.micro_batch_tokens
    residual_bytes = bytes_per_weight
    if student.adapter_parameters and not launch.zero_stage:
        residual_bytes = max(bytes_per_weight, workload.compute_itemsize)
    one_layer = rows * _activation_bytes(student, workload, residual_bytes)
    if workload.uses_gradient_checkpointing:
        activations = rows * student.num_hidden_layers * student.hidden_size * residual_bytes + one_layer
    else:
        activations = one_layer * student.num_hidden_layers
    # the teacher's forward pass comes before the student's
    teacher_activations = (
        rows * _activation_bytes(teacher, workload, workload.teacher_bytes_per_parameter) if teacher else 0.0
    )
    head = workload.head_gib * GIB
    if not student.adapter_parameters and (
        student.has_tied_embeddings or workload.micro_batches_per_step > 1 or bytes_per_trained_weight < 4
    ):
        head += 4 * student.embedding_parameters  # the output layer's gradient before it is added to the sum
    copies = _autocast_copy_bytes(student, workload, launch)
    return {
        "gradients": gradients,
        "buckets": buckets,
        "activations": max(activations + copies, teacher_activations),
        "head": head,
    }


def _activation_bytes(model: ModelSize, workload: Workload, residual_bytes: int) -> float:
    """Bytes per token that a decoder layer stores for its backward pass."""
    kept: float = model.residual_numbers * residual_bytes + model.activation_numbers * workload.compute_itemsize
    if residual_bytes > workload.compute_itemsize:
        # outputs of the norms, cast for the matrix products
        kept += model.residual_numbers / 2 * workload.compute_itemsize
    if workload.uses_eager_attention:  # scores, capped scores, float32 probabilities and their cast, masks
        kept += model.num_attention_heads * workload.row_width * (3 * workload.compute_itemsize + 8)
    return kept


def _autocast_copy_bytes(student: ModelSize, workload: Workload, launch: Sharding) -> float:
    """Bytes of autocast's half-precision copies: of all trained weights, and of one layer's frozen weights."""
    if launch.zero_stage or workload.weight_itemsize <= workload.compute_itemsize:
        return 0.0
    frozen = student.parameters_per_layer + student.embedding_parameters  # one layer and the output layer
    looked_up = 0 if student.has_tied_embeddings else student.embedding_parameters
    return workload.compute_itemsize * (frozen if student.adapter_parameters else student.num_parameters - looked_up)


def _optimizer_step_bytes(student: ModelSize, workload: Workload, launch: Sharding, gpus: int) -> dict[str, float]:
    """Bytes during an optimizer step: ZeRO-1 and 2 create additional float32 gradients of their partition."""
    gradients, _ = _gradient_bytes(student, workload, launch, gpus)
    wide = (
        student.num_trainable_parameters / gpus * (4 + workload.compute_itemsize)
        if launch.zero_stage in (1, 2)
        else 0.0
    )
    return {"gradients": gradients + wide}


def _rollout_bytes(student: ModelSize, teacher: ModelSize | None, workload: Workload, launch: Sharding) -> float:
    """Bytes of a rollout by the student itself.

    They consist of the key-value cache, whose layers are copied as they grow, the logits to sample from, gathered
    weights if they are sharded, and autocast's copies.
    """
    if workload.engine is not None or not workload.rollout_size:
        return 0.0
    models = [(student, workload.compute_itemsize)]
    if workload.needs_teacher_in_rollout and teacher:
        models.append((teacher, workload.teacher_bytes_per_parameter))
    kv_cache = (
        sum(
            (model.num_hidden_layers + 1) * model.kv_cache_numbers * bytes_per_weight
            for model, bytes_per_weight in models
        )
        * workload.sequence_length
    )
    logits = SAMPLING_BYTES_PER_LOGIT * student.vocab_size * len(models)
    whole = student.num_parameters * workload.compute_itemsize if launch.zero_stage == 3 else 0
    return workload.rollout_size * (kv_cache + logits) + whole + _autocast_copy_bytes(student, workload, launch)
