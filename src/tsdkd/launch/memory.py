"""How much memory a run takes on each GPU, from the models' configurations alone.

Buffers are as deepspeed 0.19, torch 2.13 and trl 1.16 allocate them; `benchmarks/plan.py` measures what a CPU can.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

GIB = 2**30
PARTS = ("student", "optimizer", "gradients", "buckets", "activations", "head", "rollout", "teacher", "vLLM")
"""What takes memory: the student's weights, gathered or sharded; AdamW's state, with ZeRO's float32 weights;
gradients; what they are exchanged in; what a backward pass needs, autocast's copies of the weights included; a chunk
of logits and the output layer's gradient; the student's own rollouts; the teacher; a colocated engine."""

# Numbers, not bytes. accelerate writes none of these into DeepSpeed's configuration, so that its own defaults hold,
# and not the smaller ones that "auto" in a file of DeepSpeed's would give.
_BUCKET = 500_000_000  # reduce_bucket_size: allocated whole, however small the model is
_LIVE = 1_000_000_000  # stage3_max_live_parameters: gathered at once

_SAMPLED = 24  # bytes for a logit that is sampled from: in float32, its probability, both sorted, int64 ids, sums
# What a colocated engine takes of its share beside weights and cache, bytes.
_GRAPHS = 1.5 * GIB  # CUDA graphs: 0.4 to 1.6 GiB in logs of vLLM 0.23 to 0.27
_ASLEEP = 2.0 * GIB  # sleeping it gives back weights and cache, not graphs and what its libraries hold


@dataclass
class ModelSize:
    """A model's, in numbers (not bytes).

    Attributes:
        parameters: all of them; `trainable`: those that are trained.
        layer: parameters of a decoder layer.
        embedding: of the input embedding, `V x H`; `tied`: it is the output layer too.
        vocab, layers, hidden, heads: of the decoder.
        residual: numbers a token that one layer keeps of the residual stream for its backward pass, in its precision.
        saved: numbers a token that it keeps besides, in that of matrix products.
        cached: numbers a token that one layer keeps in the key-value cache.
        context: the longest sequence, tokens.
    """

    parameters: int
    trainable: int
    layer: int
    embedding: int
    tied: bool
    vocab: int
    layers: int
    hidden: int
    heads: int
    residual: int
    saved: int
    cached: int
    context: int

    @property
    def adapters(self) -> int:
        """Parameters that come beside the model's own."""
        return self.trainable if self.trainable < self.parameters else 0


class Sharding(NamedTuple):
    """How the student is spread over the GPUs.

    Attributes:
        stage: of ZeRO; 0: DDP, or one process.
        offloaded: weights and optimizer are in the memory of the host.
        alone: one process, however many GPUs there are.
    """

    stage: int
    offloaded: bool = False
    alone: bool = False


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

    share: float
    sleeps: bool = False
    processes: int = 1
    longest: int = 0
    slots: int = 256


@dataclass
class Workload:
    """What a GPU does in a step.

    Attributes:
        batch: responses of a micro-batch; `accumulated`: micro-batches of a step.
        rollout: responses of a rollout, 0 without any; `served`: steps that it serves.
        tokens: of prompt and completion.
        weight_bytes: of a student's number outside DeepSpeed; `compute_bytes`: in matrix products.
        teacher_bytes: of a teacher's number.
        checkpointing: layers are computed again in the backward pass.
        eager: attention keeps its whole matrices.
        chunk_gib: of the fused head.
        with_teacher: the teacher takes part in every token of a rollout.
        engine: None: the student rolls out by itself.
    """

    batch: int
    accumulated: int
    rollout: int
    served: int
    tokens: int
    weight_bytes: int
    compute_bytes: int
    teacher_bytes: int
    checkpointing: bool
    eager: bool
    chunk_gib: float
    with_teacher: bool
    engine: VllmMemoryConfig | None


