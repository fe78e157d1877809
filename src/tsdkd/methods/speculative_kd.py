"""Speculative KD: forward KL on completions sampled from student and teacher (Xu et al. 2025, arXiv 2410.11325).

`speculative_choice` below chooses each token; `tsdkd.rollout.mixed` runs both models.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.options import AT_LEAST_ONE, POSITIVE, POSITIVE_FRACTION, option
from ..rollout.base import Sampler, TokenChoice
from ..rollout.build import make_sampler
from ..rollout.categorical import sample_tokens
from ..trainer.trainer import TokenSelectiveTrainer
from .defaults import SELF_SAMPLING_UNSUPPORTED, TEACHER_SAMPLES_UNSUPPORTED, TSDKDDefaults
from .supervised_kd import SupervisedKDObjective


@dataclass
class SpeculativeKDOptions:
    """Options of speculative sampling; the defaults are those of the paper's public code."""

    accept_top_k: int = option(
        25, "A student token is accepted if it is among this many top tokens of the teacher.", AT_LEAST_ONE
    )
    draft_temperature: float = option(0.5, "Sampling temperature of the student.", POSITIVE)
    draft_top_p: float = option(0.5, "Top-p of the student's tokens.", POSITIVE_FRACTION)
    correction_temperature: float = option(0.2, "Sampling temperature of the teacher's replacements.", POSITIVE)
    correction_top_p: float = option(0.5, "Top-p of the teacher's replacements.", POSITIVE_FRACTION)


@dataclass
class SpeculativeKDConfig(SpeculativeKDOptions, TSDKDDefaults):
    """Forward KL on completions in which the teacher replaces the student's unlikely tokens."""

    method = "speculative-kd"
    completions_source = "the student's, in which the teacher replaces unlikely tokens"
    paper = "Xu et al. 2025, arXiv 2410.11325"
    has_lmbda = False
    teacher_samples = True
    unsupported_options = {**SELF_SAMPLING_UNSUPPORTED, **TEACHER_SAMPLES_UNSUPPORTED}

    learning_rate: float = option(1e-5)


@dataclass
class SpeculativeKDObjective(SupervisedKDObjective):
    """Mean over completions, as in the paper's public code."""

    unit = "completions"


class SpeculativeKDTrainer(TokenSelectiveTrainer):
    """Speculative KD (arXiv 2410.11325). Arguments: see `TokenSelectiveTrainer`."""

    config_class = SpeculativeKDConfig
    objective_class = SpeculativeKDObjective

    def _make_sampler(self) -> Sampler:
        mixed_with = (self.teacher_model, speculative_choice(self.args))
        return make_sampler(
            self.model, self.accelerator, self.args, self.pair, self.stop_token_ids, mixed_with=mixed_with
        )


def speculative_choice(options: SpeculativeKDOptions) -> TokenChoice:
    """Keep the student's token if it is among the teacher's top tokens, else sample from the teacher (Algorithm 1)."""

    def choose(logits: list[Tensor], uniform: Tensor) -> Tensor:
        student, teacher = logits
        drafted, _ = sample_tokens(student / options.draft_temperature, uniform[:, 0], options.draft_top_p)
        corrected, _ = sample_tokens(teacher / options.correction_temperature, uniform[:, 1], options.correction_top_p)
        better = (teacher > teacher.gather(-1, drafted.unsqueeze(-1))).sum(-1)
        return torch.where(better < options.accept_top_k, drafted, corrected)

    return choose
