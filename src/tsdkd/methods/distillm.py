"""DistiLLM: skew KL on generated, replayed or fixed completions (Ko et al. 2024, arXiv 2402.03898).

The trainer below chooses the completions of each step as in Algorithm 1.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..config.options import AT_LEAST_ONE, FRACTION, NON_NEGATIVE, OPEN_FRACTION, enum_value, option
from ..losses import Divergence, skew_forward_kl, skew_reverse_kl
from ..rollout.base import Completion
from ..rollout.seeding import RandomStream, prompt_generator
from ..trainer.rollouts import column
from ..trainer.trainer import Batch, TokenSelectiveTrainer
from .defaults import NUM_GENERATIONS_UNSUPPORTED, SELF_SAMPLING_UNSUPPORTED, TSDKDDefaults
from .divergence import DivergenceObjective

_NEVER_EVALUATED = (lambda v: enum_value(v["eval_strategy"]) == "no", "eval_strategy is no")


@dataclass
class DistiLLMOptions:
    """Options of DistiLLM's loss."""

    skew: float = option(
        0.1, "The smaller mixture weight: that of P for forward KL, of Q for reverse KL.", OPEN_FRACTION
    )
    skew_kl: Literal["forward", "reverse"] = option("reverse", "Direction of the skew KL divergence.")


@dataclass
class DistiLLMConfig(DistiLLMOptions, TSDKDDefaults):
    """Skew KL on the data set's completions; uses more student completions as the validation loss rises."""

    method = "distillm"
    completions_source = "the data set's; more of the student's (new or replayed) as the validation loss rises"
    paper = "Ko et al. 2024, arXiv 2402.03898"
    always_needs_completions = True
    has_lmbda = False
    unsupported_options = {
        **SELF_SAMPLING_UNSUPPORTED,
        **NUM_GENERATIONS_UNSUPPORTED,
        "teacher_chat_template_kwargs": "the replay buffer keeps only the student's prompts",
    }

    on_policy_share: float = option(0.0, "Initial fraction of rollouts that use student completions.", FRACTION)
    on_policy_share_step: float = option(
        0.1, "Increase of on_policy_share when the validation loss rises.", FRACTION, _NEVER_EVALUATED
    )
    loss_tolerance: float = option(
        0.1, "Rise of the validation loss, in nats, that triggers this increase.", NON_NEGATIVE, _NEVER_EVALUATED
    )
    replay_capacity: int = option(1000, "Size of the replay buffer in completions, over all processes.", AT_LEAST_ONE)


@dataclass
class DistiLLMObjective(DistiLLMOptions, DivergenceObjective):
    """Mean skew KL over tokens."""

    term_name = "skew_kl"

    @property
    def divergence(self) -> Divergence:
        """`KL(P || skew P + (1 - skew) Q)` or `KL(Q || (1 - skew) P + skew Q)`."""
        return {"forward": skew_forward_kl, "reverse": skew_reverse_kl}[self.skew_kl](self.skew)


class DistiLLMTrainer(TokenSelectiveTrainer):
    """DistiLLM (arXiv 2402.03898) with its adaptive off-policy schedule. Arguments: see `TokenSelectiveTrainer`."""

    config_class = DistiLLMConfig
    objective_class = DistiLLMObjective

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.on_policy_share: float = self.args.on_policy_share
        self.replay_buffer: deque[tuple[list[int], list[int]]] = deque(
            maxlen=-(-self.args.replay_capacity // self.accelerator.num_processes)
        )
        self._last_eval_loss: float | None = None

    def _select_completions(
        self, model: nn.Module, rows: list[Batch], step: int, mode: str
    ) -> tuple[list[list[int]], list[Completion]]:
        """Choose the completions of a rollout as in Algorithm 1.

        With probability `on_policy_share`, use student completions: new ones while the replay buffer is filling and
        then with a probability that decreases over the run, otherwise replayed ones. In all other cases, and always
        in evaluation, use the completions of the data set.
        """
        prompts = column(rows, "prompt_ids")
        coin = float(torch.rand(1, generator=prompt_generator(self.args.seed, step, 0, RandomStream.ON_POLICY)))
        if mode == "eval" or coin >= self.on_policy_share:
            return prompts, [Completion(ids, True) for ids in column(rows, "completion_ids")]
        if coin < self.on_policy_share * (1 - step / self.state.max_steps) or not self._is_replay_buffer_full():
            completions = self._generate(model, rows, prompts, step, mode)
            self.replay_buffer.extend((prompt, c.ids) for prompt, c in zip(prompts, completions, strict=True))
            return prompts, completions
        generator = prompt_generator(self.args.seed, step, self.accelerator.process_index, RandomStream.REPLAY)
        chosen = torch.randint(len(self.replay_buffer), (len(prompts),), generator=generator).tolist()
        return [self.replay_buffer[i][0] for i in chosen], [Completion(self.replay_buffer[i][1], True) for i in chosen]

    def _is_replay_buffer_full(self) -> bool:
        """Whether the replay buffer is full. A collective call, so that all processes take the same branch."""
        stored = torch.tensor(len(self.replay_buffer), device=self.accelerator.device)
        return int(self.accelerator.reduce(stored, reduction="sum")) >= self.args.replay_capacity

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """See `TokenSelectiveTrainer`. During training, `on_policy_share` is updated from the loss."""
        metrics = super().evaluate(*args, **kwargs)
        loss = metrics.get("eval_loss")
        if self.is_in_train and loss is not None:
            if self._last_eval_loss is None:
                self._last_eval_loss = loss
            elif loss >= self._last_eval_loss + self.args.loss_tolerance:
                self.on_policy_share = min(1.0, self.on_policy_share + self.args.on_policy_share_step)
                self._last_eval_loss = loss
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """See `TokenSelectiveTrainer`."""
        if "loss" in logs:
            logs["replay/on_policy_share"] = self.on_policy_share
        super().log(logs, start_time)

    def _get_extra_state(self) -> dict[str, Any]:
        replay_buffer = [[torch.tensor(ids) for ids in pair] for pair in self.replay_buffer]
        own = {
            "on_policy_share": self.on_policy_share,
            "last_eval_loss": self._last_eval_loss,
            "replay_buffer": replay_buffer,
        }
        return {**super()._get_extra_state(), **own}

    def _set_extra_state(self, state: dict[str, Any]) -> None:
        super()._set_extra_state(state)
        self.on_policy_share, self._last_eval_loss = state["on_policy_share"], state["last_eval_loss"]
        self.replay_buffer.extend(
            (prompt.tolist(), completion.tolist()) for prompt, completion in state["replay_buffer"]
        )
