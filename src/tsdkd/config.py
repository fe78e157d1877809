"""What can be set: the trainers' configurations, the data arguments, and what values make sense together.

Field names, defaults and help follow TRL and transformers; the methods' own defaults are their papers'. A
configuration that can't be run raises one `ConfigError` that lists every problem.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, get_type_hints

from transformers import SchedulerType

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=".*trl.experimental.*")
    from trl.experimental.gkd import GKDConfig

from .coercion import coerce
from .errors import ConfigError


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class TokenSelectiveConfig(GKDConfig):
    """What both methods share. Use `TSDKDConfig` or `EOPDConfig`.

    Args:
        top_p: nucleus mass of the rollouts, for EOPD (Table 8: 0.8 for Llama); below 1 the sampler is no longer the
            policy that the loss models.
        chat_template_source: whose chat template renders the prompts; a plain string prompt becomes one user message.
            "none" takes strings as they are.
        chat_template_kwargs: passed to the template, e.g. `{"enable_thinking": false}`.
        prompt_column: the column that holds the prompt, where it isn't called `prompt` (or `messages`).
        completion_column: the column that holds the completion, where it isn't called `completion`.
        log_completions: print some completions, as a table, at every logging step.
        log_term_gradients: every how many optimizer steps the gradient norm of each term is logged (on the first
            micro-batch of the step); 0 is never.
        fused_head: compute the loss from hidden states, a chunk of tokens at a time. False: from whole logits, for
            models whose logits are more than a scaled, soft-capped projection.
        head_chunk_gib: GiB for the logits of one chunk; the numbers don't depend on it. By default 0.25 on a CPU and
            1 on a GPU.
        teacher_placement: "replica" (whole on every device), "zero3" (sharded over them) or "cpu_offload" (sharded
            over the hosts' memory), whatever the student's ZeRO stage. By default sharded where the student is.
        resume: continue from the newest complete checkpoint in `output_dir`, or start where there is none: what a job
            that is requeued needs. (`resume_from_checkpoint` wants one, and takes a path too.)
        max_nonfinite_steps: how many steps with a loss or gradient that isn't finite are left out before the run
            stops.
        use_vllm: roll out with vLLM.
        vllm_mode: "colocate" (an engine in each process) or "server" (one that `vllm serve` runs).
        vllm_model_impl: vLLM's own implementation of the model, or transformers'.
        vllm_gpu_memory_utilization: share of a device's memory (on a CPU: of the machine's) for a colocated engine.
        vllm_tensor_parallel_size: processes that share a colocated engine.
        vllm_enable_sleep_mode: a colocated engine gives its memory back while the student trains.
        vllm_server_base_url: where the server listens; instead of host and port.
        vllm_server_host, vllm_server_port: the same, by default on this machine.
        vllm_server_timeout: how long to wait for the server to be up, seconds.
        vllm_request_timeout: how long to wait for an answer of the server, seconds.
        vllm_group_port: of the group through which a server gets the weights.
        vllm_max_model_length: the engine's context, tokens; by default `max_length`, or the models' context.
        vllm_check_every: every how many weight syncs, the first included, the engine's log-probabilities are compared
            with the student's.
    """

    temperature: float = _option(1.0, "Divides student and teacher logits, in rollouts and in the loss.")
    lmbda: float = _option(1.0, "Share of optimizer steps on the student's own completions; 0 never generates.")
    learning_rate: float = _option(5e-6, "Initial learning rate of AdamW.")
    lr_scheduler_type: SchedulerType | str = _option("cosine", "Learning rate schedule.")
    logging_nan_inf_filter: bool = _option(False, "Hide non-finite losses in the log. Off: a diverged run shows.")
    top_p: float = _option(1.0, "Nucleus mass of the rollouts.")
    chat_template_source: Literal["student", "teacher", "none"] = _option(
        "student", "Whose chat template renders the prompts; 'none' takes string prompts as they are."
    )
    model_init_kwargs: dict[str, Any] | None = _option(None, "Keyword arguments of the student's from_pretrained.")
    teacher_model_init_kwargs: dict[str, Any] | None = _option(None, "Keyword arguments of the teacher's.")
    chat_template_kwargs: dict[str, Any] | None = _option(None, "Keyword arguments of the chat template.")
    prompt_column: str | None = _option(None, "Column of the prompt, if it is not 'prompt' or 'messages'.")
    completion_column: str | None = _option(None, "Column of the completion, if it is not 'completion'.")
    log_completions: bool = _option(False, "Print a table of completions at every logging step.")
    log_term_gradients: int = _option(100, "Log each term's gradient norm every so many steps; 0 is never.")
    fused_head: bool = _option(True, "Compute the loss from hidden states, without whole logits.")
    head_chunk_gib: float | None = _option(None, "GiB for the logits of one chunk; none: 0.25 on a CPU, 1 on a GPU.")
    teacher_placement: Literal["replica", "zero3", "cpu_offload"] | None = _option(
        None, "Where the teacher's weights are; none: sharded where the student's are, else on every device."
    )
    resume: bool = _option(False, "Continue from the newest complete checkpoint in output_dir; without one, start.")
    max_nonfinite_steps: int = _option(0, "How many steps with a non-finite loss or gradient are left out.")
    use_vllm: bool = _option(False, "Roll out with vLLM.")
    vllm_mode: Literal["colocate", "server"] = _option("colocate", "Where vLLM runs.")
    vllm_model_impl: Literal["auto", "vllm", "transformers"] = _option("auto", "Whose implementation vLLM runs.")
    vllm_gpu_memory_utilization: float = _option(0.3, "Share of memory for a colocated engine.")
    vllm_tensor_parallel_size: int = _option(1, "Processes that share a colocated engine.")
    vllm_enable_sleep_mode: bool = _option(False, "A colocated engine gives its memory back during training steps.")
    vllm_server_base_url: str | None = _option(None, "URL of the vLLM server; instead of host and port.")
    vllm_server_host: str = _option("127.0.0.1", "Host of the vLLM server.")
    vllm_server_port: int = _option(8000, "Port of the vLLM server.")
    vllm_server_timeout: float = _option(240.0, "How long to wait for the vLLM server to be up, seconds.")
    vllm_request_timeout: float = _option(1800.0, "How long to wait for an answer of the vLLM server, seconds.")
    vllm_group_port: int = _option(51216, "Port through which the vLLM server gets the weights.")
    vllm_max_model_length: int | None = _option(None, "The engine's context, tokens; none: max_length.")
    vllm_check_every: int = _option(50, "Every how many weight syncs the engine's log-probabilities are checked.")

    _VALID_DICT_FIELDS = [*GKDConfig._VALID_DICT_FIELDS, "chat_template_kwargs"]

    def __post_init__(self) -> None:
        problems = self._coerce_own() or check_values(type(self), vars(self))
        if problems:
            raise ConfigError(problems)
        super().__post_init__()
        self.remove_unused_columns = False

    def __getstate__(self) -> dict[str, Any]:
        """Without the hub's tokens: `Trainer` pickles its arguments into what it pushes to the hub."""
        return {name: None if name.endswith("hub_token") else value for name, value in vars(self).items()}

    def _coerce_own(self) -> list[str]:
        hints = get_type_hints(type(self))
        problems = []
        for name in own_fields(type(self)):
            try:
                setattr(self, name, coerce(getattr(self, name), hints[name]))
            except ValueError as error:
                problems.append(f"{name}: {error}")
        return problems

    def steps_per_rollout(self) -> int:
        """Optimizer steps that one rollout serves."""
        return 1


