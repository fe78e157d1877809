"""How much memory a run takes on each GPU, and for how long a step computes, from the models' configurations alone."""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

GIB = 2**30
PLACEMENTS = [
    ("ddp", "replica"),
    ("zero1", "replica"),
    ("zero2", "replica"),
    ("zero2", "zero3"),
    ("zero3", "zero3"),
    ("zero3", "cpu_offload"),
    ("zero3_offload", "cpu_offload"),
]
"""(launch configuration, teacher_placement), the fastest first."""

# An A100: what it computes and reads in practice, about 40 % and 60 % of its 312 TFLOP/s and 2 TB/s.
_FLOPS, _BYTES = 125e12, 1.2e12


@dataclass
class Size:
    """A model's, in numbers (not bytes).

    Attributes:
        parameters: all of them; `trainable`: those that are trained.
        largest: parameters of a decoder layer or the embedding, whichever is larger: what a sharded model gathers.
        embedding: of the input embedding, `V x H`; `tied`: it is the output layer too.
        layers, hidden: of the decoder.
        saved: numbers a token that one layer keeps for its backward pass.
        cached: numbers a token that one layer keeps in the key-value cache.
    """

    parameters: int
    trainable: int
    largest: int
    embedding: int
    tied: bool
    layers: int
    hidden: int
    saved: int
    cached: int


@dataclass
class Workload:
    """What a GPU does in a step.

    Attributes:
        batch: responses of a micro-batch; `rollout`: of a rollout; `accumulated`: micro-batches of a step.
        tokens: of prompt and completion.
        weight_bytes: of a student's number outside DeepSpeed; `compute_bytes`: in matrix products.
        teacher_bytes: of a teacher's number.
        checkpointing: layers are computed again in the backward pass.
        chunk_gib: of the fused head.
        vllm_gib: a colocated engine's share; None: the student rolls out by itself.
    """

    batch: int
    rollout: int
    accumulated: int
    tokens: int
    weight_bytes: int
    compute_bytes: int
    teacher_bytes: int
    checkpointing: bool
    chunk_gib: float
    vllm_gib: float | None


def size_of(config: PretrainedConfig, lora_r: int = 0) -> Size:
    """Of a model of this configuration, without its weights; `lora_r`: rank of adapters on all its linear layers."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    parameters = sum(p.numel() for p in model.parameters())
    embedding = model.get_input_embeddings().weight.numel()
    layer = model.base_model.layers[0]
    linear = [m for m in model.base_model.layers.modules() if isinstance(m, torch.nn.Linear)]
    trainable = sum(lora_r * (m.in_features + m.out_features) for m in linear) if lora_r else parameters
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    queries, keys = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
    # two norms (input and output), rotated queries and keys, values, attention's output, and of the feed-forward
    # part gate, activation, up, and their product
    saved = 4 * text.hidden_size + 2 * queries + 2 * keys + 4 * text.intermediate_size
    if hasattr(layer.self_attn, "q_norm"):
        saved += 2 * (queries + keys)
    return Size(
        parameters=parameters,
        trainable=trainable,
        largest=max(embedding, sum(p.numel() for p in layer.parameters())),
        embedding=embedding,
        tied=bool(text.tie_word_embeddings),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        saved=saved,
        cached=2 * keys,
    )


def estimate(student: Size, teacher: Size, work: Workload, placement: tuple[str, str], gpus: int) -> dict[str, float]:
    """GiB a GPU, by what takes it: `student` is its weights, `head` a chunk of logits, `rollout` the cache.

    Of parts that aren't there at once (a rollout's cache, a training step's activations) the larger counts.
    """
    config, teacher_placement = placement
    zero = int(config[4]) if config.startswith("zero") else 0
    offloaded = config.endswith("offload")
    bytes_each = work.compute_bytes if zero else work.weight_bytes
    shards = [gpus if zero >= stage else 1 for stage in (1, 2, 3)]  # of optimizer, gradients, weights
    adam = 8 + (4 if zero else 0)  # bytes; DeepSpeed has float32 weights of its own beside

    weights = 0.0 if offloaded else student.parameters * bytes_each / shards[2]
    if not zero and work.compute_bytes < work.weight_bytes:
        weights += student.parameters * work.compute_bytes  # autocast's copies
    gathered = 2 * student.largest * bytes_each if shards[2] > 1 or offloaded else 0
    gradients = student.trainable * bytes_each / shards[1]
    if not zero and gpus > 1:
        gradients *= 2  # DDP's buckets

    rows = work.batch * work.tokens
    per_layer = rows * student.saved * work.compute_bytes
    kept = rows * student.layers * student.hidden * work.compute_bytes + per_layer
    activations = kept if work.checkpointing else per_layer * student.layers
    tied_gradient = 4 * student.embedding if student.tied and student.trainable == student.parameters else 0
    training = gradients + activations + tied_gradient + work.chunk_gib * GIB
    cache = work.rollout * work.tokens * student.layers * student.cached * work.compute_bytes
    if shards[2] > 1 or offloaded:
        cache += student.parameters * bytes_each  # whole while it samples by itself
    rollout = 0.0 if work.vllm_gib is not None else cache

    shared = {"replica": 1.0, "zero3": 1 / gpus, "cpu_offload": 0.0}[teacher_placement]
    teacher_gathered = 0 if teacher_placement == "replica" else 2 * teacher.largest * work.teacher_bytes
    parts = {
        "student": weights + gathered,
        "optimizer": 0.0 if offloaded else student.trainable * adam / shards[0],
        "gradients": gradients if training >= rollout else 0.0,
        "activations": activations + tied_gradient if training >= rollout else 0.0,
        "head": work.chunk_gib * GIB if training >= rollout else 0.0,
        "rollout": rollout if rollout > training else 0.0,
        "teacher": teacher.parameters * work.teacher_bytes * shared + teacher_gathered,
        "vLLM": (work.vllm_gib or 0.0) * GIB,
    }
    return {name: size / GIB for name, size in parts.items()}


def step_seconds(student: Size, teacher: Size, work: Workload) -> dict[str, float]:
    """Seconds of a step on A100s, by what takes them, without communication between them."""
    rows = work.batch * work.accumulated * work.tokens
    reads = work.tokens * student.parameters * work.compute_bytes / _BYTES  # decoding reads all weights for a token
    passes = 8 if work.checkpointing else 6
    return {
        "rollout": max(reads, 2 * student.parameters * rows / _FLOPS),
        "teacher": 2 * teacher.parameters * rows / _FLOPS,
        "student": passes * student.parameters * rows / _FLOPS,
    }
