"""Every method: its options, the defaults of its paper, its objective, and the trainer that runs it."""

from dataclasses import dataclass
from typing import Any, ClassVar

from .config import TokenSelectiveConfig
from .errors import ConfigError
from .objectives.distillm import DistiLLMObjective, DistiLLMOptions
from .objectives.eopd import EOPDObjective, EOPDOptions
from .objectives.eopd_full import EOPDFullObjective, EOPDFullOptions
from .objectives.eopd_random import EOPDRandomObjective, EOPDRandomOptions
from .objectives.gkd import GKDObjective, GKDOptions
from .objectives.kd import KDObjective, KDOptions
from .objectives.minillm import MiniLLMObjective, MiniLLMOptions
from .objectives.opd import OPDObjective, OPDOptions
from .objectives.opd_advantage_shaping import OPDAdvantageShapingObjective, OPDAdvantageShapingOptions
from .objectives.opd_entropy_bonus import OPDEntropyBonusObjective, OPDEntropyBonusOptions
from .objectives.seq_kd import SeqKDObjective
from .objectives.speculative_kd import SpeculativeKDObjective, SpeculativeKDOptions
from .objectives.supervised_kd import SupervisedKDObjective
from .objectives.tsd_kd import TSDKDObjective, TSDKDOptions
from .objectives.tsd_kd_released import TSDKDReleasedObjective, TSDKDReleasedOptions
from .options import AT_LEAST_ONE, INSIDE, NOT_NEGATIVE, SHARE, option, plain

_BETA = TokenSelectiveConfig.refused
_WHOLE = {"top_p": "the loss is of the distribution that is sampled from, the whole one"}
_OFF_POLICY = {**_BETA, "lmbda": "the method trains on the data set's completions; `tsdkd generate` writes them"}
_OWN_ROLLOUTS = {**_BETA, **_WHOLE, "lmbda": "the method says by itself which completions a step trains on"}
_NO_ENGINE = {"use_vllm": "the teacher takes part in every token, and an engine holds the student only"}
_NEVER_EVALUATED = (lambda v: plain(v["eval_strategy"]) == "no", "eval_strategy is no")


# TSD-KD and what its tables compare with -----------------------------------------------------------------------------


@dataclass
class _TSDKDTables(TokenSelectiveConfig):
    """What the runs in TSD-KD's tables share (Table 10)."""

    max_new_tokens: int = option(1024, "Completion limit, tokens; prompt and completion together obey max_length.")
    max_length: int | None = option(1024, "Limit of prompt plus completion, tokens.")
    warmup_steps: float = option(0.1, "Warmup steps; below 1 a share of all steps.")


@dataclass
class TSDKDConfig(TSDKDOptions, _TSDKDTables):
    """Token-selective dual distillation: ranking of the opener, gated JSD, entropy of the most uncertain tokens."""

    method = "tsd-kd"
    objective = TSDKDObjective
    trainer = "tsdkd.trainers:TSDKDTrainer"
    paper = "Kim and Baek 2026 (ICLR)"
    refused = _WHOLE


@dataclass
class TSDKDReleasedConfig(TSDKDReleasedOptions, _TSDKDTables):
    """The loss of TSD-KD's public code, with its reversed ranking: to measure what it changes."""

    method = "tsd-kd-released"
    objective = TSDKDReleasedObjective
    trainer = "tsdkd.trainers.tsd_kd_released:TSDKDReleasedTrainer"
    paper = "github.com/kmswin1/TSD-KD"
    refused = _WHOLE


@dataclass
class GKDConfig(GKDOptions, _TSDKDTables):
    """Generalised JSD on all tokens of the student's own completions."""

    method = "gkd"
    objective = GKDObjective
    paper = "Agarwal et al. 2024, arXiv 2306.13649"
    refused = _WHOLE


@dataclass
class DistiLLMConfig(DistiLLMOptions, _TSDKDTables):
    """Skew KL; own, replayed and given completions, more of the former when the validation loss rises."""

    method = "distillm"
    completions = "the data set's; the student's, or replayed ones, the more the validation loss rises"
    objective = DistiLLMObjective
    trainer = "tsdkd.trainers.distillm:DistiLLMTrainer"
    paper = "Ko et al. 2024, arXiv 2402.03898"
    starts_from_data = True
    refused = _OWN_ROLLOUTS

    own_share: float = option(0.0, "Share of steps on own or replayed completions, at the start.", SHARE)
    own_share_step: float = option(0.1, "How much it grows when the validation loss rises.", SHARE, _NEVER_EVALUATED)
    loss_tolerance: float = option(
        0.1, "By how much the validation loss may rise before that, nats.", NOT_NEGATIVE, _NEVER_EVALUATED
    )
    replay_capacity: int = option(1000, "How many own completions are kept, over all processes.", AT_LEAST_ONE)