@dataclass
class TSDKDConfig(TokenSelectiveConfig):
    """Configuration of `TSDKDTrainer`. Defaults are the paper's (Table 10; Sec. 4.1).

    Args:
        alpha: weight of indirect distillation (Eq. 13); 0 turns it off.
        beta: of the generalised JSD (Eq. 1).
        indirect_top_k: number of candidates that the student proposes.
        opener_ratio: c, the opener's share of a response's entropy.
        adaptive_opener: choose c by the difficulty of the last five responses (A.7).
        gate: weigh direct distillation by the entropy gap (Eq. 11).
        gate_temperature: tau of the gate, nats.
        entropy_weight: weight of entropy minimisation (1 in the paper); 0 turns it off.
        entropy_ratio: share of a response's tokens whose entropy is minimised.
        indirect_reduction: over the opener's positions: "mean", "sum" (Eq. 5 as written), or "length" (sum / L).
    """

    beta: float = _option(0.9, "Interpolates between forward (0) and reverse (1) KL.")
    max_new_tokens: int = _option(1024, "Completion limit, tokens; prompt and completion together obey max_length.")
    max_length: int | None = _option(1024, "Limit of prompt plus completion, tokens.")
    warmup_steps: float = _option(0.1, "Warmup steps; below 1 a share of all steps.")
    alpha: float = _option(0.1, "Weight of indirect distillation; 0 turns it off.")
    indirect_top_k: int = _option(10, "Number of candidates that the student proposes to the teacher.")
    opener_ratio: float = _option(0.1, "The opener's share of a response's entropy.")
    adaptive_opener: bool = _option(False, "Choose the opener's share by the difficulty of recent responses.")
    gate: bool = _option(True, "Weigh direct distillation by the entropy gap.")
    gate_temperature: float = _option(1.0, "Temperature of the gate, nats.")
    entropy_weight: float = _option(1.0, "Weight of entropy minimisation; 0 turns it off.")
    entropy_ratio: float = _option(0.1, "Share of a response's tokens whose entropy is minimised.")
    indirect_reduction: Literal["mean", "sum", "length"] = _option("mean", "Reduction over the opener's positions.")


