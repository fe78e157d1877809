"""One token from a distribution and one uniform number: what the student's own rollouts and a CPU engine share."""

import torch
from torch import Tensor

_BLOCK = 256


def sample_tokens(logits: Tensor, uniform: Tensor, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """The tokens at which the cumulative distributions pass `uniform`.

    Args:
        logits: `[B, V]`, temperature applied.
        uniform: `[B]`, float64 in [0, 1).
        top_p: nucleus mass.

    Returns:
        Ids `[B]` and their log-probabilities `[B]`, float64, nats, of the nucleus if there is one.
    """
    probs = logits.float().softmax(-1)
    if top_p < 1.0:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        outside = ordered.cumsum(-1, dtype=torch.float64) - ordered >= top_p  # the nucleus always has the first token
        probs = probs.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), 0.0)
    # in two steps, as a cumulative sum over the whole vocabulary takes several times as long as the softmax
    whole = probs.shape[-1] // _BLOCK * _BLOCK
    parts = (probs[:, :whole].reshape(len(probs), -1, _BLOCK), probs[:, None, whole:])
    sums = torch.cat([part.sum(-1, dtype=torch.float64) for part in parts], dim=-1)
    block, share = _inverse_cdf(sums, uniform)
    places = block * _BLOCK + torch.arange(_BLOCK, device=probs.device)
    inside = probs.gather(-1, places.clamp(max=probs.shape[-1] - 1)).double() * (places < probs.shape[-1])
    position, _ = _inverse_cdf(inside, share)
    ids = (block * _BLOCK + position).clamp(max=probs.shape[-1] - 1)  # beyond it for logits that aren't finite
    return ids.squeeze(-1), (probs.gather(-1, ids).double() / sums.sum(-1, True)).log().squeeze(-1)


def _inverse_cdf(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Find the position where the cumulative weight passes `uniform` of the total.

    Returns:
        the position `[B, 1]`, and the share of its weight that lies below that point `[B]`.
    """
    cumulative = weights.cumsum(-1)
    target = uniform.clamp(max=1 - 2**-52).unsqueeze(-1) * cumulative[:, -1:]  # always below the total
    position = torch.searchsorted(cumulative, target, right=True).clamp(max=weights.shape[-1] - 1)
    weight = weights.gather(-1, position)
    return position, ((target - cumulative.gather(-1, position)) / weight + 1).clamp(min=0).squeeze(-1)
