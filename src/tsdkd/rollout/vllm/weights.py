"""Provides an engine with the merged weights of a student with adapters, without changing the student."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def iter_merged_parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of each parameter of a `PeftModel`'s base model with its adapters merged.

    Merging and unmerging causes rounding errors in the base weights. Therefore each layer's weights are saved and
    restored bitwise before its merged weights are yielded.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer  # an extra

    tuned = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    for name, module in tuned.items():
        yield from ((_base_model_name(f"{name}.{part}"), value) for part, value in _merge_layer(module).items())
    for name, parameter in model.named_parameters():
        in_tuned = any(name.startswith(f"{prefix}.") for prefix in tuned)
        if not in_tuned and model.prefix not in name and "original_module" not in name:
            yield _base_model_name(name), parameter.detach()


def _merge_layer(module: Any) -> dict[str, Tensor]:
    """Return copies of one layer's merged parameters."""
    parameters = dict(module.get_base_layer().named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        module.merge()
        merged = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        module.unmerge()
    finally:
        for name, parameter in parameters.items():
            parameter.copy_(before[name])
    return merged


def _base_model_name(name: str) -> str:
    """Return the parameter's name in the base model."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "").replace("modules_to_save.default.", "")