@dataclass
class EOPDConfig(TokenSelectiveConfig):
    """Configuration of `EOPDTrainer`. Defaults are the paper's (Table 8; Sec. 5.1).

    Args:
        entropy_threshold: forward KL acts where the teacher's entropy is above it, nats.
        forward_kl_top_k: how many of the teacher's tokens forward KL looks at.
        forward_kl_placement: "entropy" (EOPD), "all", "random", or "none" (plain on-policy distillation).
        forward_kl_random_ratio: share of positions for placement "random".
        clip_epsilon: PPO's clip.
        entropy_bonus: coefficient of the entropy bonus (a comparison strategy of Table 4); 0 is off.
        advantage_shaping: alpha of advantage shaping (Eq. 11, kappa = 2; the paper takes 0.1); 0 is off.
        vllm_importance_sampling_correction: weigh the clipped reverse KL by what the student's probability of a token
            is of the engine's, truncated. Without it the engine's is the policy that sampled (Q_old).
        vllm_importance_sampling_clip_max: where that weight is truncated.
        rollout_batch_size: prompts in one rollout, over all processes; it serves
            `rollout_batch_size / (per-device batch x accumulation x processes)` optimizer steps.
    """

    learning_rate: float = _option(3e-6, "Initial learning rate of AdamW.")
    max_new_tokens: int = _option(4096, "Completion limit, tokens.")
    max_length: int | None = _option(None, "Limit of prompt plus completion, tokens; none: the models' context.")
    entropy_threshold: float = _option(0.8, "Teacher entropy above which forward KL acts, nats.")
    forward_kl_top_k: int = _option(16, "How many of the teacher's tokens forward KL looks at.")
    forward_kl_placement: Literal["entropy", "all", "random", "none"] = _option("entropy", "Where forward KL acts.")
    forward_kl_random_ratio: float = _option(0.2, "Share of positions for forward_kl_placement: random.")
    clip_epsilon: float = _option(0.2, "PPO's clip.")
    entropy_bonus: float = _option(0.0, "Coefficient of the entropy bonus; 0 is off.")
    advantage_shaping: float = _option(0.0, "Coefficient of advantage shaping; 0 is off.")
    vllm_importance_sampling_correction: bool = _option(False, "Weigh tokens by student / engine probability.")
    vllm_importance_sampling_clip_max: float = _option(3.0, "Where that weight is truncated.")
    rollout_batch_size: int = _option(128, "Prompts in one rollout, over all processes.")

    def steps_per_rollout(self) -> int:
        """Optimizer steps that one rollout serves. Raises `ConfigError` where they aren't whole."""
        size = self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size
        if self.rollout_batch_size % size:
            raise ConfigError(
                [
                    f"rollout_batch_size: must be a multiple of the mini-batch, found {self.rollout_batch_size}; the "
                    f"mini-batch is {self.per_device_train_batch_size} (per_device_train_batch_size) x "
                    f"{self.gradient_accumulation_steps} (gradient_accumulation_steps) x {self.world_size} (processes)"
                    f" = {size}"
                ]
            )
        return self.rollout_batch_size // size


