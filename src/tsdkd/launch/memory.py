"""How much memory a run takes on each GPU, from the models' configurations alone.

Buffers are as deepspeed 0.19, torch 2.13 and trl 1.16 allocate them; `benchmarks/plan.py` measures what a CPU can.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

GIB = 2**30
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
"""What takes memory: the student's weights, gathered or sharded; AdamW's state, with ZeRO's float32 weights;
gradients; what they are exchanged in; what a backward pass needs, autocast's copies of the weights included; a chunk
of logits and the output layer's gradient; the student's own rollouts; the teacher; a colocated engine."""

# Numbers, not bytes. accelerate writes none of these into DeepSpeed's configuration, so that its own defaults hold,
# and not the smaller ones that "auto" in a file of DeepSpeed's would give.
_REDUCE_BUCKET_SIZE = 500_000_000  # reduce_bucket_size: allocated whole, however small the model is
_MAX_LIVE_PARAMETERS = 1_000_000_000  # stage3_max_live_parameters: gathered at once

_SAMPLING_BYTES_PER_LOGIT = (
    24  # bytes for a logit that is sampled from: in float32, its probability, both sorted, int64 ids, sums
)
# What a colocated engine takes of its share beside weights and cache, bytes.
_CUDA_GRAPH_BYTES = 1.5 * GIB  # CUDA graphs: 0.4 to 1.6 GiB in logs of vLLM 0.23 to 0.27
_SLEEPING_ENGINE_BYTES = 2.0 * GIB  # sleeping it gives back weights and cache, not graphs and what its libraries hold


@dataclass
class ModelSize:
    """A model's, in numbers (not bytes).

    Attributes:
        parameters: all of them; `num_trainable_parameters`: those that are trained.
        layer: parameters of a decoder layer.
        embedding: of the input embedding, `V x H`; `has_tied_embeddings`: it is the output layer too.
        vocab, layers, hidden, heads: of the decoder.
        residual: numbers a token that one layer keeps of the residual stream for its backward pass, in its precision.
        saved: numbers a token that it keeps besides, in that of matrix products.
        cached: numbers a token that one layer keeps in the key-value cache.
        context: the longest sequence, tokens.
    """

    num_parameters: int
    num_trainable_parameters: int
    parameters_per_layer: int
    embedding_parameters: int
    has_tied_embeddings: bool
    vocab_size: int
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    residual_numbers: int
    activation_numbers: int
    kv_cache_numbers: int
    max_position_embeddings: int

    @property
    def adapter_parameters(self) -> int:
        """Parameters that come beside the model's own."""
        return self.num_trainable_parameters if self.num_trainable_parameters < self.num_parameters else 0


class Sharding(NamedTuple):
    """How the student is spread over the GPUs.

    Attributes:
        stage: of ZeRO; 0: DDP, or one process.
        offloaded: weights and optimizer are in the memory of the host.
        alone: one process, however many GPUs there are.
    """

    zero_stage: int
    is_offloaded: bool = False
    is_single_process: bool = False


@dataclass
class VllmMemoryConfig:
    """A vLLM that rolls out.

    Attributes:
        share: of a GPU that trains, bytes; 0 for a server elsewhere.
        sleeps: it gives its memory back while the student trains.
        processes: that share one engine.
        longest: its context, tokens.
        slots: sequences that it may sample at once.
    """

    memory_bytes: float
    has_sleep_mode: bool = False
    tensor_parallel_size: int = 1
    max_model_len: int = 0
    max_num_seqs: int = 256


@dataclass
class Workload:
    """What a GPU does in a step.

    Attributes:
        batch: responses of a micro-batch; `gradient_accumulation_steps`: micro-batches of a step.
        rollout: responses of a rollout, 0 without any; `steps_per_rollout`: steps that it serves.
        tokens: of prompt and completion.
        weight_bytes: of a student's number outside DeepSpeed; `compute_bytes`: in matrix products.
        teacher_bytes: of a teacher's number.
        checkpointing: layers are computed again in the backward pass.
        eager: attention keeps its whole matrices.
        chunk_gib: of the fused head.
        with_teacher: the teacher takes part in every token of a rollout.
        engine: None: the student rolls out by itself.
    """

    micro_batch_size: int
    gradient_accumulation_steps: int
    rollout_size: int
    steps_per_rollout: int
    sequence_length: int
    weight_bytes: int
    compute_bytes: int
    teacher_bytes: int
    uses_gradient_checkpointing: bool
    uses_eager_attention: bool
    head_gib: float
    needs_teacher_in_rollout: bool
    engine: VllmMemoryConfig | None


