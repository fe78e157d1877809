"""`tsdkd plan`: the memory of a configuration on each GPU, whether it fits, and alternatives."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from rich.table import Table
from transformers import PretrainedConfig

from ..config.launch import launch_config_names, read_launch_config
from ..config.yaml_file import MAX_BYTES
from ..errors import ConfigError
from ..files import read_small_file
from ..methods import find_method
from ..models.loading import load_config
from ..run.arguments import resolve_run_values
from .memory import MEMORY_COMPONENTS, Sharding, estimate_memory
from .model_size import ModelSize, compute_model_size
from .processes import num_visible_gpus
from .split import Split, fastest_split, hidden_state_bytes, pipelined_step
from .step_time import estimate_step_seconds
from .vllm_memory import split_engine_memory
from .workload import GIB, VllmMemoryConfig, Workload, build_workload

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
"""(launch configuration, teacher_placement), fastest first."""
SINGLE_GPU_PLACEMENTS: list[Placement] = [
    ("single", "replica"),
    ("single", "cpu_offload"),
    ("zero3_offload", "cpu_offload"),
]
"""The same for a single GPU, where nothing can be sharded."""

_RESERVED_GIB = 2.0  # the CUDA context, NCCL's buffers
_USABLE_FRACTION = 0.95  # fragmentation in the allocator
_COMFORTABLE_FRACTION = 0.9  # of the usable memory; measured peaks exceed the estimates by up to 1/8


def plan(
    config: str | None, flags: Sequence[str], gpus: int | None, gpu_gib: float | None
) -> Iterator[RenderableType]:
    """Yield the memory table and its conclusions.

    If `gpus` or `gpu_gib` is None, the value comes from the configuration or this machine.

    Raises:
        ConfigError, ModelError: the configuration can't be estimated.
    """
    method, values = resolve_run_values(config, flags)[:2]
    cls = find_method(method).config_class
    if not cls.has_teacher:
        raise ConfigError([f"method: plan supports only distillation methods, found {method}"])
    gpus, gpu_gib, text = _detect_gpus(gpus, gpu_gib, values["num_processes"])
    if text:
        yield text
    current = configured_placement(values, gpus)
    gpus = 1 if read_sharding(current[0]).is_single_process else gpus
    models = [_load_model_config(values, f"{role}model_name_or_path") for role in ("", "teacher_")]
    student = compute_model_size(models[0], values["lora_r"] if values["use_peft"] else 0)
    teacher = compute_model_size(models[1]) if cls.loads_teacher else None
    workload = build_workload(cls, values, models, gpus, gpu_gib)

    def estimate(placement: Placement, of: Workload = workload) -> dict[str, float]:
        return estimate_memory(student, teacher, of, read_sharding(placement[0]), placement[1], gpus)

    needs_whole_teacher = teacher is None or workload.needs_teacher_in_rollout
    others = PLACEMENTS if gpus > 1 else SINGLE_GPU_PLACEMENTS
    others = [p for p in others if p != current and (p[1] == "replica" or not needs_whole_teacher)]
    estimates = {placement: estimate(placement) for placement in (current, *others)}
    limit = gpu_gib * _USABLE_FRACTION - _RESERVED_GIB
    yield _placement_table(estimates, limit)
    engine, can_engine_start = workload.engine, True
    if engine and engine.memory_bytes:
        text, can_engine_start = _describe_engine_memory(student, workload, engine, gpu_gib)
        yield text
    total = sum(estimates[current].values())
    yield _describe_fit(current, estimates[current], limit, can_engine_start)
    stays_awake = engine is not None and engine.memory_bytes and not engine.enable_sleep_mode
    if engine and stays_awake and total > _COMFORTABLE_FRACTION * limit:
        asleep = estimate(current, replace(workload, engine=replace(engine, enable_sleep_mode=True)))
        yield f"with --vllm_enable_sleep_mode true, it needs {sum(asleep.values()):.1f} GiB"
    yield _describe_fastest(estimates, limit, gpus)
    seconds = estimate_step_seconds(student, teacher, workload)
    yield _describe_step_seconds(seconds, workload, bool(values["rollout_ahead"]))
    if teacher is not None and current[1] == "server":
        yield _describe_server_traffic(teacher, workload, gpus, seconds["teacher"])
    if teacher is not None and not workload.needs_teacher_in_rollout and gpus > 1:
        sharding = read_sharding(current[0])

        def fits(of: Workload, students: int) -> bool:
            parts = estimate_memory(student, teacher, of, sharding, "server", students)
            return sum(parts.values()) <= _COMFORTABLE_FRACTION * limit

        yield _describe_split(fastest_split(student, teacher, workload, gpus, gpu_gib, fits), gpus)


def _detect_gpus(gpus: int | None, gpu_gib: float | None, processes: int | None) -> tuple[int, float, str]:
    """Return the number of GPUs, GiB per GPU, and a line that states them unless the user gave both."""
    if gpus and gpu_gib:
        return gpus, gpu_gib, ""
    here = num_visible_gpus()
    count = gpus or processes or here or 8
    sizes = [torch.cuda.get_device_properties(i).total_memory / GIB for i in range(here)]
    memory = gpu_gib or min(sizes, default=80.0)
    return count, memory, f"for {count} x {memory:.0f} GiB" + ("" if here else " (no GPU found on this machine)")


def configured_placement(values: dict[str, Any], gpus: int) -> Placement:
    """Return the placement of student and teacher that a configuration selects."""
    launch = values["accelerate_config"] or ("ddp" if gpus > 1 else "single")
    if gpus == 1 and launch in launch_config_names() and not read_sharding(launch).is_offloaded:
        launch = "single"  # as in `tsdkd train`
    sharded = read_sharding(launch).zero_stage == 3
    return launch, values["teacher_placement"] or ("zero3" if sharded else "replica")


def read_sharding(config: str) -> Sharding:
    """Read how a launch configuration, shipped or a file, shards the student. Raises `ConfigError`."""
    values = read_launch_config(config)
    try:
        if str(values.get("distributed_type")).upper() == "NO":
            return Sharding(zero_stage=0, is_single_process=True)
        given = values.get("deepspeed_config") or {}
        if "deepspeed_config_file" not in given:
            return Sharding(int(given.get("zero_stage", 0)), given.get("offload_param_device", "none") != "none")
        zero = json.loads(read_small_file(Path(given["deepspeed_config_file"]), MAX_BYTES))["zero_optimization"]
        return Sharding(int(zero["stage"]), zero.get("offload_param", {}).get("device", "none") != "none")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError([f"accelerate_config: {config} can't be read: {' '.join(repr(error).split())}"]) from error


def _load_model_config(values: dict[str, Any], field: str) -> PretrainedConfig:
    kwargs = {"trust_remote_code": values["trust_remote_code"]}
    if field == "model_name_or_path" and values["model_revision"]:
        kwargs["revision"] = values["model_revision"]
    return load_config(str(values[field]), field, **kwargs)


def _placement_table(estimates: dict[Placement, dict[str, float]], limit: float) -> Table:
    table = Table(title=f"GiB per GPU, {limit:.1f} usable", box=None, show_header=False)
    table.add_column(no_wrap=True)
    for _ in estimates:
        table.add_column(justify="right", min_width=7)
    table.add_row("", "current", *("option" for _ in range(len(estimates) - 1)))
    for side, label in enumerate(("student by", "teacher as")):
        names = (placement[side].replace("_", " ") for placement in estimates)  # spaces allow line breaks
        table.add_row(label, *names, style="bold")
    for part in MEMORY_COMPONENTS:
        if any(parts[part] >= 0.05 for parts in estimates.values()):
            table.add_row(part, *(f"{parts[part]:.1f}" for parts in estimates.values()))
    totals = [sum(parts.values()) for parts in estimates.values()]
    table.add_row("total", *(f"{total:.1f}" for total in totals), style="bold")
    table.add_row("", *("fits" if total <= limit else "-" for total in totals))
    return table


def _describe_fit(current: Placement, parts: dict[str, float], limit: float, can_engine_start: bool) -> str:
    name, total = f"this configuration ({' + '.join(current)})", sum(parts.values())
    if total > limit:
        return f"{name} doesn't fit: {total - limit:.1f} GiB too much; largest: {max(parts, key=lambda p: parts[p])}"
    if not can_engine_start:
        return f"{name} doesn't fit: vLLM's memory share is too small"
    return f"{name} fits{_tight_suffix(total, limit)}: {total:.1f} of {limit:.1f} GiB"


def _describe_fastest(estimates: dict[Placement, dict[str, float]], limit: float, gpus: int) -> str:
    """Describe the fastest placement that leaves some room, or else the fastest that fits."""
    totals = {p: sum(estimates[p].values()) for p in sorted(estimates, key=_speed_order)}
    best = next(
        (p for share in (_COMFORTABLE_FRACTION, 1.0) for p, total in totals.items() if total <= share * limit), None
    )
    if best is None:
        return "nothing fits; use more GPUs, or reduce per_device_train_batch_size, max_length or the student's size"
    flags = f"--accelerate_config {best[0]} --num_processes {gpus} --teacher_placement {best[1]}"
    return f"the fastest placement that fits{_tight_suffix(totals[best], limit)}: {flags}"


def _speed_order(placement: Placement) -> int:
    order = [*SINGLE_GPU_PLACEMENTS[:-1], *PLACEMENTS]
    return order.index(placement) if placement in order else len(order)


def _tight_suffix(total: float, limit: float) -> str:
    return " tightly" if total > _COMFORTABLE_FRACTION * limit else ""


def _describe_engine_memory(
    student: ModelSize, workload: Workload, engine: VllmMemoryConfig, gpu_gib: float
) -> tuple[str, bool]:
    """Describe how a colocated engine uses its memory share, and return whether the engine can start."""
    memory = split_engine_memory(student, engine, workload.sequence_length)
    share, needed = engine.memory_bytes / GIB, memory.minimum / GIB
    if share < needed:
        least = math.ceil(100 * needed / gpu_gib) / 100
        return f"vLLM needs {needed:.1f} GiB but has {share:.1f}; set vllm_gpu_memory_utilization: {least}", False
    sequences = int(memory.kv_cache // memory.kv_cache_per_sequence)
    return (
        f"vLLM's {share:.1f} GiB: {memory.weights / GIB:.1f} weights, {memory.overhead / GIB:.1f} workspace, "
        f"{memory.kv_cache / GIB:.1f} for {sequences} sequences of {workload.sequence_length} tokens; a rollout has "
        f"{workload.rollout_size}"
    ), True


def _describe_server_traffic(teacher: ModelSize, workload: Workload, gpus: int, seconds: float) -> str:
    sent = gpus * hidden_state_bytes(teacher, workload) / GIB
    return (
        f"the teacher's servers, on other GPUs: about {gpus * seconds:.0f} GPU-seconds on A100s for a step of all "
        f"{gpus} GPUs, and {sent:.2f} GiB of hidden states over the network"
    )


def _describe_split(split: Split | None, gpus: int) -> str:
    if split is None:
        return f"{gpus} GPUs are too few for a teacher on GPUs of its own"
    rollouts = f"{split.rollout} for rollouts (vllm_mode: server, rollout_ahead: 1)" if split.rollout else ""
    uses = [
        f"{split.student} for the student",
        f"{split.teacher} for the teacher (teacher_placement: server)",
        rollouts,
    ]
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in split.parts.items())
    return (
        f"the fastest split of {gpus} GPUs with the teacher on its own: {', '.join(filter(None, uses))}; about "
        f"{split.step:.1f} s per step ({parts})"
    )


def _describe_step_seconds(seconds: dict[str, float], workload: Workload, is_ahead: bool) -> str:
    training = sum(value for name, value in seconds.items() if name != "rollout")
    parts = {"student": training, "teacher": 0.0, "rollout": seconds["rollout"]}
    total = pipelined_step(parts, 1, workload.steps_per_rollout, is_ahead)
    if total < 1:
        return "step time: less than 1 s on A100s"
    shares = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    ahead = "; rollouts run ahead" if is_ahead else ""
    return (
        f"step time: about {total:.0f} s ({shares}{ahead}) on A100s, if every sequence has "
        f"{workload.sequence_length} tokens; excludes loading, weight copies and communication between GPUs"
    )