@dataclass
class SpeculativeKDConfig(SpeculativeKDOptions, _TSDKDTables):
    """Forward KL on completions in which the teacher replaces the student's unlikely tokens."""

    method = "speculative-kd"
    completions = "the student's, in which the teacher replaces unlikely tokens"
    objective = SpeculativeKDObjective
    trainer = "tsdkd.trainers.speculative_kd:SpeculativeKDTrainer"
    paper = "Xu et al. 2025, arXiv 2410.11325"
    refused = {**_OWN_ROLLOUTS, **_NO_ENGINE}

    learning_rate: float = option(1e-5, "Initial learning rate of AdamW.")


@dataclass
class SupervisedKDConfig(_TSDKDTables):
    """Forward KL on all tokens of the data set's completions."""

    method = "supervised-kd"
    completions = "the data set's"
    objective = SupervisedKDObjective
    paper = "Hinton et al. 2015, arXiv 1503.02531"
    refused = _OFF_POLICY

    lmbda: float = option(0.0, "The method never generates.")


@dataclass
class SeqKDConfig(_TSDKDTables):
    """Cross-entropy on the data set's completions, which are the teacher's; it isn't loaded again."""

    method = "seq-kd"
    completions = "the data set's"
    objective = SeqKDObjective
    paper = "Kim and Rush 2016, arXiv 1606.07947"
    refused = {**_OFF_POLICY, **dict.fromkeys(("teacher_placement", "record_steps"), "the teacher isn't loaded")}

    lmbda: float = option(0.0, "The method never generates.")


# EOPD and what its tables compare with -------------------------------------------------------------------------------


@dataclass
class _RolloutConfig(TokenSelectiveConfig):
    """One rollout for several steps.

    Args:
        rollout_batch_size: prompts in one rollout, over all processes; it serves
            `rollout_batch_size / (per-device batch x accumulation x processes)` optimizer steps.
        vllm_importance_sampling_correction: weigh the policy's loss by what the student's probability of a token is of
            the engine's, truncated. Without it the engine's is the policy that sampled (Q_old).
        vllm_importance_sampling_clip_max: where that weight is truncated.
    """

    rollout_batch_size: int = option(128, "Prompts in one rollout, over all processes.", AT_LEAST_ONE)

    def steps_per_rollout(self, processes: int | None = None) -> int:
        """Optimizer steps that one rollout serves. Raises `ConfigError` where they aren't whole."""
        processes = processes or self.world_size
        size = self.per_device_train_batch_size * self.gradient_accumulation_steps * processes
        if self.rollout_batch_size % size:
            raise ConfigError(
                [
                    f"rollout_batch_size: must be a multiple of the mini-batch, found {self.rollout_batch_size}; the "
                    f"mini-batch is {self.per_device_train_batch_size} (per_device_train_batch_size) x "
                    f"{self.gradient_accumulation_steps} (gradient_accumulation_steps) x {processes} (processes)"
                    f" = {size}"
                ]
            )
        return self.rollout_batch_size // size


@dataclass
class OPDConfig(OPDOptions, _RolloutConfig):
    """Clipped reverse KL on the sampled tokens: on-policy distillation (EOPD's Table 8)."""

    method = "opd"
    objective: ClassVar[Any] = OPDObjective
    trainer = "tsdkd.trainers.policy:PolicyTrainer"
    paper: ClassVar[str] = "Lu and Lab 2025; EOPD Sec. 2.3, arXiv 2603.07079"

    learning_rate: float = option(3e-6, "Initial learning rate of AdamW.")
    max_new_tokens: int = option(4096, "Completion limit, tokens.")
    max_length: int | None = option(None, "Limit of prompt plus completion, tokens; none: the models' context.")
    vllm_importance_sampling_correction: bool = option(False, "Weigh tokens by student / engine probability.")
    vllm_importance_sampling_clip_max: float = option(3.0, "Where that weight is truncated.", AT_LEAST_ONE)


@dataclass
class EOPDConfig(EOPDOptions, OPDConfig):
    """Clipped reverse KL, and forward KL where the teacher is uncertain."""

    method = "eopd"
    objective = EOPDObjective
    trainer = "tsdkd.trainers:EOPDTrainer"
    paper = "Jin et al. 2026, arXiv 2603.07079"


@dataclass
class EOPDFullConfig(EOPDFullOptions, OPDConfig):
    """Clipped reverse KL, and forward KL on all tokens."""

    method = "eopd-full"
    objective = EOPDFullObjective
    paper = "EOPD Table 6"


@dataclass
class EOPDRandomConfig(EOPDRandomOptions, OPDConfig):
    """Clipped reverse KL, and forward KL on random tokens."""

    method = "eopd-random"
    objective = EOPDRandomObjective
    paper = "EOPD Table 6"


@dataclass
class OPDEntropyBonusConfig(OPDEntropyBonusOptions, OPDConfig):
    """Clipped reverse KL with an entropy bonus."""

    method = "opd-entropy-bonus"
    objective = OPDEntropyBonusObjective
    paper = "Schulman et al. 2017; EOPD Table 4"


