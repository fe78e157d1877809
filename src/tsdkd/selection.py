"""Token selection for each loss term, as pure functions of entropies: opener, most uncertain tokens, gate, adaptive c.

Each response (row) is handled independently. Masks may have gaps and may start anywhere. A row without tokens gives an
empty selection. None of these functions has a gradient.
"""

import torch
from torch import Tensor


def token_index(mask: Tensor, count: int | None = None) -> Tensor:
    """Return the positions at which a mask is true.

    Compute them once per micro-batch and reuse them: the host must synchronize with the device to learn N, and each
    indexing with the mask itself would synchronize again.

    Args:
        mask: `[B, T]` bool with N true entries.
        count: N, if the host knows it; this avoids the synchronization.

    Returns:
        `[N]`, int64, ascending indices into the flattened mask.
    """
    flat = mask.flatten()
    return (flat.nonzero() if count is None else torch.nonzero_static(flat, size=count)).squeeze(-1)


def opener_mask(student_entropy: Tensor, mask: Tensor, ratio: float | Tensor = 0.1) -> Tensor:
    """Select each response's opener: its shortest prefix with the fraction `ratio` of its entropy (TSD-KD Sec. 3.1).

    Args:
        student_entropy: `[B, T]`, nats.
        mask: `[B, T]` bool, the response's tokens.
        ratio: c, a number or `[B]`, in (0, 1].

    Returns:
        `[B, T]` bool; at least one token in every nonempty row, even if the total entropy is zero.
    """
    # float64: with float32, sums over thousands of tokens can shift the cut by one token
    entropy = student_entropy.detach().double().masked_fill(~mask, 0.0)
    reached = entropy.cumsum(-1)
    before = torch.cat([torch.zeros_like(reached[:, :1]), reached[:, :-1]], dim=-1)
    # a float32 ratio may be 1e-8 above its decimal value; without the margin, equal entropies need one more token
    ratio = ratio.to(entropy) if isinstance(ratio, Tensor) else ratio
    threshold = ratio * entropy.sum(-1) * (1 - 1e-7)
    first = mask & (mask.cumsum(-1) == 1)
    return mask & (before < threshold.unsqueeze(-1)) | first


def top_entropy_mask(student_entropy: Tensor, mask: Tensor, ratio: float = 0.1) -> Tensor:
    """Select the `ceil(ratio * L)` most uncertain tokens of each response (TSD-KD Eq. 12).

    Args:
        student_entropy: `[B, T]`, nats.
        mask: `[B, T]` bool, the response's tokens.
        ratio: in (0, 1].

    Returns:
        `[B, T]` bool; at least one token in every nonempty row. If entropies are equal, earlier tokens come first.
    """
    # 0.28 * 25 is 7.000000000000001; without the margin, the ceiling would be 8
    count = (mask.sum(-1).double() * ratio - 1e-9).ceil().clamp(min=1)
    order = student_entropy.detach().masked_fill(~mask, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(mask.shape[-1], device=mask.device).expand_as(order)
    )
    return mask & (rank < count.unsqueeze(-1))


def entropy_gap_gate(student_entropy: Tensor, teacher_entropy: Tensor, temperature: float = 1.0) -> Tensor:
    """Weight of a token in direct distillation: `sigmoid((H_student - H_teacher) / temperature)` (TSD-KD Eq. 11).

    Args:
        student_entropy: `[...]`, nats.
        teacher_entropy: `[...]`, nats.
        temperature: tau > 0, nats.

    Returns:
        `[...]` in (0, 1), detached (TSD-KD A.2).
    """
    return torch.sigmoid((student_entropy.detach() - teacher_entropy.detach()) / temperature)


def adaptive_opener_ratio(difficulty: float) -> float:
    """Return the opener ratio c for a moving average of the difficulty C (TSD-KD A.7).

    Args:
        difficulty: in [0, 1]; `C = sigmoid(mean student entropy - mean teacher entropy)`, averaged over responses.

    Returns:
        0.05, 0.10, 0.15 or 0.20.

    Raises:
        ValueError: `difficulty` is outside [0, 1].
    """
    if not 0.0 <= difficulty <= 1.0:
        raise ValueError(f"difficulty must be in [0, 1], found {difficulty}")
    return (0.05, 0.10, 0.15, 0.20, 0.20)[int(difficulty * 4)]
