"""Samples a token from a distribution with one uniform number; shared by student rollouts and vLLM on a CPU."""

import torch
from torch import Tensor

_BLOCK = 256


def sample_tokens(logits: Tensor, uniform: Tensor, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the tokens at which the cumulative distributions exceed `uniform`.

    Args:
        logits: `[B, V]`, temperature applied.
        uniform: `[B]`, float64 in [0, 1).
        top_p: probability mass of the nucleus.

    Returns:
        Ids `[B]` and their log-probabilities `[B]`, float64, nats, renormalized over the nucleus.
    """
    probs = logits.float().softmax(-1)
    if top_p < 1.0:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        outside = ordered.cumsum(-1, dtype=torch.float64) - ordered >= top_p  # always keeps the first token
        probs = probs.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), 0.0)
    if probs.shape[-1] <= _BLOCK:
        total = probs.sum(-1, True, dtype=torch.float64)
        ids, _ = _inverse_cdf(probs.double(), uniform)
    else:
        ids, total = _draw_in_blocks(probs, uniform)
    return ids.squeeze(-1), (probs.gather(-1, ids).double() / total).log().squeeze(-1)


def _draw_in_blocks(probs: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a block, then a token in it. A cumulative sum over all tokens takes several times as long as the softmax.

    Returns:
        Ids and the sum of `probs`, float64, both `[B, 1]`.
    """
    whole = probs.shape[-1] // _BLOCK * _BLOCK
    parts = (probs[:, :whole].reshape(probs.shape[0], -1, _BLOCK), probs[:, None, whole:])
    sums = torch.cat([part.sum(-1, dtype=torch.float64) for part in parts], dim=-1)
    block, share = _inverse_cdf(sums, uniform)
    places = block * _BLOCK + torch.arange(_BLOCK, device=probs.device)
    inside = probs.gather(-1, places.clamp(max=probs.shape[-1] - 1)).double() * (places < probs.shape[-1])
    position, _ = _inverse_cdf(inside, share)
    ids = (block * _BLOCK + position).clamp(max=probs.shape[-1] - 1)  # out of range for non-finite logits
    return ids, sums.sum(-1, True)


def _inverse_cdf(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Find the position where the cumulative weight exceeds the fraction `uniform` of the total.

    Returns:
        The position `[B, 1]`, and the fraction of its weight that lies below that point `[B]`.
    """
    cumulative = weights.cumsum(-1)
    target = uniform.clamp(max=1 - 2**-52).unsqueeze(-1) * cumulative[:, -1:]  # always below the total
    position = torch.searchsorted(cumulative, target, right=True).clamp(max=weights.shape[-1] - 1)
    weight = weights.gather(-1, position)
    return position, ((target - cumulative.gather(-1, position)) / weight + 1).clamp(min=0).squeeze(-1)