def compute_model_size(config: PretrainedConfig, lora_r: int = 0) -> ModelSize:
    """Of a model of this configuration, without its weights; `lora_r`: rank of adapters on all its linear layers."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    parameters = sum(p.numel() for p in model.parameters())
    layer = model.base_model.layers[0]
    linear = [m for m in model.base_model.layers.modules() if isinstance(m, torch.nn.Linear)]
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    queries, keys = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
    # rotated queries and keys, values, attention's output, and of the feed-forward part gate, activation, up, and
    # their product
    saved = 2 * queries + 2 * keys + 4 * text.intermediate_size
    if hasattr(layer.self_attn, "q_norm"):
        saved += 2 * (queries + keys)
    return ModelSize(
        parameters=parameters,
        trainable=sum(lora_r * (m.in_features + m.out_features) for m in linear) if lora_r else parameters,
        layer=sum(p.numel() for p in layer.parameters()),
        embedding=model.get_input_embeddings().weight.numel(),
        tied=bool(text.tie_word_embeddings),
        vocab=text.vocab_size,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=text.num_attention_heads,
        residual=4 * text.hidden_size,  # two norms, input and output
        saved=saved,
        cached=2 * keys,
        context=getattr(text, "max_position_embeddings", None) or 2**31,
    )


def estimate_memory(
    student: ModelSize, teacher: ModelSize | None, work: Workload, launch: Sharding, teacher_placement: str, gpus: int
) -> dict[str, float]:
    """GiB a GPU, for each of `PARTS`; `teacher` None: it isn't loaded.

    Of parts that aren't there at once, those of the fullest moment count: a backward pass, a step of ZeRO's optimizer,
    or a rollout.
    """
    always = {
        **_student_bytes(student, work, launch, gpus),
        "teacher": _teacher_bytes(teacher, work, teacher_placement, gpus),
    }
    engine = work.engine or VllmMemoryConfig(share=0.0)
    idle = min(engine.share, _ASLEEP) if engine.sleeps else engine.share
    moments = (
        {**_backward_bytes(student, teacher, work, launch, gpus), "vLLM": idle},
        {**_optimizer_step_bytes(student, work, launch, gpus), "vLLM": idle},
        {"rollout": _rollout_bytes(student, teacher, work, launch), "vLLM": engine.share},
    )
    parts = always | max(moments, key=lambda moment: sum(moment.values()))
    return {name: parts.get(name, 0.0) / GIB for name in PARTS}


def _student_bytes(student: ModelSize, work: Workload, launch: Sharding, gpus: int) -> dict[str, float]:
    each, own = _bytes_per_weight(student, work, launch)
    weights: float = student.parameters * each + student.adapters * own
    if launch.stage == 3:
        gathered = min(student.parameters, _LIVE + student.embedding) * each
        weights = gathered + (0 if launch.offloaded else weights / gpus)
    # ZeRO keeps float32 weights of its own; without it AdamW's two states are in the weights' precision
    state = student.trainable * (12 / gpus if launch.stage else 2 * own)
    return {"student": weights, "optimizer": 0.0 if launch.offloaded else state}


def _teacher_bytes(teacher: ModelSize | None, work: Workload, placement: str, gpus: int) -> float:
    if teacher is None:
        return 0.0
    if placement == "replica":
        return teacher.parameters * work.teacher_bytes
    gathered = min(teacher.parameters, _LIVE + teacher.embedding)
    shard = teacher.parameters / gpus if placement == "zero3" else 0
    return (gathered + shard) * work.teacher_bytes


def _bytes_per_weight(student: ModelSize, work: Workload, launch: Sharding) -> tuple[int, int]:
    """Of a weight, and of a trained one: DeepSpeed casts all, peft keeps adapters in float32."""
    each = work.compute_bytes if launch.stage else work.weight_bytes
    return each, each if launch.stage or not student.adapters else 4


def _gradient_bytes(student: ModelSize, work: Workload, launch: Sharding, gpus: int) -> tuple[float, float]:
    """Bytes of gradients and of what they are exchanged in."""
    _, each = _bytes_per_weight(student, work, launch)
    whole = student.trainable * each
    if launch.stage == 0:
        # DDP's buckets are a second copy. Where each term's gradients are logged, the step's own aren't there yet.
        return whole, whole if gpus > 1 else 0
    bucket, copy = _BUCKET * each, min(_BUCKET, student.trainable) * each  # the copy is what is exchanged
    # parameters that lie in two partitions count whole
    partition = whole / gpus + min(student.embedding, student.trainable) * each
    if launch.stage == 1 and work.accumulated > 1:
        # whole until the last micro-batch, whose backward pass moves them through the bucket
        return whole, bucket + max(0.0, copy + partition - whole)
    if launch.stage in (1, 2):
        # from the second micro-batch on ZeRO-2 has the sum and its next part
        return partition * (min(2, work.accumulated) if launch.stage == 2 else 1), bucket + copy
    return 0.0 if launch.offloaded else whole / gpus, bucket + copy


def _backward_bytes(
    student: ModelSize, teacher: ModelSize | None, work: Workload, launch: Sharding, gpus: int
) -> dict[str, float]:
    each, own = _bytes_per_weight(student, work, launch)
    gradients, buckets = _gradient_bytes(student, work, launch, gpus)
    rows = work.batch * work.tokens
    residual = each if student.adapters == 0 or launch.stage else max(each, work.compute_bytes)
    layer = rows * _activation_bytes(student, work, residual)
    layers = (
        rows * student.layers * student.hidden * residual + layer if work.checkpointing else layer * student.layers
    )
    asked = (
        rows * _activation_bytes(teacher, work, work.teacher_bytes) if teacher else 0.0
    )  # before the student's pass
    head = work.chunk_gib * GIB
    if not student.adapters and (student.tied or work.accumulated > 1 or own < 4):
        head += 4 * student.embedding  # the output layer's gradient before it is added to what there is
    copies = _autocast_copy_bytes(student, work, launch)
    return {
        "gradients": gradients,
        "buckets": buckets,
        "activations": max(layers + copies, asked),
        "head": head,
    }


def _activation_bytes(model: ModelSize, work: Workload, residual_bytes: int) -> float:
    """That a decoder layer keeps of a token."""
    kept: float = model.residual * residual_bytes + model.saved * work.compute_bytes
    if residual_bytes > work.compute_bytes:
        kept += model.residual / 2 * work.compute_bytes  # what the norms give, cast for the matrix products
    if work.eager:  # scores, capped scores, float32 probabilities and their cast, masks
        kept += model.heads * work.tokens * (3 * work.compute_bytes + 8)
    return kept


def _autocast_copy_bytes(student: ModelSize, work: Workload, launch: Sharding) -> float:
    """Weights that are wider than their products. Autocast keeps copies of trained ones only, of others a layer's."""
    if launch.stage or work.weight_bytes <= work.compute_bytes:
        return 0.0
    frozen = student.layer + student.embedding  # a layer's and the output layer's
    looked_up = 0 if student.tied else student.embedding
    return work.compute_bytes * (frozen if student.adapters else student.parameters - looked_up)


