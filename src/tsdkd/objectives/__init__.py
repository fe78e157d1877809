"""What a method is: which terms it has and how they add up. One file a method, defaults from its paper.

An objective asks a head (`tsdkd.statistics`) about the tokens of one micro-batch and returns *sums*. The trainer
divides once, by a count over the global batch: any split into micro-batches and processes gives the same update.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class ObjectiveOutput:
    """Sums of one micro-batch.

    Attributes:
        loss: the weighted sum of the terms, scalar, differentiable.
        terms: each term's sum over the objective's unit (responses or tokens), scalar; differentiable where the head
            doesn't differentiate own-token losses by itself.
        weights: each term's factor in the loss.
        metrics: name -> (sum, count), scalars without gradient; what is logged is sum / count.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    weights: dict[str, float]
    metrics: dict[str, tuple[Tensor, Tensor]]


def sampling_metrics(logps: Tensor, sampler_logps: Tensor | None) -> dict[str, tuple[Tensor, Tensor]]:
    """How far the engine that sampled is from the student whose tokens they should be; the names are TRL's.

    Args:
        logps: `[N]`, log-probabilities of the sampled tokens under the student, nats.
        sampler_logps: `[N]`, under the engine, or None.
    """
    if sampler_logps is None:
        return {}
    difference = (logps.detach() - sampler_logps).abs()
    largest = difference.max() if len(difference) else difference.new_zeros(())
    return {
        "sampling/sampling_logp_difference/mean": mean_of(difference),
        "sampling/sampling_logp_difference/max": (largest, largest.new_ones(())),
    }


def mean_of(values: Tensor) -> tuple[Tensor, Tensor]:
    """`(sum, count)` of a tensor's elements, as a metric."""
    values = values.detach().float()
    return values.sum(), values.new_tensor(values.numel())
