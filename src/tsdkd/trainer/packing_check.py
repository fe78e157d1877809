"""Checks that a model keeps the sequences of a row apart."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..config.base import TokenSelectiveConfig
from ..data import pack_sequences
from ..errors import first_line
from ..lm_head.fused import compute_dtype
from ..models.loading import unwrap_peft
from .forward import forward_backbone, model_inputs, run_as_forward

_LENGTHS = (9, 7)
_MODEL_ERRORS = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)  # of a forward without position_ids


@torch.no_grad()
def explain_unpackable(accelerator: Accelerator, args: TokenSelectiveConfig, model: nn.Module) -> str | None:
    """Explain why a model can't process several sequences in one row, or return None if it can.

    Compares the model's outputs for two short sequences, packed and alone. Recurrent models carry their state from
    one sequence to the next, and some models ignore `position_ids`; both would change the loss without an error. All
    processes must call it and get the same result.
    """
    unwrapped = accelerator.unwrap_model(model)
    vocab_size = unwrap_peft(unwrapped).config.get_text_config().vocab_size
    ids = torch.arange(sum(_LENGTHS), device=accelerator.device) % vocab_size
    was_training = model.training
    model.eval()
    try:
        with accelerator.autocast():
            difference = run_as_forward(model, unwrapped, _relative_difference, unwrapped, args.fused_head, ids)
            tolerance = max(1e-3, 16 * torch.finfo(compute_dtype(difference)).eps)
    except _MODEL_ERRORS as error:
        return f"{_class_name(unwrapped)}: {type(error).__name__}: {first_line(error)}"
    finally:
        model.train(was_training)
    largest = float(accelerator.gather(difference.float().view(1)).max())
    if not largest > tolerance:  # with NaN, the step itself will stop the run
        return None
    return f"{_class_name(unwrapped)}: a sequence's hidden states change by {largest:.1%} if another is in its row"


def _class_name(model: nn.Module) -> str:
    return type(unwrap_peft(model)).__name__


def _relative_difference(model: Any, is_backbone: bool, ids: Tensor) -> Tensor:
    """Return how much a sequence's outputs change if another one precedes it in the row; norms, relative, scalar."""

    def forward(batch: dict[str, Any]) -> Tensor:
        inputs = model_inputs(model, batch)
        states: Tensor = forward_backbone(model, inputs) if is_backbone else model(**inputs).logits
        return states[0, -_LENGTHS[1] :]

    sequences = ids.split(_LENGTHS)
    packed = pack_sequences([s.tolist() for s in sequences], [[0, 1]])
    packed = {name: value.to(ids.device) if isinstance(value, Tensor) else value for name, value in packed.items()}
    expected, found = forward({"input_ids": sequences[1][None]}), forward({"packed": packed})
    return (found - expected).norm() / expected.norm()
