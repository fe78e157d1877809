"""Nested state (of an optimizer, of random generators, of a rollout) in one safetensors file: its tensors as they are,
the rest as JSON in the file's header. Nothing is pickled, so a file from a stranger can't run anything."""

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
        TypeError: something else is in it.
        OSError, SafetensorError: the file can't be written.
    """
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_extract_tensors(state, tensors))
    save_file(tensors, str(path), metadata={"state": structure})


def load_state(path: str | Path) -> Any:
    """Load a state that `save_state` wrote, bit for bit, on the CPU. Raises `OSError`, `SafetensorError`."""
    with safe_open(str(path), framework="pt") as file:
        return _restore_tensors(json.loads(file.metadata()["state"]), file)


def _extract_tensors(state: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(state, Tensor):
        name = str(len(tensors))
        tensors[name] = state.detach().to("cpu", copy=True).contiguous()  # safetensors refuses memory that is shared
        return {"tensor": name}
    if isinstance(state, dict):  # JSON's keys are strings, ours are numbers too
        return {"dict": [[_extract_tensors(part, tensors) for part in item] for item in state.items()]}
    if isinstance(state, (list, tuple)):
        return {"tuple" if isinstance(state, tuple) else "list": [_extract_tensors(part, tensors) for part in state]}
    if isinstance(state, _JSON_TYPES):
        return state
    raise TypeError(f"a checkpoint holds tensors, numbers and text, found {type(state).__name__}")


def _restore_tensors(structure: Any, file: Any) -> Any:
    if not isinstance(structure, dict):
        return structure
    ((kind, content),) = structure.items()
    if kind == "tensor":
        return file.get_tensor(content)
    if kind == "dict":
        return {_restore_tensors(key, file): _restore_tensors(value, file) for key, value in content}
    return {"list": list, "tuple": tuple}[kind](_restore_tensors(part, file) for part in content)