@dataclass
class DataArguments:
    """Where the prompts come from.

    Args:
        dataset_name: a hub name, or a local JSON, JSONL, CSV or Parquet file, or a folder of them.
        dataset_config: configuration (subset) of a hub data set.
        dataset_train_split: split to train on.
        eval_dataset_name: held-out prompts, if they aren't a split of `dataset_name`.
        dataset_test_split: split to evaluate on.
    """

    dataset_name: str | None = _option(None, "Hub name or local file (JSON, JSONL, CSV, Parquet).")
    dataset_config: str | None = _option(None, "Configuration of a hub data set.")
    dataset_train_split: str = _option("train", "Split to train on.")
    eval_dataset_name: str | None = _option(None, "Held-out prompts, if not a split of dataset_name.")
    dataset_test_split: str = _option("test", "Split to evaluate on.")


METHODS: dict[str, type[TokenSelectiveConfig]] = {"tsd-kd": TSDKDConfig, "eopd": EOPDConfig}

# Options of TRL and transformers that would have no effect here, or a wrong one: refused, not ignored.
UNSUPPORTED = {
    "seq_kd": "use lmbda: 0 with the teacher's completions as data",
    "packing": "completions are trained one a row",
    "packing_strategy": "completions are trained one a row",
    "eval_packing": "completions are trained one a row",
    "padding_free": "completions are trained one a row",
    "pad_to_multiple_of": "sequences are padded to the longest of their micro-batch",
    "completion_only_loss": "the loss is always on the completion",
    "assistant_only_loss": "the loss is always on the completion",
    "dataset_text_field": "use prompt_column",
    "dataset_kwargs": "use prompt_column, completion_column and chat_template_kwargs",
    "truncation_mode": "prompts are never truncated; those that leave no room are dropped",
    "shuffle_dataset": "the sampler shuffles; see train_sampling_strategy",
    "chat_template_path": "use chat_template_source, or save the template with the tokenizer",
    "eos_token": "set it in the tokenizer; the generation config's stop tokens are honoured",
    "pad_token": "padding is masked by length, no pad token is needed",
    "loss_type": "the method decides the loss",
    "label_smoothing_factor": "the method decides the loss",
    "router_aux_loss_coef": "the method decides the loss",
    "auto_find_batch_size": "it would change the batch that the paper's numbers belong to",
    "enable_jit_checkpoint": "it overwrites a good checkpoint with mid-step state; SIGTERM saves without it",
    "save_only_model": "a checkpoint that can't be resumed from; save_total_limit bounds the disk",
    "save_on_each_node": "output_dir must be one folder that all nodes see",
    "average_tokens_across_devices": "terms are always averaged over the global batch",
    "include_for_metrics": "the logged terms are fixed",
    "batch_eval_metrics": "the logged terms are fixed",
    "label_names": "the collator has no labels",
    "prediction_loss_only": "the logged terms are fixed",
    "use_liger_kernel": "TRL deprecates it; its fused loss would replace the model's forward",
    "liger_kernel_config": "TRL deprecates it; its fused loss would replace the model's forward",
    "torch_compile": "rollouts change their shape at every token",
    "torch_compile_backend": "rollouts change their shape at every token",
    "torch_compile_mode": "rollouts change their shape at every token",
    "fsdp": "shard with DeepSpeed ZeRO, through accelerate",
    "fsdp_config": "shard with DeepSpeed ZeRO, through accelerate",
    "parallelism_config": "shard with DeepSpeed ZeRO, through accelerate",
}

