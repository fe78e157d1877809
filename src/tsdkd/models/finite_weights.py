"""Detects weights that are not finite before anything is written, because all results with them would be NaN."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import ModelError
from .hub import load_pretrained

_CHUNK = 2**26  # numbers checked at a time, to bound the memory of copies


def require_finite(model: nn.Module, field: str, name: str = "the model") -> None:
    """Raise `ModelError` if a parameter is not finite, or a buffer contains NaN (masks may contain infinity).

    If DeepSpeed shards the model, each process checks its part, and all processes raise. All must call it.
    """
    found = _first_nonfinite(_own_parts(model.named_parameters()))
    found = found or _first_nonfinite(model.named_buffers(), nan_only=True)
    if any(hasattr(parameter, "ds_tensor") for parameter in model.parameters()):
        found = next(filter(None, gather_object([found])), None)
    _raise_if(found, field, name)


def require_finite_files(name: str, field: str, revision: str | None) -> None:
    """Raise `ModelError` if a safetensors file of a local or hub model contains a number that is not finite."""

    def find(name: str) -> str | None:
        is_folder = Path(name).is_dir()
        folder = name if is_folder else snapshot_download(name, revision=revision, allow_patterns="*.safetensors")
        return _first_nonfinite(_read_tensors(Path(folder)))

    _raise_if(load_pretrained(find, name, field, "model"), field, name)


def _raise_if(found: str | None, field: str, name: str) -> None:
    if found is not None:
        raise ModelError(f"{field}: the weights of {name} are not finite: {found}")


def _own_parts(parameters: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters, or this process's shard of each with ZeRO-3, without its uninitialized padding."""
    for name, parameter in parameters:
        if not hasattr(parameter, "ds_tensor"):
            yield name, parameter
            continue
        part = parameter.ds_tensor
        start = torch.distributed.get_rank(parameter.ds_process_group) * part.numel()
        yield name, part[: max(0, parameter.ds_numel - start)]


def _read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                yield name, file.get_tensor(name)


def _first_nonfinite(tensors: Iterable[tuple[str, Tensor]], nan_only: bool = False) -> str | None:
    """Return the name of the first tensor that is not finite and what it contains, or None."""
    for name, tensor in tensors:
        if not tensor.is_floating_point() or tensor.is_meta or "float4" in str(tensor.dtype):  # always finite
            continue
        for part in tensor.detach().flatten().split(_CHUNK):
            if part.numel() == 0:
                continue
            # several times as fast as `isfinite`, without allocation; float8 has no such kernel
            low, high = torch.aminmax(part.float() if part.dtype.itemsize == 1 else part)
            if low.isnan():
                return f"{name} contains NaN"
            if not nan_only and (low.isinf() or high.isinf()):
                return f"{name} contains infinity"
    return None
