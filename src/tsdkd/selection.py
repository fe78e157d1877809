"""Selects the tokens of each loss term, as pure functions on entropies: opener, most uncertain tokens, gate, adaptive
c.

Every response (row) is judged on its own. Masks may have holes and may start anywhere; a row without a token gives an
empty selection. Nothing here has a gradient.
"""

import torch
from torch import Tensor


def token_index(mask: Tensor, count: int | None = None) -> Tensor:
    """Positions at which a mask is true.

    Taken once a micro-batch and used throughout: the host must wait for the device to learn N, and each indexing by
    the mask itself would be another wait.

    Args:
        mask: `[B, T]` bool with N true entries.
        count: N, where the host knows it: then it doesn't wait.

    Returns:
        `[N]`, int64, places in the flattened mask, ascending.
    """
    flat = mask.flatten()
    return (flat.nonzero() if count is None else torch.nonzero_static(flat, size=count)).squeeze(-1)


def opener_mask(student_entropy: Tensor, mask: Tensor, ratio: float | Tensor = 0.1) -> Tensor:
    """The opener of each response: its shortest prefix that holds `ratio` of its entropy (TSD-KD Sec. 3.1).

    Args:
        student_entropy: `[B, T]`, nats.
        mask: `[B, T]` bool, the response's tokens.
        ratio: c, a number or `[B]`, in (0, 1].

    Returns:
        `[B, T]` bool; at least one token in every row that has any, even when the total entropy is zero.
    """
    # float64: with float32 sums over thousands of tokens the cut moves by a token
    entropy = student_entropy.detach().double().masked_fill(~mask, 0.0)
    reached = entropy.cumsum(-1)
    before = torch.cat([torch.zeros_like(reached[:, :1]), reached[:, :-1]], dim=-1)
    # a float32 ratio may be 1e-8 above its decimal: without the margin equal entropies need one token more
    ratio = ratio.to(entropy) if isinstance(ratio, Tensor) else ratio
    threshold = ratio * entropy.sum(-1) * (1 - 1e-7)
    first = mask & (mask.cumsum(-1) == 1)
    return mask & (before < threshold.unsqueeze(-1)) | first


def top_entropy_mask(student_entropy: Tensor, mask: Tensor, ratio: float = 0.1) -> Tensor:
    """The `ceil(ratio * L)` most uncertain tokens of each response (TSD-KD Eq. 12).

    Args:
        student_entropy: `[B, T]`, nats.
        mask: `[B, T]` bool, the response's tokens.
        ratio: in (0, 1].

    Returns:
        `[B, T]` bool; at least one token in every row that has any. Of equal entropies the earlier token is taken.
    """
    # 0.28 * 25 is 7.000000000000001: without the margin the ceiling takes an eighth token
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
    """The opener's share c for a moving average of the difficulty C (TSD-KD A.7).

    Args:
        difficulty: in [0, 1], `C = sigmoid(mean student entropy - mean teacher entropy)` averaged over responses.

    Returns:
        0.05, 0.10, 0.15 or 0.20.

    Raises:
        ValueError: `difficulty` is outside [0, 1].
    """
    if not 0.0 <= difficulty <= 1.0:
        raise ValueError(f"difficulty must be in [0, 1], found {difficulty}")
    return (0.05, 0.10, 0.15, 0.20, 0.20)[int(difficulty * 4)]
