"""Chooses the weights of loss terms from the norms of their gradients (`term_balance`). Ours, not a paper's."""

import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from ..config.base import TokenSelectiveConfig
from ..config.coercion import did_you_mean, shorten
from ..errors import ConfigError
from ..objective import Objective, ObjectiveOutput
from .metrics import MetricAccumulator

# On a pair of small models, a measurement every 5 steps comes hardly closer to the shares: what is left is the noise
# of single batches. With one every 20 steps, the weights lag behind the student.
_MEASURE_EVERY = 10
_NEWEST = 0.5  # weight of the newest measurement in the moving average


class TermBalance:
    """Chooses the weights `w_t` of some terms `L_t` of the loss so that their gradients have given norms:

        |w_t| |grad L_t| = share_t |w_1| |grad L_1|

    `L_1` is the first term, whose weight stays. Gradients are those of the global batch, with respect to all trained
    parameters. The ratio of the two norms is measured in the first optimizer step and every 10 steps; its logarithm
    is averaged exponentially, with weight 0.5 for the newest. The new weights hold from the next step on, and have
    the signs of the configured ones.

    A measurement whose norms are zero or not finite is ignored.

    Args:
        accelerator: sums gradients over processes.
        objective: gets the weights (`Objective.balanced_weights`).
        shares: `share_t` of each term to balance (`check_term_balance`).
        metrics: gets `term_weight/<term>` in each step, and `term_share/<term>`, the measured share.
    """

    def __init__(
        self, accelerator: Accelerator, objective: Objective, shares: Mapping[str, float], metrics: MetricAccumulator
    ) -> None:
        self.is_due = False
        self._accelerator, self._objective, self._shares, self._metrics = accelerator, objective, shares, metrics
        self._first = _weighted_terms(objective)[0]
        self._log_ratios: dict[str, float] = {}  # averages of log(|grad L_t| / |grad L_1|)
        self._micro_batches_left = 0
        self._sums: dict[str, list[Tensor]] = {}  # gradients of the micro-batches so far

    def start_step(self, step: int, num_micro_batches: int) -> None:
        """Log the weights of an optimizer step, and decide whether to measure in it (`is_due`)."""
        self.is_due, self._micro_batches_left = step % _MEASURE_EVERY == 0, num_micro_batches
        self._sums.clear()  # of a step that an error ended
        weights = self._objective.current_weights
        for name in self._shares:
            self._metrics.add(f"term_weight/{name}", weights[name], 1)

    def add(self, output: ObjectiveOutput, num_items: Tensor, model: nn.Module) -> None:
        """Add the gradients of a micro-batch. After the last one of a step, set the weights.

        All processes must call it for the last one together. Until then, one gradient per term is kept.

        Args:
            output: of the objective; its graph is kept.
            num_items: number of units in the global batch.
            model: the student, wrapped for training.

        Raises:
            ConfigError: the objective has not used the weights.
        """
        self._check_weights(output)
        parameters = [p for p in model.parameters() if p.requires_grad]
        self._micro_batches_left -= 1
        is_last, norms = self._micro_batches_left == 0, []
        for name in (self._first, *self._shares):
            gradients = _gradients(output.terms[name] / num_items.clamp(min=1), parameters)
            if name in self._sums:
                gradients = list(map(torch.add, gradients, self._sums.pop(name)))
            if is_last:
                norms.append(self._global_norm(gradients))
            else:
                self._sums[name] = gradients
        if is_last:
            # rank 0's, so that rounding can't make the weights differ
            self._update(*broadcast(torch.stack(norms)).tolist())

    def _check_weights(self, output: ObjectiveOutput) -> None:
        weights = self._objective.current_weights
        if any(output.weights.get(name) != weights[name] for name in (self._first, *self._shares)):
            name = type(self._objective).__name__
            raise ConfigError([f"term_balance: {name}.loss must weight its terms by current_weights"])

    def _global_norm(self, gradients: list[Tensor]) -> Tensor:
        """Norm of a gradient, summed over processes, float32."""
        return torch.stack([self._accelerator.reduce(g, reduction="sum").float().norm() for g in gradients]).norm()

    def _update(self, first_norm: float, *norms: float) -> None:
        weights = self._objective.current_weights
        for name, norm in zip(self._shares, norms, strict=True):
            if not (0 < norm < math.inf and 0 < first_norm < math.inf):
                continue
            measured = math.log(norm / first_norm)
            share = abs(weights[name] / weights[self._first]) * norm / first_norm
            self._metrics.add(f"term_share/{name}", share, 1)
            average = self._log_ratios.get(name, measured)
            self._log_ratios[name] = average + _NEWEST * (measured - average)
        self._set_weights()

    def _set_weights(self) -> None:
        configured = self._objective.loss_weights
        first = abs(configured[self._first])
        self._objective.balanced_weights = {
            name: math.copysign(self._shares[name] * first * math.exp(-average), configured[name])
            for name, average in self._log_ratios.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the state to store in a checkpoint."""
        return {"log_ratios": dict(self._log_ratios)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict()`, and the weights."""
        self._log_ratios = {name: state["log_ratios"][name] for name in self._shares if name in state["log_ratios"]}
        self._set_weights()


def check_term_balance(args: TokenSelectiveConfig, objective: Objective) -> None:
    """Raise `ConfigError` if `term_balance` names other terms than the objective's, or can't be measured."""
    if not args.term_balance:
        return
    try:
        first, *others = _weighted_terms(objective)
    except NotImplementedError as error:
        raise ConfigError([f"term_balance: {type(objective).__name__} has no loss_weights; remove it"]) from error
    if not others:
        raise ConfigError([f"term_balance: the loss of {args.method} has a single term, {first}; remove it"])
    problems = []
    for name in args.term_balance:
        if name == first:
            problems.append(f"term_balance: {name} is the term that others are compared with; remove it")
        elif name not in others:
            expected = f"must name terms of {args.method} with a weight: {', '.join(others)}"
            problems.append(f"term_balance: {expected}, found {shorten(name)}{did_you_mean(str(name), others)}")
    if args.deepspeed_plugin is not None or os.environ.get("ACCELERATE_USE_FSDP") == "true":
        problems.append("term_balance: not available with DeepSpeed or FSDP, only with one process or DDP")
    if args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        problems.append("gradient_checkpointing_kwargs: use_reentrant must be false with term_balance, found true")
    if problems:
        raise ConfigError(problems)


def _weighted_terms(objective: Objective) -> list[str]:
    return [name for name, weight in objective.loss_weights.items() if weight != 0]


def _gradients(term: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Gradients of a term, zero where it doesn't depend on a parameter."""
    if not term.requires_grad:  # there are no tokens
        return [torch.zeros_like(p) for p in parameters]
    return list(torch.autograd.grad(term, parameters, retain_graph=True, materialize_grads=True))
