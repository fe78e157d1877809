"""Stores nested state (of an optimizer, random generators, a rollout) in one safetensors file.

Tensors are stored unchanged, everything else as JSON in the header. No pickle is used, so an untrusted file can't run
code.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_JSON_TYPES = (bool, int, float, str, type(None))


def save_state(state: Any, path: str | Path) -> None:
    """Write dictionaries, lists and tuples of tensors, numbers, strings and None.

    Raises:
        TypeError: the state contains other types.
        OSError, SafetensorError: the file can't be written.
    """
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_extract_tensors(state, tensors))
    save_file(tensors, str(path), metadata={"state": structure})


def load_state(path: str | Path) -> Any:
    """Load a state written by `save_state`, bitwise equal, on the CPU. Raises `OSError`, `SafetensorError`."""
    with safe_open(str(path), framework="pt") as file:
        return _restore_tensors(json.loads(file.metadata()["state"]), file)


def _extract_tensors(state: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(state, Tensor):
        name = str(len(tensors))
        tensors[name] = state.detach().to("cpu", copy=True).contiguous()  # safetensors rejects shared memory
        return {"tensor": name}
    if isinstance(state, dict):  # JSON keys are strings, but ours may be numbers
        return {"dict": [[_extract_tensors(part, tensors) for part in item] for item in state.items()]}
    if isinstance(state, (list, tuple)):
        return {"tuple" if isinstance(state, tuple) else "list": [_extract_tensors(part, tensors) for part in state]}
    if isinstance(state, _JSON_TYPES):
        return state
    raise TypeError(f"a checkpoint can contain only tensors, numbers and text, found {type(state).__name__}")


def _restore_tensors(structure: Any, file: Any) -> Any:
    if not isinstance(structure, dict):
        return structure
    ((kind, content),) = structure.items()
    if kind == "tensor":
        return file.get_tensor(content)
    if kind == "dict":
        return {_restore_tensors(key, file): _restore_tensors(value, file) for key, value in content}
    return {"list": list, "tuple": tuple}[kind](_restore_tensors(part, file) for part in content)
