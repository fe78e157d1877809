"""Places the teacher independently of the student's ZeRO stage: replicated, sharded, in host memory, or on servers."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_deepspeed_available
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import (
    HfDeepSpeedConfig,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from ..config.base import TokenSelectiveConfig
from ..config.logs import get_logger
from ..errors import ConfigError, install_hint
from ..files import shorten_path
from .finite_weights import require_finite
from .loading import load_frozen_model
from .served_teacher import load_served_teacher

logger = get_logger(__name__)


def load_teacher(name: str | PreTrainedModel, config: PretrainedConfig, args: TokenSelectiveConfig) -> PreTrainedModel:
    """Load the teacher directly to this process's device, or, if it is sharded, only this process's shard.

    An already loaded teacher is returned unchanged.

    Raises:
        ModelError: the teacher can't be loaded, or its weights are not finite.
        ConfigError: the placement requires DeepSpeed, which is not installed, or a teacher that isn't loaded yet.
        EngineError: no teacher server answers.
    """
    if not isinstance(name, str) and args.teacher_placement == "server":
        raise ConfigError(["teacher_placement: server needs the teacher's path or hub id, found a loaded model"])
    if not isinstance(name, str):
        require_finite(name, "teacher_model")
        return name
    logger.info(f"loading the teacher {shorten_path(name)}")
    dtype = (args.teacher_model_init_kwargs or {}).get("dtype", "auto")
    dtype = getattr(torch, dtype, None) or config.dtype or torch.float32
    sharded = _is_sharded(args)
    if sharded:
        _init_process_group(args)
    with _override_hf_deepspeed_config(_zero3_config(config, dtype, args) if sharded else None, args):
        if args.teacher_placement == "server":
            return load_served_teacher(name, config, args)
        return load_frozen_model(name, args, device=None if sharded else args.device)


def prepare_teacher(teacher: PreTrainedModel, accelerator: Accelerator, args: TokenSelectiveConfig) -> nn.Module:
    """Prepare a loaded teacher for inference and place it on its devices. Raises `ConfigError`."""
    teacher.requires_grad_(False).eval()
    if not _is_sharded(args):
        if accelerator.state.deepspeed_plugin is not None:  # accelerate would prepare it for training
            return teacher.to(accelerator.device)
        return accelerator.prepare_model(teacher, evaluation_mode=True)
    import deepspeed

    _init_process_group(args)
    engine, *_ = deepspeed.initialize(model=teacher, config=_zero3_config(teacher.config, teacher.dtype, args))
    engine.eval()
    return engine


def _is_sharded(args: TokenSelectiveConfig) -> bool:
    placement = args.teacher_placement or ("zero3" if _student_is_sharded(args) else "replica")
    if placement in ("replica", "server"):
        return False
    if not is_deepspeed_available():
        raise ConfigError([f"teacher_placement: {placement} requires DeepSpeed; {install_hint('deepspeed')}"])
    return True


def _student_is_sharded(args: TokenSelectiveConfig) -> bool:
    return args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3


def _zero3_config(config: PretrainedConfig, dtype: torch.dtype, args: TokenSelectiveConfig) -> dict[str, Any]:
    """Return the DeepSpeed configuration for inference; bucket sizes are those of transformers."""
    hidden = config.get_text_config().hidden_size
    zero: dict[str, Any] = {
        "stage": 3,
        "stage3_prefetch_bucket_size": int(0.9 * hidden * hidden),
        "stage3_param_persistence_threshold": 10 * hidden,
    }
    if args.teacher_placement == "cpu_offload":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "train_micro_batch_size_per_gpu": 1,  # required by DeepSpeed, but not used
        "steps_per_print": 2**31,
    }


@contextmanager
def _override_hf_deepspeed_config(config: dict[str, Any] | None, args: TokenSelectiveConfig) -> Iterator[None]:
    """Replace the global DeepSpeed configuration, by which `from_pretrained` shards, and which is the student's."""
    unset_hf_deepspeed_config()
    hf_config = HfDeepSpeedConfig(config) if config else None  # must stay alive until the model is loaded
    try:
        yield
    finally:
        del hf_config
        unset_hf_deepspeed_config()
        own = getattr(args, "hf_deepspeed_config", None)  # from the argument `deepspeed`
        if own is not None:
            set_hf_deepspeed_config(own)
        elif args.deepspeed_plugin is not None:
            args.deepspeed_plugin.set_deepspeed_weakref()


def _init_process_group(args: TokenSelectiveConfig) -> None:
    """Initialize a process group, which DeepSpeed requires even for one process."""
    if not torch.distributed.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")
        backend = "nccl" if args.device.type == "cuda" else "gloo"
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
