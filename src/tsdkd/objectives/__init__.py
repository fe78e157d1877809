"""What a method is: which terms it has and how they add up. One file a method, defaults from its paper.

An objective sees the tokens of one micro-batch and returns *sums*; the trainer divides once, by a count over the
global batch, so that any split into micro-batches and processes gives the same update.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class ObjectiveOutput:
    """Sums of one micro-batch.

    Attributes:
        terms: each term's sum over the objective's unit (responses or tokens), scalar, differentiable.
        weights: each term's factor in the loss.
        metrics: name -> (sum, count), scalars without gradient; what is logged is sum / count.
    """

    terms: dict[str, Tensor]
    weights: dict[str, float]
    metrics: dict[str, tuple[Tensor, Tensor]]

    @property
    def loss(self) -> Tensor:
        """The weighted sum of the terms' sums, scalar."""
        return sum(
            (self.weights[name] * term for name, term in self.terms.items()),
            start=next(iter(self.terms.values())) * 0.0,
        )


def mean_of(values: Tensor) -> tuple[Tensor, Tensor]:
    """`(sum, count)` of a tensor's elements, as a metric."""
    values = values.detach().float()
    return values.sum(), values.new_tensor(values.numel())
