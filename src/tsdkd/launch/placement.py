"""`tsdkd plan`: what a configuration takes on each GPU, whether it fits as it is, and what would fit."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PretrainedConfig

from ..config.base import TokenSelectiveConfig
from ..config.launch import launch_config_names, read_launch_config
from ..errors import ConfigError
from ..methods import METHODS
from ..models.loading import load_config
from ..run.arguments import resolve_run_values
from .memory import (
    GIB,
    MEMORY_COMPONENTS,
    ModelSize,
    Sharding,
    VllmMemoryConfig,
    Workload,
    compute_model_size,
    estimate_memory,
    split_engine_memory,
)
from .processes import num_visible_gpus
from .step_time import estimate_step_seconds

Placement = tuple[str, str]
PLACEMENTS: list[Placement] = [
    ("ddp", "replica"),
    ("zero1", "replica"),
    ("zero2", "replica"),
    ("zero2", "zero3"),
    ("zero3", "zero3"),
    ("zero3", "cpu_offload"),
    ("zero3_offload", "cpu_offload"),
]
"""(launch configuration, teacher_placement), the fastest first."""
SINGLE_GPU_PLACEMENTS: list[Placement] = [
    ("single", "replica"),
    ("single", "cpu_offload"),
    ("zero3_offload", "cpu_offload"),
]
"""The same for one GPU, over which nothing can be sharded."""

_RESERVED_GIB = 2.0  # the CUDA context, NCCL's buffers
_USABLE_FRACTION = 0.95  # the allocator's gaps
_COMFORTABLE_FRACTION = 0.9  # of that; above it is tight, as measured peaks are up to an eighth above the estimate
_DENSE_BYTES_PER_LOGIT = 46  # bytes for a (token, word) without the fused head, bfloat16 (docs/performance.md)
_PROMPT_TOKENS = 256  # tokens, where only completions have a limit that counts
_LARGE_GPU_GIB = 70  # from here on vLLM samples 1024 sequences at once, below 256 (an A100 of 80 GiB: 256 too)


def print_plan(config: str | None, flags: Sequence[str], gpus: int | None, gpu_gib: float | None) -> None:
    """Print the table and what follows from it; None: what the configuration says, or what there is.

    Raises:
        ConfigError, ModelError: there is nothing to estimate.
    """
    method, values = resolve_run_values(config, flags)[:2]
    cls = METHODS[method].config_class
    if "teacher_model_name_or_path" in cls.unsupported_options:
        raise ConfigError([f"method: {method} isn't a distillation; plan estimates those only"])
    gpus, gpu_gib = _detect_gpus(gpus, gpu_gib, values["num_processes"])
    current = configured_placement(values, gpus)
    gpus = 1 if read_sharding(current[0]).is_single_process else gpus
    models = [
        _load_model_config(values, "model_name_or_path"),
        _load_model_config(values, "teacher_model_name_or_path"),
    ]
    student = compute_model_size(models[0], values["lora_r"] if values["use_peft"] else 0)
    teacher = (
        None if "teacher_placement" in cls.unsupported_options else compute_model_size(models[1])
    )  # seq-kd loads none
    workload = build_workload(cls, values, models, gpus, gpu_gib)

    whole = teacher is None or workload.needs_teacher_in_rollout
    others = [
        p
        for p in (PLACEMENTS if gpus > 1 else SINGLE_GPU_PLACEMENTS)
        if p != current and (p[1] == "replica" or not whole)
    ]
    estimates = {
        p: estimate_memory(student, teacher, workload, read_sharding(p[0]), p[1], gpus) for p in (current, *others)
    }
    limit = gpu_gib * _USABLE_FRACTION - _RESERVED_GIB
    console = Console(highlight=False)
    console.print(_placement_table(estimates, limit))
    can_engine_start = workload.engine is None or _print_engine_memory(
        console, student, workload, workload.engine, gpu_gib
    )
    console.print(_describe_fit(current, estimates[current], limit, can_engine_start))
    if (
        workload.engine
        and workload.engine.memory_bytes
        and not workload.engine.has_sleep_mode
        and sum(estimates[current].values()) > _COMFORTABLE_FRACTION * limit
    ):
        asleep = replace(workload, engine=replace(workload.engine, has_sleep_mode=True))
        total = sum(estimate_memory(student, teacher, asleep, read_sharding(current[0]), current[1], gpus).values())
        console.print(f"with --vllm_enable_sleep_mode true it takes {total:.1f} GiB")
    console.print(_describe_fastest(estimates, limit, gpus))
    _print_step_seconds(console, student, teacher, workload)


def _detect_gpus(gpus: int | None, gpu_gib: float | None, processes: int | None) -> tuple[int, float]:
    """GPUs and memory of each, GiB; says what nobody gave."""
    if gpus and gpu_gib:
        return gpus, gpu_gib
    here = num_visible_gpus()
    count = gpus or processes or here or 8
    sizes = [torch.cuda.get_device_properties(i).total_memory / 2**30 for i in range(here)]
    memory = gpu_gib or min(sizes, default=80.0)
    print(f"for {count} x {memory:.0f} GiB" + ("" if here else ", as there is no GPU here"))
    return count, memory


def configured_placement(values: dict[str, Any], gpus: int) -> Placement:
    """Where a configuration's values put student and teacher."""
    launch = values["accelerate_config"] or ("ddp" if gpus > 1 else "single")
    if gpus == 1 and launch in launch_config_names() and not read_sharding(launch).is_offloaded:
        launch = "single"  # as `tsdkd train` does it
    sharded = read_sharding(launch).zero_stage == 3
    return launch, values["teacher_placement"] or ("zero3" if sharded else "replica")


