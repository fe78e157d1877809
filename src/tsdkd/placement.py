"""`tsdkd plan`: what a configuration takes on each GPU, which placement fits, and why the others don't."""

from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PretrainedConfig

from .errors import ConfigError
from .memory import PLACEMENTS, Workload, estimate, size_of, step_seconds
from .methods import METHODS
from .models import load_config
from .parsing import read_run

_RESERVED_GIB = 2.0  # the CUDA context, NCCL's buffers
_USABLE = 0.95  # the allocator's gaps


def show_plan(config: str | None, flags: Sequence[str], gpus: int, gpu_gib: float) -> None:
    """Print the table and what follows from it. Raises `ConfigError`, `ModelError`."""
    method, values, _, _ = read_run(config, flags)
    refused = METHODS[method].refused
    if "teacher_model_name_or_path" in refused:
        raise ConfigError([f"method: {method} isn't a distillation; plan estimates those only"])
    models = [_load(values, "model_name_or_path"), _load(values, "teacher_model_name_or_path")]
    lora = values["lora_r"] if values["use_peft"] else 0
    student, teacher = size_of(models[0], lora), size_of(models[1])
    work = workload(values, models[1], gpu_gib)
    whole = "use_vllm" in refused  # these methods sample with the teacher
    placements = [placement for placement in PLACEMENTS if placement[1] == "replica" or not whole]
    found = {placement: estimate(student, teacher, work, placement, gpus) for placement in placements}
    limit = gpu_gib * _USABLE - _RESERVED_GIB
    fitting = [placement for placement in placements if sum(found[placement].values()) <= limit]
    console = Console()
    console.print(_table(found, limit))
    for placement, parts in found.items():
        if placement not in fitting:
            largest = max(parts, key=lambda name: parts[name])
            over = sum(parts.values()) - limit
            console.print(f"{' + '.join(placement)}: {over:.1f} GiB too much; most is {largest}", highlight=False)
    if fitting:
        launch, teacher_placement = fitting[0]
        console.print(
            f"the fastest that fits: --accelerate_config {launch} --num_processes {gpus} "
            f"--teacher_placement {teacher_placement}",
            highlight=False,
        )
    else:
        console.print("nothing fits: more GPUs, or a smaller per_device_train_batch_size, max_length or student")
    seconds = step_seconds(student, teacher, work)
    shares = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    note = "if every completion had full length, on A100s, without communication"
    console.print(f"a step: about {sum(seconds.values()):.0f} s ({shares}), {note}", highlight=False)


def workload(values: dict[str, Any], teacher: PretrainedConfig, gpu_gib: float) -> Workload:
    """What a GPU does in a step, by a configuration's values."""
    batch, accumulated = values["per_device_train_batch_size"], values["gradient_accumulation_steps"]
    per_rollout = values.get("rollout_batch_size")
    half = values["bf16"] or values["fp16"]
    given = (values["teacher_model_init_kwargs"] or {}).get("dtype") or teacher.dtype or torch.float32
    dtype = getattr(torch, given) if isinstance(given, str) and given != "auto" else teacher.dtype or torch.float32
    colocated = values["use_vllm"] and values["vllm_mode"] == "colocate" and not values["vllm_enable_sleep_mode"]
    engine = values["vllm_gpu_memory_utilization"] * gpu_gib if colocated else 0.0
    return Workload(
        batch=batch,
        rollout=max(batch * accumulated, -(-per_rollout // 8) if per_rollout else 0),
        accumulated=accumulated,
        tokens=values["max_length"] or values["max_new_tokens"],
        weight_bytes=2 if values["dtype"] in ("bfloat16", "float16") else 4,
        compute_bytes=2 if half else 4,
        teacher_bytes=torch.empty(0, dtype=dtype).element_size(),
        checkpointing=bool(values["gradient_checkpointing"]),
        chunk_gib=values["head_chunk_gib"] or 1.0,
        vllm_gib=engine if values["use_vllm"] else None,
    )


def _load(values: dict[str, Any], field: str) -> PretrainedConfig:
    kwargs = {"trust_remote_code": values["trust_remote_code"]}
    if field == "model_name_or_path" and values["model_revision"]:
        kwargs["revision"] = values["model_revision"]
    return load_config(str(values[field]), field, **kwargs)


def _table(found: dict[tuple[str, str], dict[str, float]], limit: float) -> Table:
    table = Table(title=f"GiB a GPU, of {limit:.0f} that can be used", box=None, show_header=False)
    table.add_column(no_wrap=True)
    for _ in found:
        table.add_column(justify="right", min_width=7)
    for side, label in enumerate(("student by", "teacher as")):
        names = (placement[side].replace("_", " ") for placement in found)  # where it may be broken
        table.add_row(label, *names, style="bold")
    for part in next(iter(found.values())):
        table.add_row(part, *(f"{parts[part]:.1f}" for parts in found.values()))
    totals = [sum(parts.values()) for parts in found.values()]
    table.add_row("in all", *(f"{total:.1f}" for total in totals), style="bold")
    table.add_row("", *("fits" if total <= limit else "-" for total in totals))
    return table