def compute_model_size(config: PretrainedConfig, lora_r: int = 0) -> ModelSize:
    """Of a model of this configuration, without its weights; `lora_r`: rank of adapters on all its linear layers."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    num_parameters = sum(p.numel() for p in model.parameters())
    parameters_per_layer = model.base_model.layers[0]
    linear = [m for m in model.base_model.layers.modules() if isinstance(m, torch.nn.Linear)]
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    queries, keys = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
    # rotated queries and keys, values, attention's output, and of the feed-forward part gate, activation, up, and
    # their product
    activation_numbers = 2 * queries + 2 * keys + 4 * text.intermediate_size
    if hasattr(parameters_per_layer.self_attn, "q_norm"):
        activation_numbers += 2 * (queries + keys)
    return ModelSize(
        num_parameters=num_parameters,
        num_trainable_parameters=sum(lora_r * (m.in_features + m.out_features) for m in linear)
        if lora_r
        else num_parameters,
        parameters_per_layer=sum(p.numel() for p in parameters_per_layer.parameters()),
        embedding_parameters=model.get_input_embeddings().weight.numel(),
        has_tied_embeddings=bool(text.tie_word_embeddings),
        vocab_size=text.vocab_size,
        num_hidden_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        num_attention_heads=text.num_attention_heads,
        residual_numbers=4 * text.hidden_size,  # two norms, input and output
        activation_numbers=activation_numbers,
        kv_cache_numbers=2 * keys,
        max_position_embeddings=getattr(text, "max_position_embeddings", None) or 2**31,
    )


def estimate_memory(
    student: ModelSize,
    teacher: ModelSize | None,
    workload: Workload,
    launch: Sharding,
    teacher_placement: str,
    gpus: int,
) -> dict[str, float]:
    """GiB a GPU, for each of `MEMORY_COMPONENTS`; `teacher` None: it isn't loaded.

    Of parts that aren't there at once, those of the fullest moment count: a backward pass, a step of ZeRO's optimizer,
    or a rollout.
    """
    always = {
        **_student_bytes(student, workload, launch, gpus),
        "teacher": _teacher_bytes(teacher, workload, teacher_placement, gpus),
    }
    engine = workload.engine or VllmMemoryConfig(memory_bytes=0.0)
    idle = min(engine.memory_bytes, _SLEEPING_ENGINE_BYTES) if engine.has_sleep_mode else engine.memory_bytes
    phases = (
        {**_backward_bytes(student, teacher, workload, launch, gpus), "vLLM": idle},
        {**_optimizer_step_bytes(student, workload, launch, gpus), "vLLM": idle},
        {"rollout": _rollout_bytes(student, teacher, workload, launch), "vLLM": engine.memory_bytes},
    )
    parts = always | max(phases, key=lambda moment: sum(moment.values()))
    return {name: parts.get(name, 0.0) / GIB for name in MEMORY_COMPONENTS}


def _student_bytes(student: ModelSize, workload: Workload, launch: Sharding, gpus: int) -> dict[str, float]:
    bytes_per_weight, bytes_per_trained_weight = _bytes_per_weight(student, workload, launch)
    weights: float = student.num_parameters * bytes_per_weight + student.adapter_parameters * bytes_per_trained_weight
    if launch.zero_stage == 3:
        gathered = min(student.num_parameters, _MAX_LIVE_PARAMETERS + student.embedding_parameters) * bytes_per_weight
        weights = gathered + (0 if launch.is_offloaded else weights / gpus)
    # ZeRO keeps float32 weights of its own; without it AdamW's two states are in the weights' precision
    state = student.num_trainable_parameters * (12 / gpus if launch.zero_stage else 2 * bytes_per_trained_weight)
    return {"student": weights, "optimizer": 0.0 if launch.is_offloaded else state}


def _teacher_bytes(teacher: ModelSize | None, workload: Workload, placement: str, gpus: int) -> float:
    if teacher is None:
        return 0.0
    if placement == "replica":
        return teacher.num_parameters * workload.teacher_bytes
    gathered = min(teacher.num_parameters, _MAX_LIVE_PARAMETERS + teacher.embedding_parameters)
    shard = teacher.num_parameters / gpus if placement == "zero3" else 0
    return (gathered + shard) * workload.teacher_bytes


def _bytes_per_weight(student: ModelSize, workload: Workload, launch: Sharding) -> tuple[int, int]:
    """Of a weight, and of a trained one: DeepSpeed casts all, peft keeps adapters in float32."""
    bytes_per_weight = workload.compute_bytes if launch.zero_stage else workload.weight_bytes
    return bytes_per_weight, bytes_per_weight if launch.zero_stage or not student.adapter_parameters else 4


def _gradient_bytes(student: ModelSize, workload: Workload, launch: Sharding, gpus: int) -> tuple[float, float]:
    """Bytes of gradients and of what they are exchanged in."""
    _, bytes_per_weight = _bytes_per_weight(student, workload, launch)
    whole = student.num_trainable_parameters * bytes_per_weight
    if launch.zero_stage == 0:
        # DDP's buckets are a second copy. Where each term's gradients are logged, the step's own aren't there yet.
        return whole, whole if gpus > 1 else 0
    bucket, copy = (
        _REDUCE_BUCKET_SIZE * bytes_per_weight,
        min(_REDUCE_BUCKET_SIZE, student.num_trainable_parameters) * bytes_per_weight,
    )  # the copy is what is exchanged
    # parameters that lie in two partitions count whole
    partition = whole / gpus + min(student.embedding_parameters, student.num_trainable_parameters) * bytes_per_weight
    if launch.zero_stage == 1 and workload.gradient_accumulation_steps > 1:
        # whole until the last micro-batch, whose backward pass moves them through the bucket
        return whole, bucket + max(0.0, copy + partition - whole)
    if launch.zero_stage in (1, 2):
        # from the second micro-batch on ZeRO-2 has the sum and its next part
        return partition * (
            min(2, workload.gradient_accumulation_steps) if launch.zero_stage == 2 else 1
        ), bucket + copy
    return 0.0 if launch.is_offloaded else whole / gpus, bucket + copy


def _backward_bytes(
    student: ModelSize, teacher: ModelSize | None, workload: Workload, launch: Sharding, gpus: int
) -> dict[str, float]:
    bytes_per_weight, bytes_per_trained_weight = _bytes_per_weight(student, workload, launch)
    gradients, buckets = _gradient_bytes(student, workload, launch, gpus)
    rows = workload.micro_batch_size * workload.sequence_length
    residual_numbers = (
        bytes_per_weight
        if student.adapter_parameters == 0 or launch.zero_stage
        else max(bytes_per_weight, workload.compute_bytes)
    )
    parameters_per_layer = rows * _activation_bytes(student, workload, residual_numbers)
    num_hidden_layers = (
        rows * student.num_hidden_layers * student.hidden_size * residual_numbers + parameters_per_layer
        if workload.uses_gradient_checkpointing
        else parameters_per_layer * student.num_hidden_layers
    )
    teacher_activations = (
        rows * _activation_bytes(teacher, workload, workload.teacher_bytes) if teacher else 0.0
    )  # before the student's pass
    head = workload.head_gib * GIB
    if not student.adapter_parameters and (
        student.has_tied_embeddings or workload.gradient_accumulation_steps > 1 or bytes_per_trained_weight < 4
    ):
        head += 4 * student.embedding_parameters  # the output layer's gradient before it is added to what there is
    copies = _autocast_copy_bytes(student, workload, launch)
    return {
        "gradients": gradients,
        "buckets": buckets,
        "activations": max(num_hidden_layers + copies, teacher_activations),
        "head": head,
    }


def _activation_bytes(model: ModelSize, workload: Workload, residual_bytes: int) -> float:
    """That a decoder layer keeps of a token."""
    kept: float = model.residual_numbers * residual_bytes + model.activation_numbers * workload.compute_bytes
    if residual_bytes > workload.compute_bytes:
        kept += (
            model.residual_numbers / 2 * workload.compute_bytes
        )  # what the norms give, cast for the matrix products
    if workload.uses_eager_attention:  # scores, capped scores, float32 probabilities and their cast, masks
        kept += model.num_attention_heads * workload.sequence_length * (3 * workload.compute_bytes + 8)
    return kept


def _autocast_copy_bytes(student: ModelSize, workload: Workload, launch: Sharding) -> float:
    """Weights that are wider than their products. Autocast keeps copies of trained ones only, of others a layer's."""
    if launch.zero_stage or workload.weight_bytes <= workload.compute_bytes:
        return 0.0
    frozen = student.parameters_per_layer + student.embedding_parameters  # a layer's and the output layer's
    looked_up = 0 if student.has_tied_embeddings else student.embedding_parameters
    return workload.compute_bytes * (frozen if student.adapter_parameters else student.num_parameters - looked_up)


