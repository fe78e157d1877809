"""The options that all methods share, and the data arguments; `tsdkd.methods` has what each method adds.

Field names, defaults and help follow TRL and transformers. A configuration that can't be run raises one `ConfigError`
that lists every problem.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_type_hints

from transformers import SchedulerType
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


@dataclass
class TokenSelectiveConfig(GKDConfig):
    """The options that all methods share; `tsdkd.methods` has one subclass for each method.

    Options are described by their `help`, which docs/configuration.md lists.
    """

    method: ClassVar[str]
    paper: ClassVar[str] = "no paper"
    # Whether it trains on the data set's completions whatever lmbda is.
    always_needs_completions: ClassVar[bool] = False
    # The completions that it trains on, for people.
    completions_source: ClassVar[str] = "the student's; the data set's in 1 - lmbda of the steps"
    # Whether it distils from a teacher, needs the teacher's weights, and has the teacher take part in rollouts.
    has_teacher: ClassVar[bool] = True
    loads_teacher: ClassVar[bool] = True
    teacher_samples: ClassVar[bool] = False
    # Whether lmbda decides which completions a step trains on, and beta is that of its generalised JSD.
    has_lmbda: ClassVar[bool] = True
    has_jsd: ClassVar[bool] = False
    # Inherited options that it refuses, and why: text for messages, from which nothing else follows.
    unsupported_options: ClassVar[dict[str, str]] = {"beta": "the method has no generalised JSD"}

    conflicts: ClassVar[tuple[ConflictRule, ...]] = (
        (
            ("temperature", "use_vllm"),
            lambda v: v["use_vllm"] and v["temperature"] > 2,
            "vLLM's temperature is at most 2",
        ),
    )

    temperature: float = option(1.0, "Divides student and teacher logits, in rollouts and in the loss.", POSITIVE)
    lmbda: float = option(
        1.0, "Share of optimizer steps on the student's own completions; 0 never generates.", FRACTION
    )
    learning_rate: float = option(5e-6, "Initial learning rate of AdamW.")
    lr_scheduler_type: SchedulerType | str = option("cosine", "Learning rate schedule.")
    logging_nan_inf_filter: bool = option(False, "Hide non-finite losses in the log. Off: a diverged run shows.")
    top_p: float = option(
        1.0,
        "Nucleus mass of the rollouts (EOPD Table 8: 0.8 for Llama). "
        "Below 1 the sampler is no longer the policy that the loss models.",
        POSITIVE_FRACTION,
        _NEVER_SAMPLES,
    )
    max_completion_length: int = option(
        1024, "Completion limit, tokens; prompt and completion together obey max_length.", AT_LEAST_ONE
    )
    max_new_tokens: int | None = option(None, "GKDConfig's name of max_completion_length; the same option.")
    max_length: int | None = option(
        1024, "Limit of prompt plus completion, tokens; none: the models' context.", SEQUENCE_LENGTH
    )
    chat_template_source: Literal["student", "teacher", "none"] = option(
        "student",
        "Whose chat template renders the prompts; a string prompt becomes one user message. "
        "'none' takes string prompts as they are.",
    )
    model_init_kwargs: dict[str, Any] | None = option(None, "Keyword arguments of the student's from_pretrained.")
    teacher_model_init_kwargs: dict[str, Any] | None = option(None, "Keyword arguments of the teacher's.")
    chat_template_kwargs: dict[str, Any] | None = option(
        None,
        'Keyword arguments of the chat template, e.g. {"enable_thinking": false}.',
        TEMPLATE_KWARGS,
        (lambda v: v["chat_template_source"] == "none", "chat_template_source is none"),
    )
    prompt_suffix: str | None = option(
        None,
        "A line after each prompt, before the chat template; in a conversation after its last user message. "
        "EOPD evaluates with one ('Please reason step by step, ...'); neither paper says so of training.",
    )
    prompt_column: str | None = option(None, "Column of the prompt, if it is not 'prompt' or 'messages'.")
    completion_column: str | None = option(None, "Column of the completion, if it is not 'completion'.")
    answer_column: str | None = option(None, "Column of the right answer, if it is not 'answer'.")
    grader: str | None = option(
        None,
        "A function of yours that grades completions, as package.module:function; none: exact match of the last "
        "\\boxed{} or number. Evaluation's accuracy, tsdkd compare and grpo's reward use it.",
        IMPORT_PATH,
    )
    log_completions: bool = option(
        False, "Print a table of completions at every logging step.", no_effect=_NEVER_SAMPLES
    )
    log_term_gradients: int = option(
        100,
        "Log each term's gradient norm, of the step's first micro-batch, every so many optimizer steps; 0 is never.",
        NON_NEGATIVE,
    )
    record_steps: int = option(
        0,
        "Record what both models say at each token of some completions, every so many optimizer steps; 0 is never. "
        "Written to records/ in output_dir, for tsdkd analyze and tsdkd report.",
        NON_NEGATIVE,
    )
    record_completions: int = option(
        8,
        "How many completions a record holds.",
        AT_LEAST_ONE,
        (lambda v: v["record_steps"] == 0, "record_steps is 0"),
    )
    fused_head: bool = option(
        True,
        "Compute the loss from hidden states, a chunk of tokens at a time. "
        "False: from whole logits, for models whose logits are more than a scaled, soft-capped projection.",
    )
    head_chunk_gib: float | None = option(
        None,
        "GiB for the logits of one chunk; none: 0.25 on a CPU, 1 on a GPU. The numbers don't depend on it.",
        POSITIVE,
        (lambda v: not v["fused_head"], "fused_head is false"),
    )
    teacher_placement: Literal["replica", "zero3", "cpu_offload"] | None = option(
        None,
        "Where the teacher's weights are, whatever the student's ZeRO stage: whole on every device, sharded over them "
        "(zero3), or over the hosts' memory (cpu_offload). None: sharded if the student's are, else whole.",
    )
    resume: bool = option(
        False,
        "Continue from the newest complete checkpoint in output_dir; without one, start: for jobs that are requeued. "
        "resume_from_checkpoint needs one, and takes a path too.",
    )
    max_nonfinite_steps: int = option(
        0,
        "How many steps with a non-finite loss or gradient are left out before the run stops.",
        NON_NEGATIVE,
    )
    use_vllm: bool = option(False, "Roll out with vLLM.", no_effect=_NEVER_SAMPLES)
    vllm_mode: Literal["colocate", "server"] = option(
        "colocate",
        "Where vLLM runs: an engine in each process (colocate), or one that vllm serve runs (server).",
        no_effect=_WITHOUT_VLLM,
    )
    vllm_model_impl: Literal["auto", "vllm", "transformers"] = option(
        "auto", "Whose implementation of the model vLLM runs: its own, or transformers'.", no_effect=_NOT_COLOCATE
    )
    vllm_gpu_memory_utilization: float = option(
        0.3,
        "Share of a device's memory (on a CPU: of the machine's) for a colocated engine.",
        POSITIVE_FRACTION,
        _NOT_COLOCATE,
    )
    vllm_tensor_parallel_size: int = option(1, "Processes that share a colocated engine.", AT_LEAST_ONE, _NOT_COLOCATE)
    vllm_enable_sleep_mode: bool = option(
        False, "A colocated engine gives its memory back during training steps.", no_effect=_NOT_COLOCATE
    )
    vllm_server_base_url: str | None = option(
        None, "URL of the vLLM server; instead of host and port.", no_effect=_NOT_SERVER
    )
    vllm_server_host: str = option(
        "127.0.0.1", "Host of the vLLM server; by default this machine.", no_effect=_NOT_SERVER
    )
    vllm_server_port: int = option(8000, "Port of the vLLM server.", PORT, _NOT_SERVER)
    vllm_server_timeout: float = option(
        240.0, "How long to wait for the vLLM server to be up, seconds.", NON_NEGATIVE, _NOT_SERVER
    )
    vllm_request_timeout: float = option(
        1800.0, "How long to wait for an answer of the vLLM server, seconds.", POSITIVE, _NOT_SERVER
    )
    vllm_group_port: int = option(51216, "Port through which the vLLM server gets the weights.", PORT, _NOT_SERVER)
    vllm_max_model_length: int | None = option(
        None,
        "The engine's context, tokens; none: max_length, or without one the models' context.",
        SEQUENCE_LENGTH,
        _WITHOUT_VLLM,
    )
    vllm_check_every: int = option(
        50,
        "Every how many weight syncs, the first included, the engine's log-probabilities are compared with the "
        "student's.",
        AT_LEAST_ONE,
        _WITHOUT_VLLM,
    )

    _VALID_DICT_FIELDS = [*GKDConfig._VALID_DICT_FIELDS, "chat_template_kwargs"]

    def __post_init__(self) -> None:
        problems = self._resolve_aliases() + self._coerce_fields()
        problems = problems or validate_options(type(self), vars(self))
        if problems:
            raise ConfigError(problems)
        self.max_new_tokens = self.max_completion_length
        for name in ("checkpointing", "checkpointing_kwargs"):
            if hasattr(self, f"activation_{name}"):  # since transformers 5.24, which deprecates the other name
                setattr(self, f"activation_{name}", getattr(self, f"gradient_{name}"))
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
        """The options that a method adds to what all have, or gives another default."""
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
        """How often a rollout's completions are trained on."""
        return 1

    def steps_per_rollout(self, processes: int | None = None) -> int:
        """Optimizer steps that one rollout serves, with so many processes; by default those that there are."""
        return 1


def require_config(args: Any, config_class: type[TokenSelectiveConfig], trainer: str) -> None:
    """Raises `ConfigError` for another method's configuration, and for another library's of the same name."""
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
    """Where the prompts come from."""

    dataset_name: str | None = option(
        None, "Hub name, local file (JSON, JSONL, CSV, Parquet), or a folder of such files."
    )
    dataset_config: str | None = option(None, "Configuration (subset) of a hub data set.")
    dataset_train_split: str = option("train", "Split to train on.")
    eval_dataset_name: str | None = option(None, "Held-out prompts, if they aren't a split of dataset_name.")
    dataset_test_split: str = option("test", "Split to evaluate on.")