_POSITIVE = (lambda v: v > 0, "must be greater than 0")
_AT_LEAST_ONE = (lambda v: v >= 1, "must be at least 1")
_NOT_NEGATIVE = (lambda v: v >= 0, "must be at least 0")
_SHARE = (lambda v: 0 <= v <= 1, "must be in [0, 1]")
_POSITIVE_SHARE = (lambda v: 0 < v <= 1, "must be in (0, 1]")
_SEQUENCE = (lambda v: v >= 2, "must be at least 2 (a prompt and a completion token)")
_PORT = (lambda v: 0 < v < 2**16, "must be a port, 1 to 65535")

_LOG_LEVELS = ("debug", "info", "warning", "error", "critical", "passive")
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_CHECKPOINTING = {"use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop", "selective"}
_RESERVED = {"add_generation_prompt", "tokenize", "return_dict", "return_tensors", "padding", "truncation"}


def _only(allowed: set[str]) -> tuple[Callable[[Any], bool], str]:
    return (lambda v: set(v) <= allowed), f"must have no other keys than {', '.join(sorted(allowed))}"


_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "alpha": _NOT_NEGATIVE,
    "beta": _SHARE,
    "indirect_top_k": (lambda v: v >= 2, "must be at least 2 (one candidate has no ranking)"),
    "opener_ratio": _POSITIVE_SHARE,
    "gate_temperature": _POSITIVE,
    "entropy_weight": _NOT_NEGATIVE,
    "entropy_ratio": _POSITIVE_SHARE,
    "entropy_threshold": _NOT_NEGATIVE,
    "forward_kl_top_k": _AT_LEAST_ONE,
    "forward_kl_random_ratio": _POSITIVE_SHARE,
    "clip_epsilon": (lambda v: 0 < v < 1, "must be in (0, 1)"),
    "entropy_bonus": _NOT_NEGATIVE,
    "advantage_shaping": _NOT_NEGATIVE,
    "rollout_batch_size": _AT_LEAST_ONE,
    "lmbda": _SHARE,
    "temperature": _POSITIVE,
    "top_p": _POSITIVE_SHARE,
    "max_new_tokens": _AT_LEAST_ONE,
    "max_length": _SEQUENCE,
    "log_term_gradients": _NOT_NEGATIVE,
    "max_nonfinite_steps": _NOT_NEGATIVE,
    "head_chunk_gib": _POSITIVE,
    "vllm_gpu_memory_utilization": _POSITIVE_SHARE,
    "vllm_tensor_parallel_size": _AT_LEAST_ONE,
    "vllm_server_timeout": _NOT_NEGATIVE,
    "vllm_request_timeout": _POSITIVE,
    "vllm_server_port": _PORT,
    "vllm_group_port": _PORT,
    "vllm_max_model_length": _SEQUENCE,
    "vllm_check_every": _AT_LEAST_ONE,
    "vllm_importance_sampling_clip_max": _AT_LEAST_ONE,
    "learning_rate": _POSITIVE,
    "weight_decay": _NOT_NEGATIVE,
    "warmup_steps": _NOT_NEGATIVE,
    "max_grad_norm": _NOT_NEGATIVE,
    "per_device_train_batch_size": _AT_LEAST_ONE,
    "per_device_eval_batch_size": _AT_LEAST_ONE,
    "gradient_accumulation_steps": _AT_LEAST_ONE,
    "num_train_epochs": _POSITIVE,
    "max_steps": (lambda v: v == -1 or v >= 1, "must be at least 1 (or -1 for num_train_epochs)"),
    "logging_steps": _POSITIVE,
    "save_steps": _POSITIVE,
    "eval_steps": _POSITIVE,
    "save_total_limit": _AT_LEAST_ONE,
    "seed": (lambda v: 0 <= v < 2**32, "must be at least 0 and below 2**32"),
    "dataloader_num_workers": _NOT_NEGATIVE,
    "eval_delay": _NOT_NEGATIVE,
    "neftune_noise_alpha": _POSITIVE,
    "adam_beta1": (lambda v: 0 <= v < 1, "must be in [0, 1)"),
    "adam_beta2": (lambda v: 0 <= v < 1, "must be in [0, 1)"),
    "adam_epsilon": _POSITIVE,
    "log_level": (lambda v: v in _LOG_LEVELS, f"must be one of {', '.join(_LOG_LEVELS)}"),
    "dtype": (lambda v: v in _DTYPES, f"must be one of {', '.join(_DTYPES)}"),
    "gradient_checkpointing_kwargs": _only(_CHECKPOINTING),
    "chat_template_kwargs": (
        lambda v: not _RESERVED & set(v),
        f"must leave out {', '.join(sorted(_RESERVED))}: they are tsdkd's to set",
    ),
    "lora_r": _AT_LEAST_ONE,
    "lora_alpha": _AT_LEAST_ONE,
    "lora_dropout": (lambda v: 0 <= v < 1, "must be in [0, 1)"),
    "dataset_num_proc": _AT_LEAST_ONE,
    "train_sampling_strategy": (lambda v: v in ("random", "sequential"), "must be 'random' or 'sequential'"),
}