def _optimizer_step_bytes(student: ModelSize, workload: Workload, launch: Sharding, gpus: int) -> dict[str, float]:
    """ZeRO-1 and 2 make float32 gradients of their partition beside those there are."""
    gradients, _ = _gradient_bytes(student, workload, launch, gpus)
    wide = (
        student.num_trainable_parameters / gpus * (4 + workload.compute_bytes) if launch.zero_stage in (1, 2) else 0.0
    )
    return {"gradients": gradients + wide}


def _rollout_bytes(student: ModelSize, teacher: ModelSize | None, workload: Workload, launch: Sharding) -> float:
    """The student's own: a key-value cache, whose layers are copied as they grow, the logits that are sampled from,
    whole weights where they are sharded, autocast's copies."""
    if workload.engine is not None or not workload.rollout_size:
        return 0.0
    models = [(student, workload.compute_bytes)]
    if workload.needs_teacher_in_rollout and teacher:
        models.append((teacher, workload.teacher_bytes))
    kv_cache = (
        sum(
            (model.num_hidden_layers + 1) * model.kv_cache_numbers * bytes_per_weight
            for model, bytes_per_weight in models
        )
        * workload.sequence_length
    )
    logits = _SAMPLING_BYTES_PER_LOGIT * student.vocab_size * len(models)
    whole = student.num_parameters * workload.compute_bytes if launch.zero_stage == 3 else 0
    return workload.rollout_size * (kv_cache + logits) + whole + _autocast_copy_bytes(student, workload, launch)