def _optimizer_step_bytes(student: ModelSize, work: Workload, launch: Sharding, gpus: int) -> dict[str, float]:
    """ZeRO-1 and 2 make float32 gradients of their partition beside those there are."""
    gradients, _ = _gradient_bytes(student, work, launch, gpus)
    wide = student.trainable / gpus * (4 + work.compute_bytes) if launch.stage in (1, 2) else 0.0
    return {"gradients": gradients + wide}


def _rollout_bytes(student: ModelSize, teacher: ModelSize | None, work: Workload, launch: Sharding) -> float:
    """The student's own: a key-value cache, whose layers are copied as they grow, the logits that are sampled from,
    whole weights where they are sharded, autocast's copies."""
    if work.engine is not None or not work.rollout:
        return 0.0
    models = [(student, work.compute_bytes)]
    if work.with_teacher and teacher:
        models.append((teacher, work.teacher_bytes))
    cache = sum((model.layers + 1) * model.cached * each for model, each in models) * work.tokens
    logits = _SAMPLED * student.vocab * len(models)
    whole = student.parameters * work.compute_bytes if launch.stage == 3 else 0
    return work.rollout * (cache + logits) + whole + _autocast_copy_bytes(student, work, launch)


@dataclass
class EngineMemory:
    """What a colocated engine's share holds on each GPU, bytes.

    Attributes:
        weights: in half precision; `working`: beside them while it samples.
        cache: what is left; `sequence`: what one of full length takes of it.
        least: the smallest share that starts: a cache for one sequence of the engine's context.
    """

    weights: float
    working: float
    cache: float
    sequence: float
    least: float


def split_engine_memory(student: ModelSize, engine: VllmMemoryConfig, tokens: int) -> EngineMemory:
    """Where an engine's share goes; `tokens`: of a sequence."""
    weights = 2 * student.parameters / engine.processes
    working = _GRAPHS + engine.slots * student.vocab * _SAMPLED
    a_token = 2 * student.layers * student.cached / engine.processes
    return EngineMemory(
        weights=weights,
        working=working,
        cache=engine.share - weights - working,
        # those of all processes that share an engine are cached by all of them, each a part
        sequence=tokens * a_token * engine.processes,
        least=weights + working + engine.longest * a_token,
    )