def plain(value: Any) -> Any:
    """An enumeration's member as its value, anything else as it is."""
    return getattr(value, "value", value)


# option -> (the setting that makes it meaningless, as a predicate on all values, and how to say so)
_POINTLESS = {
    "gate_temperature": (lambda v: not v["gate"], "gate is false"),
    "indirect_reduction": (lambda v: v["alpha"] == 0, "alpha is 0"),
    "indirect_top_k": (lambda v: v["alpha"] == 0, "alpha is 0"),
    "adaptive_opener": (lambda v: v["alpha"] == 0, "alpha is 0"),
    "opener_ratio": (lambda v: v["alpha"] == 0 or v["adaptive_opener"], "alpha is 0 or adaptive_opener is true"),
    "entropy_ratio": (lambda v: v["entropy_weight"] == 0, "entropy_weight is 0"),
    "forward_kl_random_ratio": (lambda v: v["forward_kl_placement"] != "random", "forward_kl_placement is not random"),
    "top_p": (lambda v: v["lmbda"] == 0, "lmbda is 0: nothing is generated"),
    "log_completions": (lambda v: v["lmbda"] == 0, "lmbda is 0: nothing is generated"),
    "head_chunk_gib": (lambda v: not v["fused_head"], "fused_head is false"),
    "chat_template_kwargs": (lambda v: v["chat_template_source"] == "none", "chat_template_source is none"),
    "save_steps": (lambda v: plain(v["save_strategy"]) != "steps", "save_strategy is not steps"),
    "save_total_limit": (lambda v: plain(v["save_strategy"]) == "no", "save_strategy is no"),
    "eval_steps": (lambda v: plain(v["eval_strategy"]) != "steps", "eval_strategy is not steps"),
    "use_vllm": (lambda v: v["lmbda"] == 0, "lmbda is 0: nothing is generated"),
    "vllm_importance_sampling_clip_max": (
        lambda v: not v["vllm_importance_sampling_correction"],
        "vllm_importance_sampling_correction is false",
    ),
}
_COLOCATED = ("gpu_memory_utilization", "tensor_parallel_size", "enable_sleep_mode", "model_impl")
_SERVED = ("server_base_url", "server_host", "server_port", "server_timeout", "request_timeout", "group_port")
_VLLM = ("mode", "max_model_length", "check_every", "importance_sampling_correction")