@dataclass
class EngineMemory:
    """What a colocated engine's share holds on each GPU, bytes.

    Attributes:
        weights: in half precision; `overhead`: beside them while it samples.
        cache: what is left; `kv_cache_per_sequence`: what one of full length takes of it.
        least: the smallest share that starts: a cache for one sequence of the engine's context.
    """

    weights: float
    overhead: float
    kv_cache: float
    kv_cache_per_sequence: float
    minimum: float


def split_engine_memory(student: ModelSize, engine: VllmMemoryConfig, sequence_length: int) -> EngineMemory:
    """Where an engine's share goes; `sequence_length`: of a sequence."""
    weights = 2 * student.num_parameters / engine.tensor_parallel_size
    overhead = _CUDA_GRAPH_BYTES + engine.max_num_seqs * student.vocab_size * _SAMPLING_BYTES_PER_LOGIT
    a_token = 2 * student.num_hidden_layers * student.kv_cache_numbers / engine.tensor_parallel_size
    return EngineMemory(
        weights=weights,
        overhead=overhead,
        kv_cache=engine.memory_bytes - weights - overhead,
        # those of all processes that share an engine are cached by all of them, each a part
        kv_cache_per_sequence=sequence_length * a_token * engine.tensor_parallel_size,
        minimum=weights + overhead + engine.max_model_len * a_token,
    )