@dataclass
class OPDAdvantageShapingConfig(OPDAdvantageShapingOptions, OPDConfig):
    """Clipped reverse KL whose advantages favour uncertain tokens."""

    method = "opd-advantage-shaping"
    objective = OPDAdvantageShapingObjective
    paper = "Cheng et al. 2025; EOPD Table 4"


@dataclass
class KDConfig(KDOptions, TokenSelectiveConfig):
    """Half cross-entropy, half top-16 forward KL on the data set's completions (EOPD's Table 7)."""

    method = "kd"
    completions = "the data set's"
    objective = KDObjective
    trainer = "tsdkd.trainers.policy:PolicyTrainer"
    paper = "Hinton et al. 2015; EOPD Table 2"
    refused = _OFF_POLICY

    lmbda: float = option(0.0, "The method never generates.")
    learning_rate: float = option(1e-5, "Initial learning rate of AdamW.")
    max_new_tokens: int = option(4096, "Completion limit, tokens.")
    max_length: int | None = option(4096, "Limit of prompt plus completion, tokens.")


@dataclass
class MiniLLMConfig(MiniLLMOptions, _RolloutConfig):
    """Reverse KL by policy gradient, on completions from a mixture of teacher and student."""

    method = "minillm"
    completions = "from a mixture of teacher and student; each serves epochs_per_rollout epochs"
    objective = MiniLLMObjective
    trainer = "tsdkd.trainers.minillm:MiniLLMTrainer"
    paper = "Gu et al. 2023, arXiv 2306.08543"
    refused = {**_OWN_ROLLOUTS, **_NO_ENGINE}

    max_new_tokens: int = option(1024, "Completion limit, tokens; prompt and completion together obey max_length.")
    max_length: int | None = option(1024, "Limit of prompt plus completion, tokens.")
    warmup_steps: float = option(0.1, "Warmup steps; below 1 a share of all steps.")
    rollout_batch_size: int = option(256, "Prompts in one rollout, over all processes.", AT_LEAST_ONE)
    epochs_per_rollout: int = option(4, "How often a rollout's completions are trained on.", AT_LEAST_ONE)

    def steps_per_rollout(self, processes: int | None = None) -> int:
        """With every epoch over it."""
        return super().steps_per_rollout(processes) * self.epochs_per_rollout


@dataclass
class GRPOConfig(TokenSelectiveConfig):
    """Reinforcement by right answers, compared within a group of completions: TRL's trainer, no teacher.

    Args:
        num_generations: completions for each prompt; the mini-batch counts completions.
        rollout_batch_size: prompts in one rollout, over all processes.
    """

    method = "grpo"
    completions = "the student's, num_generations for each prompt; rows have an answer or a solution"
    trainer = "tsdkd.trainers.grpo:GRPOTrainer"
    paper = "Shao et al. 2024, arXiv 2402.03300; EOPD Table 8"
    refused = {
        **_BETA,
        "lmbda": "the method always samples",
        "completion_column": "the reward looks at the column `answer`",
        "max_length": "TRL's trainer bounds completions only; set max_new_tokens",
        "chat_template_source": "there is no teacher whose template could be taken",
        **dict.fromkeys(("fused_head", "head_chunk_gib", "log_term_gradients"), "TRL's trainer computes the loss"),
        **dict.fromkeys(
            ("record_steps", "max_nonfinite_steps", "vllm_request_timeout", "vllm_check_every"),
            "TRL's trainer has none",
        ),
        **dict.fromkeys(
            ("teacher_model_name_or_path", "teacher_model_init_kwargs", "teacher_placement"), "there is no teacher"
        ),
    }

    learning_rate: float = option(3e-6, "Initial learning rate of AdamW.")
    max_new_tokens: int = option(4096, "Completion limit, tokens.")
    max_length: int | None = None
    num_generations: int = option(8, "Completions for each prompt.", (lambda v: v >= 2, "must be at least 2"))
    clip_epsilon: float = option(0.2, "PPO's clip.", INSIDE)
    rollout_batch_size: int = option(128, "Prompts in one rollout, over all processes.", AT_LEAST_ONE)


_ALL: tuple[type[TokenSelectiveConfig], ...] = (
    TSDKDConfig,
    EOPDConfig,
    GKDConfig,
    MiniLLMConfig,
    DistiLLMConfig,
    SpeculativeKDConfig,
    SupervisedKDConfig,
    SeqKDConfig,
    KDConfig,
    GRPOConfig,
    OPDConfig,
    OPDEntropyBonusConfig,
    OPDAdvantageShapingConfig,
    EOPDFullConfig,
    EOPDRandomConfig,
    TSDKDReleasedConfig,
)
METHODS = {cls.method: cls for cls in _ALL}
