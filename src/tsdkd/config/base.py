"""The options that all methods share, and the data arguments. `tsdkd.methods` has the options of each method.

Names, defaults and help follow TRL and transformers. An invalid configuration raises one `ConfigError` that lists all
problems.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_type_hints

import torch
from transformers import SchedulerType
from transformers.utils import is_torch_bf16_gpu_available
from trl.experimental.gkd import GKDConfig

from ..errors import ConfigError
from .aliases import ALIASES, describe_alias_conflict
from .coercion import coerce
from .options import (
    AT_LEAST_ONE,
    FRACTION,
    IMPORT_PATH,
    NON_NEGATIVE,
    PORT,
    POSITIVE,
    POSITIVE_FRACTION,
    SEQUENCE_LENGTH,
    SERVER_URLS,
    TEMPLATE_KWARGS,
    ConflictRule,
    get_default,
    option,
)
from .validation import declared_fields, validate_options

_NEVER_SAMPLES = (lambda v: v["lmbda"] == 0, "lmbda is 0: nothing is generated")
_WITHOUT_VLLM = (lambda v: not v["use_vllm"], "use_vllm is false")
_NOT_COLOCATE = (lambda v: v["vllm_mode"] != "colocate", "vllm_mode is not colocate")
_NOT_SERVER = (lambda v: v["vllm_mode"] != "server", "vllm_mode is not server")
_NO_ROLLOUT_SERVER = (
    lambda v: not v["use_vllm"] or v["vllm_mode"] != "server",
    "only a vLLM server samples while the student trains; set use_vllm: true and vllm_mode: server",
)
_NO_TEACHER_SERVER = (lambda v: v["teacher_placement"] != "server", "teacher_placement is not server")


@dataclass
class TokenSelectiveConfig(GKDConfig):
    """The options that all methods share; `tsdkd.methods` has one subclass for each method.

    Options are described by their `help`, which docs/configuration.md lists.
    """

    method: ClassVar[str]
    paper: ClassVar[str] = "no paper"
    # Whether it trains on the data set's completions for any lmbda.
    always_needs_completions: ClassVar[bool] = False
    # Description of the completions that it trains on.
    completions_source: ClassVar[str] = "the student's own in a share lmbda of the steps, otherwise the data set's"
    # Whether it has a teacher, loads the teacher's weights, and samples from the teacher.
    has_teacher: ClassVar[bool] = True
    loads_teacher: ClassVar[bool] = True
    teacher_samples: ClassVar[bool] = False
    # Whether lmbda decides which completions a step trains on, and beta is that of its generalized JSD.
    has_lmbda: ClassVar[bool] = True
    has_jsd: ClassVar[bool] = False
    # Inherited options that it refuses -> the reason, for the message.
    unsupported_options: ClassVar[dict[str, str]] = {"beta": "the method has no generalized JSD"}

    conflicts: ClassVar[tuple[ConflictRule, ...]] = (
        (
            ("temperature", "use_vllm"),
            lambda v: v["use_vllm"] and v["temperature"] > 2,
            "vLLM's temperature is at most 2",
        ),
        (
            ("num_generations", "lmbda"),
            lambda v: v["num_generations"] > 1 and v["lmbda"] < 1,
            "a step on the data set's completions would train on the same completion num_generations times; set "
            "lmbda: 1",
        ),
        (
            ("eval_samples", "lmbda"),
            lambda v: v["eval_samples"] > 1 and 0 < v["lmbda"] < 1,
            "a random draw decides whether evaluations sample at all; set lmbda: 1",
        ),
        (
            ("rollout_ahead", "lmbda"),
            lambda v: v["rollout_ahead"] and v["lmbda"] < 1,
            "a rollout ahead is the student's; set lmbda: 1",
        ),
        (
            ("rollout_ahead", "top_p"),
            lambda v: v["rollout_ahead"] and v["top_p"] < 1,
            "below 1, the server doesn't return the log-probabilities of the policy that sampled; set top_p: 1",
        ),
        (
            ("teacher_placement", "teacher_server_base_url"),
            lambda v: v["teacher_placement"] == "server" and not v["teacher_server_base_url"],
            "the URL is missing; `tsdkd serve teacher` starts a server and prints it",
        ),
        (
            ("teacher_placement", "fused_head"),
            lambda v: v["teacher_placement"] == "server" and not v["fused_head"],
            "the server sends hidden states, which need the fused head; set fused_head: true",
        ),
    )

    temperature: float = option(1.0, "Divides both models' logits, in rollouts and in the loss.", POSITIVE)
    lmbda: float = option(
        1.0, "Share of optimizer steps that train on the student's own completions. 0: never generate.", FRACTION
    )
    learning_rate: float = option(5e-6, "Initial learning rate of AdamW.")
    lr_scheduler_type: SchedulerType | str = option("cosine", "Learning rate schedule.")
    logging_nan_inf_filter: bool = option(
        False, "Hide non-finite losses in the log. Off by default, so that a diverged run is visible."
    )
    top_p: float = option(
        1.0,
        "Nucleus mass of the rollouts (EOPD Table 8: 0.8 for Llama). "
        "Below 1, the sampling policy is no longer the one in the loss.",
        POSITIVE_FRACTION,
        _NEVER_SAMPLES,
    )
    max_completion_length: int = option(
        1024,
        "Maximum length of a completion, tokens. Prompt and completion together are limited by max_length.",
        AT_LEAST_ONE,
    )
    max_new_tokens: int | None = option(None, "GKDConfig's name for max_completion_length.")
    max_length: int | None = option(
        1024, "Maximum length of prompt plus completion, tokens. None: the models' context length.", SEQUENCE_LENGTH
    )
    chat_template_source: Literal["student", "teacher", "none"] = option(
        "student",
        "Model whose chat template renders the prompts. A string prompt becomes one user message. "
        "'none': use string prompts as they are.",
    )
    model_init_kwargs: dict[str, Any] | None = option(None, "Keyword arguments for the student's from_pretrained.")
    teacher_model_init_kwargs: dict[str, Any] | None = option(
        None, "Keyword arguments for the teacher's from_pretrained."
    )
    chat_template_kwargs: dict[str, Any] | None = option(
        None,
        'Keyword arguments for the chat template, e.g. {"enable_thinking": false}.',
        TEMPLATE_KWARGS,
        (lambda v: v["chat_template_source"] == "none", "chat_template_source is none"),
    )
    teacher_chat_template_kwargs: dict[str, Any] | None = option(
        None,
        "Render the teacher's prompts with its own chat template and these keyword arguments, e.g. "
        '{"enable_thinking": true}, or {}. Both models read the same completions. None: the teacher gets the '
        "student's prompts.",
        TEMPLATE_KWARGS,
    )
    prompt_suffix: str | None = option(
        None,
        "A line to append to each prompt before the chat template is applied; in a conversation, to its last user "
        "message. EOPD evaluates with one ('Please reason step by step, ...'). For training, neither paper mentions "
        "one.",
    )
    prompt_column: str | None = option(None, "Column of the prompt, if it is not 'prompt' or 'messages'.")
    completion_column: str | None = option(None, "Column of the completion, if it is not 'completion'.")
    answer_column: str | None = option(None, "Column of the right answer, if it is not 'answer'.")
    grader: str | None = option(
        None,
        "Your own function that grades completions, as package.module:function. None: exact match of the last "
        "\\boxed{} or number; for a reasoning_gym data set its task's verifier. Used for accuracy in evaluation, by "
        "tsdkd compare, and for grpo's reward.",
        IMPORT_PATH,
    )
    num_generations: int = option(
        1,
        "Completions per prompt in each rollout. Batch sizes count completions: the global batch of an optimizer step "
        "must be a multiple of it.",
        AT_LEAST_ONE,
    )
    eval_samples: int = option(
        1,
        "Completions per prompt in evaluation. More than one adds avg@n and pass@n to the accuracy, if rows have "
        "answers; the loss is always that of the first.",
        AT_LEAST_ONE,
        _NEVER_SAMPLES,
    )
    log_completions: bool = option(
        False,
        "Print some completions at each logging step and evaluation, and send more to W&B, trackio and TensorBoard.",
        no_effect=_NEVER_SAMPLES,
    )
    log_term_gradients: int = option(
        100,
        "Log the gradient norm of each loss term every N optimizer steps, on the first micro-batch. 0: never.",
        NON_NEGATIVE,
    )
    record_steps: int = option(
        0,
        "Record what both models predict at each token of some completions, every N optimizer steps. 0: never. "
        "Written to records/ in output_dir, for tsdkd analyze and tsdkd report.",
        NON_NEGATIVE,
    )
    record_completions: int = option(
        8,
        "Number of completions in a record.",
        AT_LEAST_ONE,
        (lambda v: v["record_steps"] == 0, "record_steps is 0"),
    )
    fused_head: bool = option(
        True,
        "Compute the loss from hidden states, one chunk of tokens at a time. "
        "False: from whole logits, for models whose logits are more than a scaled or soft-capped projection.",
    )
    head_chunk_gib: float | None = option(
        None,
        "Memory for the logits of one chunk, GiB. None: 0.25 on a CPU, 1 on a GPU. Doesn't change the result.",
        POSITIVE,
        (lambda v: not v["fused_head"], "fused_head is false"),
    )
    padding_free: bool | None = option(
        None,
        "Pack several sequences into each row of a forward pass, which leaves almost no padding. Doesn't change the "
        "loss. None: pack if both models support it. False: pad micro-batches, in the order of the data.",
    )
    max_tokens_per_micro_batch: int | None = option(
        None,
        "Maximum size of a micro-batch, tokens, padding included. The rows of an optimizer step are divided by it, so "
        "per_device_train_batch_size x gradient_accumulation_steps sets only their number. None: "
        "per_device_train_batch_size sequences of maximum length.",
        AT_LEAST_ONE,
        (lambda v: v["padding_free"] is False, "padding_free is false"),
    )
    teacher_placement: Literal["replica", "zero3", "cpu_offload", "server"] | None = option(
        None,
        "Where the teacher's weights are, independent of the student's ZeRO stage: a replica on every device, sharded "
        "(zero3), sharded in CPU memory (cpu_offload), or on vLLM servers (server). None: zero3 if the student is "
        "sharded, otherwise replica.",
    )
    teacher_server_base_url: list[str] | None = option(
        None,
        "URL of the teacher's vLLM server, or a list of URLs between which requests are balanced "
        "(`tsdkd serve teacher`).",
        SERVER_URLS,
        _NO_TEACHER_SERVER,
    )
    teacher_server_timeout: float = option(
        600.0,
        "How long requests to the teacher's servers may fail before the run stops, seconds. A server may start, or be "
        "started again, meanwhile.",
        POSITIVE,
        _NO_TEACHER_SERVER,
    )
    resume: bool = option(
        False,
        "Continue from the newest complete checkpoint in output_dir, or start if there is none; for requeued jobs. "
        "resume_from_checkpoint requires a checkpoint, and also accepts a path.",
    )
    max_nonfinite_steps: int = option(
        0,
        "Number of steps with a non-finite loss or gradient to skip before the run stops.",
        NON_NEGATIVE,
    )
    rollout_ahead: int = option(
        0,
        "Rollouts that a vLLM server samples in advance, 0 or 1. 1: during the last step on a rollout, the server "
        "samples the next one, with the weights from before that step. 0: rollouts and steps take turns.",
        (lambda v: v in (0, 1), "must be 0 or 1"),
        _NO_ROLLOUT_SERVER,
    )
    use_vllm: bool = option(False, "Sample the student's completions with vLLM.", no_effect=_NEVER_SAMPLES)
    vllm_mode: Literal["colocate", "server"] = option(
        "colocate",
        "Where vLLM runs: in each training process (colocate), or in a separate vllm serve process (server).",
        no_effect=_WITHOUT_VLLM,
    )
    vllm_model_impl: Literal["auto", "vllm", "transformers"] = option(
        "auto", "Model implementation that vLLM uses: its own, or transformers'.", no_effect=_NOT_COLOCATE
    )
    vllm_gpu_memory_utilization: float = option(
        0.3,
        "Share of the device's memory (on a CPU: of the machine's) for a colocated engine.",
        POSITIVE_FRACTION,
        _NOT_COLOCATE,
    )
    vllm_tensor_parallel_size: int = option(
        1, "Number of processes that share a colocated engine.", AT_LEAST_ONE, _NOT_COLOCATE
    )
    vllm_enable_sleep_mode: bool = option(
        False, "Free the memory of a colocated engine during training steps.", no_effect=_NOT_COLOCATE
    )
    vllm_server_base_url: str | None = option(
        None, "URL of the vLLM server, instead of host and port.", no_effect=_NOT_SERVER
    )
    vllm_server_host: str = option("127.0.0.1", "Host of the vLLM server.", no_effect=_NOT_SERVER)
    vllm_server_port: int = option(8000, "Port of the vLLM server.", PORT, _NOT_SERVER)
    vllm_server_timeout: float = option(
        240.0, "Time to wait for the vLLM server to start, seconds.", NON_NEGATIVE, _NOT_SERVER
    )
    vllm_request_timeout: float = option(
        1800.0, "Time to wait for a response of the vLLM server, seconds.", POSITIVE, _NOT_SERVER
    )
    vllm_group_port: int = option(51216, "Port for sending weights to the vLLM server.", PORT, _NOT_SERVER)
    vllm_max_model_length: int | None = option(
        None,
        "Context length of the engine, tokens. None: max_length, or else the models' context length.",
        SEQUENCE_LENGTH,
        _WITHOUT_VLLM,
    )
    vllm_check_every: int = option(
        50,
        "Compare the engine's log-probabilities with the student's after the first weight sync, and after every N-th.",
        AT_LEAST_ONE,
        _WITHOUT_VLLM,
    )

    _VALID_DICT_FIELDS = [
        *GKDConfig._VALID_DICT_FIELDS,
        *("chat_template_kwargs", "teacher_chat_template_kwargs"),
    ]

    def __post_init__(self) -> None:
        problems = self._resolve_aliases() + self._coerce_fields()
        problems = problems or validate_options(type(self), vars(self))
        if problems:
            raise ConfigError(problems)
        self.max_new_tokens = self.max_completion_length
        for name in ("checkpointing", "checkpointing_kwargs"):
            if hasattr(self, f"activation_{name}"):  # since transformers 5.24, which deprecates the other name
                setattr(self, f"activation_{name}", getattr(self, f"gradient_{name}"))
        if vars(self)["bf16"] is None and not self.fp16 and (self.use_cpu or not is_torch_bf16_gpu_available()):
            self.bf16 = False  # TRL turns it on by default, which transformers then refuses
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # torch would warn
        super().__post_init__()
        self.remove_unused_columns = False

    def __getstate__(self) -> dict[str, Any]:
        """The values without the hub's tokens: `Trainer` pickles its arguments into what it pushes to the hub."""
        return {name: None if name.endswith("hub_token") else value for name, value in vars(self).items()}

    def _resolve_aliases(self) -> list[str]:
        """Move values given under an alias to the canonical name. Returns conflicts."""
        problems = []
        for alias, name in ALIASES.items():
            given, value = getattr(self, alias, None), getattr(self, name)
            if given is None:
                continue
            if alias == "max_new_tokens" and value not in (given, get_default(type(self), name)):
                problems.append(describe_alias_conflict(alias, value, given))
            setattr(self, name, given)
        return problems

    def _coerce_fields(self) -> list[str]:
        hints = get_type_hints(type(self))
        problems = []
        for name in declared_fields(type(self)):
            try:
                setattr(self, name, coerce(getattr(self, name), hints[name]))
            except ValueError as error:
                problems.append(f"{name}: {error}")
        return problems

    @classmethod
    def method_options(cls) -> list[str]:
        """The options that a method adds, or whose default it changes."""
        common = {name: get_default(TokenSelectiveConfig, name) for name in declared_fields(TokenSelectiveConfig)}
        if cls is TokenSelectiveConfig:
            return list(common)
        names = [name for name in declared_fields(cls) if name not in cls.unsupported_options]
        return [name for name in names if name not in common or get_default(cls, name) != common[name]]

    @property
    def needs_completions(self) -> bool:
        """Whether some steps train on the data set's completions."""
        return self.always_needs_completions or self.lmbda < 1

    @property
    def iterations_per_rollout(self) -> int:
        """How many times each rollout is trained on."""
        return 1

    def global_batch_size(self, processes: int | None = None) -> int:
        """Completions per optimizer step, over all processes; by default with the current number of processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * (processes or self.world_size)

    def steps_per_rollout(self, processes: int | None = None) -> int:
        """Number of optimizer steps that train on one rollout; by default with the current number of processes.

        Raises:
            ConfigError: the batch sizes don't fit together.
        """
        if self.global_batch_size(processes) % self.num_generations:
            raise ConfigError(
                [
                    f"num_generations: the global batch must be a multiple of it, found {self.num_generations}; "
                    f"{self._describe_global_batch(processes)}"
                ]
            )
        return 1

    def _describe_global_batch(self, processes: int | None = None) -> str:
        return (
            f"the global batch is {self.per_device_train_batch_size} (per_device_train_batch_size) x "
            f"{self.gradient_accumulation_steps} (gradient_accumulation_steps) x {processes or self.world_size} "
            f"(processes) = {self.global_batch_size(processes)} completions"
        )


def require_config(args: Any, config_class: type[TokenSelectiveConfig], trainer: str) -> None:
    """Raises `ConfigError` for the configuration of another method or another library."""
    found = type(args)
    if getattr(args, "method", None) != config_class.method:
        name = (
            found.__qualname__
            if issubclass(found, TokenSelectiveConfig)
            else f"{found.__module__}.{found.__qualname__}"
        )
        raise ConfigError([f"args: {trainer} takes a {config_class.__name__}, found a {name}"])


@dataclass
class DataArguments:
    """The data sets."""

    dataset_name: str | None = option(
        None,
        "Prompts: hub name, local file (JSON, JSONL, CSV, Parquet), a folder of such files, or problems that "
        "reasoning-gym generates: reasoning_gym:TASK or reasoning_gym:TASK?option=value&...",
    )
    dataset_config: str | None = option(None, "Configuration (subset) of a hub data set.")
    dataset_train_split: str = option("train", "Split to train on.")
    eval_dataset_name: str | None = option(None, "Held-out prompts, if they aren't a split of dataset_name.")
    dataset_test_split: str = option("test", "Split to evaluate on.")
