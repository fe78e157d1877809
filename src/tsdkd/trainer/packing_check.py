"""Checks that a model keeps the sequences of a row apart."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn

from ..config.base import TokenSelectiveConfig
from ..data import pack_sequences
from ..errors import first_line
from ..lm_head.fused import compute_dtype
from ..models.loading import unwrap_peft
from .forward import class_name, forward_backbone, model_inputs, run_as_forward

_LENGTHS = (9, 7)
_MODEL_ERRORS = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)  # of a forward without position_ids


@torch.no_grad()
def explain_unpackable(accelerator: Accelerator, args: TokenSelectiveConfig, model: nn.Module) -> str | None:
    """Explain why a model can't process several sequences in one row, or return None if it can.

    Compares the model's outputs for a short sequence alone and behind two other ones. Recurrent models carry their
    state from one sequence to the next, and some models ignore `position_ids`; both would change the loss without an
    error. All processes must call it and get the same result.
    """
    unwrapped = accelerator.unwrap_model(model)
    vocab_size = unwrap_peft(unwrapped).config.get_text_config().vocab_size
    ids = torch.arange(_LENGTHS[0] + sum(_LENGTHS), device=accelerator.device) % vocab_size
    was_training = model.training
    model.eval()
    error, excess = "", torch.full((), torch.inf, device=accelerator.device)
    try:
        with accelerator.autocast():
            excess = run_as_forward(model, unwrapped, _measure, unwrapped, args.fused_head, ids)
    except torch.OutOfMemoryError:
        raise
    except _MODEL_ERRORS as caught:
        error = f"{type(caught).__name__}: {first_line(caught)}"
    finally:
        model.train(was_training)
    largest = float(accelerator.gather(excess.float().view(1)).max())  # also after an error: the others wait here
    if not largest > 1:  # with NaN, the step itself will stop the run
        return None
    return f"{class_name(unwrapped)}: {error or 'its hidden states of a sequence change if another is in its row'}"


def _measure(model: Any, is_backbone: bool, ids: Tensor) -> Tensor:
    """Return how much a sequence's outputs change with the row's other sequence, relative to what is tolerated.

    Two different predecessors give passes of the same shape, so no rounding hides a leak. The sequence alone shows
    positions that don't restart; there rounding must be tolerated.
    """

    def forward(batch: dict[str, Any]) -> Tensor:
        inputs = model_inputs(model, batch)
        states: Tensor = forward_backbone(model, inputs) if is_backbone else model(**inputs).logits
        return states[0, -_LENGTHS[1] :]

    def behind(first: Tensor) -> Tensor:
        packed = pack_sequences([first.tolist(), last.tolist()], [[0, 1]])
        return forward({"packed": send_to_device(packed, ids.device)})

    one, other, last = ids.split((_LENGTHS[0], *_LENGTHS))
    a, b, alone = behind(one), behind(other), forward({"input_ids": last[None]})
    tolerance = max(1e-3, 16 * torch.finfo(compute_dtype(a)).eps)
    a, b, alone = a.float(), b.float(), alone.float()
    return torch.maximum((a - b).norm() / 1e-3, (a - alone).norm() / tolerance) / alone.norm()