def read_sharding(config: str) -> Sharding:
    """What a launch configuration, shipped or a file, does to the student. Raises `ConfigError`."""
    values = read_launch_config(config)
    try:
        if str(values.get("distributed_type")).upper() == "NO":
            return Sharding(zero_stage=0, is_single_process=True)
        given = values.get("deepspeed_config") or {}
        if "deepspeed_config_file" not in given:
            return Sharding(int(given.get("zero_stage", 0)), given.get("offload_param_device", "none") != "none")
        zero = json.loads(Path(given["deepspeed_config_file"]).read_text(encoding="utf-8"))["zero_optimization"]
        return Sharding(int(zero["stage"]), zero.get("offload_param", {}).get("device", "none") != "none")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError([f"accelerate_config: {config} can't be read: {' '.join(repr(error).split())}"]) from error


def build_workload(
    cls: type[TokenSelectiveConfig],
    values: dict[str, Any],
    models: Sequence[PretrainedConfig],
    gpus: int,
    gpu_gib: float,
) -> Workload:
    """What a GPU does in a step, by a method and a configuration's values; `models`: student's and teacher's."""
    samples_per_step = values["per_device_train_batch_size"] * values["gradient_accumulation_steps"]
    rollout = max(samples_per_step, -(-values.get("rollout_batch_size", 0) // gpus))
    steps_per_rollout = rollout / samples_per_step * values.get("num_iterations", 1)
    generates = values["lmbda"] > 0 or cls.always_needs_completions
    half = values["fp16"] or values["bf16"] is not False  # TRL's default is bf16
    weight_bytes = _itemsize(values["dtype"], values["model_init_kwargs"], models[0])
    longest = _max_sequence_length(values, models)
    tokens = min(longest, values["max_completion_length"] + _PROMPT_TOKENS)
    logits = values["per_device_train_batch_size"] * tokens * models[0].get_text_config().vocab_size
    chunk_gib = values["head_chunk_gib"] or 1.0
    return Workload(
        micro_batch_size=values["per_device_train_batch_size"],
        gradient_accumulation_steps=values["gradient_accumulation_steps"],
        rollout_size=rollout if generates else 0,
        steps_per_rollout=int(steps_per_rollout),
        sequence_length=tokens,
        weight_bytes=weight_bytes,
        compute_bytes=2 if half else weight_bytes,
        teacher_bytes=_itemsize("auto", values["teacher_model_init_kwargs"], models[1]),
        uses_gradient_checkpointing=bool(values["gradient_checkpointing"]),
        uses_eager_attention=values["attn_implementation"] == "eager",
        head_gib=chunk_gib if values["fused_head"] else logits * _DENSE_BYTES_PER_LOGIT / GIB,
        needs_teacher_in_rollout="use_vllm" in cls.unsupported_options,
        engine=_build_engine_config(values, longest, gpu_gib) if values["use_vllm"] else None,
    )


def _build_engine_config(values: dict[str, Any], longest: int, gpu_gib: float) -> VllmMemoryConfig:
    slots = 1024 if gpu_gib >= _LARGE_GPU_GIB else 256
    if values["vllm_mode"] == "server":
        return VllmMemoryConfig(memory_bytes=0.0, max_num_seqs=slots)
    return VllmMemoryConfig(
        memory_bytes=values["vllm_gpu_memory_utilization"] * gpu_gib * GIB,
        has_sleep_mode=values["vllm_enable_sleep_mode"],
        tensor_parallel_size=values["vllm_tensor_parallel_size"],
        max_model_len=longest,
        max_num_seqs=slots,
    )


def _max_sequence_length(values: dict[str, Any], models: Sequence[PretrainedConfig]) -> int:
    """Prompt plus completion, tokens, as `data.longest_sequence` has it."""
    contexts = [getattr(m.get_text_config(), "max_position_embeddings", None) for m in models]
    limits = [values["max_length"], values["vllm_max_model_length"] if values["use_vllm"] else None, *contexts]
    return min([limit for limit in limits if limit], default=2**31)


def _itemsize(dtype: str, init_kwargs: dict[str, Any] | None, config: PretrainedConfig) -> int:
    """Bytes of a number of a model that is loaded in `dtype`, or its checkpoint's."""
    name = (init_kwargs or {}).get("dtype", dtype)
    given = config.dtype or torch.float32 if name == "auto" else name
    return torch.empty(0, dtype=getattr(torch, given) if isinstance(given, str) else given).element_size()


def _load_model_config(values: dict[str, Any], field: str) -> PretrainedConfig:
    kwargs = {"trust_remote_code": values["trust_remote_code"]}
    if field == "model_name_or_path" and values["model_revision"]:
        kwargs["revision"] = values["model_revision"]
    return load_config(str(values[field]), field, **kwargs)


def _placement_table(estimates: dict[Placement, dict[str, float]], limit: float) -> Table:
    table = Table(title=f"GiB a GPU, of {limit:.1f} that can be used", box=None, show_header=False)
    table.add_column(no_wrap=True)
    for _ in estimates:
        table.add_column(justify="right", min_width=7)
    table.add_row("", "as it is", *("instead" for _ in range(len(estimates) - 1)))
    for side, label in enumerate(("student by", "teacher as")):
        names = (placement[side].replace("_", " ") for placement in estimates)  # where it may be broken
        table.add_row(label, *names, style="bold")
    for part in MEMORY_COMPONENTS:
        if any(parts[part] >= 0.05 for parts in estimates.values()):
            table.add_row(part, *(f"{parts[part]:.1f}" for parts in estimates.values()))
    totals = [sum(parts.values()) for parts in estimates.values()]
    table.add_row("in all", *(f"{total:.1f}" for total in totals), style="bold")
    table.add_row("", *("fits" if total <= limit else "-" for total in totals))
    return table


def _describe_fit(current: Placement, parts: dict[str, float], limit: float, can_engine_start: bool) -> str:
    name, total = f"this configuration ({' + '.join(current)})", sum(parts.values())
    if total > limit:
        return f"{name} doesn't fit: {total - limit:.1f} GiB too much; most is {max(parts, key=lambda p: parts[p])}"
    if not can_engine_start:
        return f"{name} doesn't fit: vLLM's share is too small"
    return f"{name} fits{_tight_suffix(total, limit)}: {total:.1f} of {limit:.1f} GiB"


def _describe_fastest(estimates: dict[Placement, dict[str, float]], limit: float, gpus: int) -> str:
    """The first that leaves some room, or else the first that fits."""
    totals = {p: sum(estimates[p].values()) for p in sorted(estimates, key=_speed_order)}
    best = next(
        (p for share in (_COMFORTABLE_FRACTION, 1.0) for p, total in totals.items() if total <= share * limit), None
    )
    if best is None:
        return "nothing fits: more GPUs, or a smaller per_device_train_batch_size, max_length or student"
    flags = f"--accelerate_config {best[0]} --num_processes {gpus} --teacher_placement {best[1]}"
    return f"the fastest that fits{_tight_suffix(totals[best], limit)}: {flags}"


def _speed_order(placement: Placement) -> int:
    order = [*SINGLE_GPU_PLACEMENTS[:-1], *PLACEMENTS]
    return order.index(placement) if placement in order else len(order)


def _tight_suffix(total: float, limit: float) -> str:
    return " tightly" if total > _COMFORTABLE_FRACTION * limit else ""


def _print_engine_memory(
    console: Console, student: ModelSize, workload: Workload, engine: VllmMemoryConfig, gpu_gib: float
) -> bool:
    """What a colocated engine's share holds. Returns whether it can start."""
    if not engine.memory_bytes:
        return True
    engine_memory = split_engine_memory(student, engine, workload.sequence_length)
    share, needed = engine.memory_bytes / GIB, engine_memory.minimum / GIB
    if share < needed:
        least = math.ceil(100 * needed / gpu_gib) / 100
        console.print(f"vLLM needs {needed:.1f} GiB and has {share:.1f}: set vllm_gpu_memory_utilization: {least}")
        return False
    held = int(engine_memory.kv_cache // engine_memory.kv_cache_per_sequence)
    console.print(
        f"vLLM's {share:.1f} GiB: {engine_memory.weights / GIB:.1f} weights, {engine_memory.overhead / GIB:.1f} to work in, "
        f"{engine_memory.kv_cache / GIB:.1f} for {held} sequences of {workload.sequence_length} tokens; a rollout has {workload.rollout_size}"
    )
    return True


def _print_step_seconds(console: Console, student: ModelSize, teacher: ModelSize | None, workload: Workload) -> None:
    seconds = estimate_step_seconds(student, teacher, workload)
    shares = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    console.print(
        f"a step: about {sum(seconds.values()):.0f} s ({shares}), on A100s, if every sequence had {workload.sequence_length} "
        "tokens, without loading, copies of weights and communication between GPUs"
    )