def _without(condition: str, names: tuple[str, ...]) -> dict[str, tuple[Callable[[Any], bool], str]]:
    tests = {
        "use_vllm is false": lambda v: not v["use_vllm"],
        "vllm_mode is not server": lambda v: v["vllm_mode"] != "server",
        "vllm_mode is not colocate": lambda v: v["vllm_mode"] != "colocate",
    }
    return {f"vllm_{name}": (tests[condition], condition) for name in names}


_POINTLESS |= _without("use_vllm is false", _VLLM)
_POINTLESS |= _without("vllm_mode is not server", _SERVED) | _without("vllm_mode is not colocate", _COLOCATED)
_LORA = (
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "lora_target_parameters",
    "lora_modules_to_save",
    "use_rslora",
    "use_dora",
)


def own_fields(cls: type) -> list[str]:
    """The fields that tsdkd declares, or gives a type or default of its own."""
    declared = [c.__annotations__ for c in cls.__mro__ if c.__module__ == __name__]
    return list(dict.fromkeys(name for annotations in declared for name in annotations))


def default_of(cls: type, name: str) -> Any:
    """The default of a dataclass field (None where there is none)."""
    for f in fields(cls):
        if f.name == name:
            return (
                f.default if f.default is not MISSING else f.default_factory() if callable(f.default_factory) else None
            )
    raise KeyError(name)


def check_values(cls: type, values: Mapping[str, Any]) -> list[str]:
    """All problems of a configuration's values: range, support, contradiction. Values are already of their types."""
    names = {f.name for f in fields(cls)}
    changed = {n for n in names & set(values) if values[n] != default_of(cls, n)}
    problems = []
    for name in sorted(names & set(_RANGES)):
        valid, text = _RANGES[name]
        value = values.get(name)
        if value is not None and not valid(value):
            problems.append(f"{name}: {text}, found {value!r}")
        elif isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{name}: must be finite, found {value!r}")
    for name in sorted(changed & set(UNSUPPORTED)):
        problems.append(f"{name}: not supported here ({UNSUPPORTED[name]})")
    for name in sorted(changed & set(_POINTLESS)):
        is_pointless, because = _POINTLESS[name]
        if is_pointless(values):
            problems.append(f"{name}: {values[name]!r} has no effect because {because}; remove it")
    return problems + _contradictions(cls, values, changed)


def _contradictions(cls: type, values: Mapping[str, Any], changed: set[str]) -> list[str]:
    problems = []
    if values.get("bf16") and values.get("fp16"):
        problems.append("bf16, fp16: at most one can be true")
    if values.get("use_vllm") and values["temperature"] > 2:
        problems.append(f"temperature: vLLM takes at most 2, found {values['temperature']}")
    if cls is TSDKDConfig and "top_p" in changed:
        problems.append("top_p: tsd-kd's loss is of the distribution that is sampled from, the whole one; remove it")
    if cls is EOPDConfig and "beta" in changed:
        problems.append("beta: belongs to method tsd-kd, eopd has no JSD; remove it")
    if "use_peft" in values and not values["use_peft"]:
        for name in (n for n in _LORA if n in changed):
            problems.append(f"{name}: {values[name]!r} has no effect because use_peft is false; set use_peft: true")
    return problems
