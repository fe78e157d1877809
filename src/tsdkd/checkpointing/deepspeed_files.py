"""Restricts the pickles in which DeepSpeed stores its part of a checkpoint.

DeepSpeed would run any code in them. Here, they may contain only tensors, numbers, and the few classes that DeepSpeed
uses.
"""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import CheckpointError


@contextmanager
def safe_deepspeed_load() -> Iterator[None]:
    """Within the block, DeepSpeed's `load_checkpoint` raises `CheckpointError` for files with other contents."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def member(owner: Any, name: str) -> Any:
        if owner is not ZeroStageEnum:
            raise pickle.UnpicklingError(f"getattr of {owner}")
        return owner[name]

    classes = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    allowed = [*classes, (member, "builtins.getattr")]  # Python 3.11.0 to 3.11.3 pickles enums as getattr

    def load(self: TorchCheckpointEngine, path: str, map_location: Any = None) -> Any:
        try:
            with torch.serialization.safe_globals(allowed):
                return torch.load(path, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"resume: {path} contains code or was not written by DeepSpeed; it was not loaded"
            ) from error

    original_load, TorchCheckpointEngine.load = TorchCheckpointEngine.load, load
    try:
        yield
    finally:
        TorchCheckpointEngine.load = original_load
