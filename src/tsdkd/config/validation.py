"""What values make sense together: ranges, what isn't supported, what would have no effect. All problems at once."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from .options import AT_LEAST_ONE, FRACTION, NON_NEGATIVE, POSITIVE, POSITIVE_FRACTION, Check, Pointless, enum_value

# Options of TRL and transformers that would have no effect here, or a wrong one: refused, not ignored.
UNSUPPORTED_OPTIONS = {
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

_BELOW_ONE: Check = (lambda v: 0 <= v < 1, "must be in [0, 1)")
_SEQUENCE_LENGTH: Check = (lambda v: v >= 2, "must be at least 2 (a prompt and a completion token)")
_PORT: Check = (lambda v: 0 < v < 2**16, "must be a port, 1 to 65535")

_LOG_LEVELS = ("debug", "info", "warning", "error", "critical", "passive")
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_CHECKPOINTING_KWARGS = {
    "use_reentrant",
    "preserve_rng_state",
    "determinism_check",
    "debug",
    "early_stop",
    "selective",
}
_RESERVED_TEMPLATE_KWARGS = {
    "add_generation_prompt",
    "tokenize",
    "return_dict",
    "return_tensors",
    "padding",
    "truncation",
}


def _only_keys(allowed: set[str]) -> Check:
    return (lambda v: set(v) <= allowed), f"must have no other keys than {', '.join(sorted(allowed))}"


_RANGES: dict[str, Check] = {
    "lmbda": FRACTION,
    "temperature": POSITIVE,
    "top_p": POSITIVE_FRACTION,
    "max_new_tokens": AT_LEAST_ONE,
    "max_length": _SEQUENCE_LENGTH,
    "log_term_gradients": NON_NEGATIVE,
    "max_nonfinite_steps": NON_NEGATIVE,
    "head_chunk_gib": POSITIVE,
    "vllm_gpu_memory_utilization": POSITIVE_FRACTION,
    "vllm_tensor_parallel_size": AT_LEAST_ONE,
    "vllm_server_timeout": NON_NEGATIVE,
    "vllm_request_timeout": POSITIVE,
    "vllm_server_port": _PORT,
    "vllm_group_port": _PORT,
    "vllm_max_model_length": _SEQUENCE_LENGTH,
    "vllm_check_every": AT_LEAST_ONE,
    "vllm_importance_sampling_clip_max": AT_LEAST_ONE,
    "learning_rate": POSITIVE,
    "weight_decay": NON_NEGATIVE,
    "warmup_steps": NON_NEGATIVE,
    "max_grad_norm": NON_NEGATIVE,
    "per_device_train_batch_size": AT_LEAST_ONE,
    "per_device_eval_batch_size": AT_LEAST_ONE,
    "gradient_accumulation_steps": AT_LEAST_ONE,
    "num_train_epochs": POSITIVE,
    "max_steps": (lambda v: v == -1 or v >= 1, "must be at least 1 (or -1 for num_train_epochs)"),
    "logging_steps": POSITIVE,
    "save_steps": POSITIVE,
    "eval_steps": POSITIVE,
    "save_total_limit": AT_LEAST_ONE,
    "seed": (lambda v: 0 <= v < 2**32, "must be at least 0 and below 2**32"),
    "dataloader_num_workers": NON_NEGATIVE,
    "eval_delay": NON_NEGATIVE,
    "neftune_noise_alpha": POSITIVE,
    "adam_beta1": _BELOW_ONE,
    "adam_beta2": _BELOW_ONE,
    "adam_epsilon": POSITIVE,
    "log_level": (lambda v: v in _LOG_LEVELS, f"must be one of {', '.join(_LOG_LEVELS)}"),
    "dtype": (lambda v: v in _DTYPES, f"must be one of {', '.join(_DTYPES)}"),
    "gradient_checkpointing_kwargs": _only_keys(_CHECKPOINTING_KWARGS),
    "chat_template_kwargs": (
        lambda v: not _RESERVED_TEMPLATE_KWARGS & set(v),
        f"must leave out {', '.join(sorted(_RESERVED_TEMPLATE_KWARGS))}: they are tsdkd's to set",
    ),
    "lora_r": AT_LEAST_ONE,
    "lora_alpha": AT_LEAST_ONE,
    "lora_dropout": _BELOW_ONE,
    "dataset_num_proc": AT_LEAST_ONE,
    "train_sampling_strategy": (lambda v: v in ("random", "sequential"), "must be 'random' or 'sequential'"),
}


# option -> (the setting that makes it meaningless, as a predicate on all values, and how to say so)
_NO_EFFECT: dict[str, Check] = {
    "top_p": (lambda v: v["lmbda"] == 0, "lmbda is 0: nothing is generated"),
    "log_completions": (lambda v: v["lmbda"] == 0, "lmbda is 0: nothing is generated"),
    "head_chunk_gib": (lambda v: not v["fused_head"], "fused_head is false"),
    "chat_template_kwargs": (lambda v: v["chat_template_source"] == "none", "chat_template_source is none"),
    "save_steps": (lambda v: enum_value(v["save_strategy"]) != "steps", "save_strategy is not steps"),
    "save_total_limit": (lambda v: enum_value(v["save_strategy"]) == "no", "save_strategy is no"),
    "load_best_model_at_end": (lambda v: enum_value(v["save_strategy"]) == "no", "save_strategy is no"),
    "eval_steps": (lambda v: enum_value(v["eval_strategy"]) != "steps", "eval_strategy is not steps"),
    "use_vllm": (lambda v: v["lmbda"] == 0, "lmbda is 0: nothing is generated"),
    "vllm_importance_sampling_clip_max": (
        lambda v: not v["vllm_importance_sampling_correction"],
        "vllm_importance_sampling_correction is false",
    ),
}
_COLOCATE_OPTIONS = ("gpu_memory_utilization", "tensor_parallel_size", "enable_sleep_mode", "model_impl")
_SERVER_OPTIONS = ("server_base_url", "server_host", "server_port", "server_timeout", "request_timeout", "group_port")
_VLLM_OPTIONS = ("mode", "max_model_length", "check_every", "importance_sampling_correction")


def _no_effect_if(condition: str, names: tuple[str, ...]) -> dict[str, Check]:
    tests = {
        "use_vllm is false": lambda v: not v["use_vllm"],
        "vllm_mode is not server": lambda v: v["vllm_mode"] != "server",
        "vllm_mode is not colocate": lambda v: v["vllm_mode"] != "colocate",
    }
    return {f"vllm_{name}": (tests[condition], condition) for name in names}


_NO_EFFECT |= _no_effect_if("use_vllm is false", _VLLM_OPTIONS)
_NO_EFFECT |= _no_effect_if("vllm_mode is not server", _SERVER_OPTIONS) | _no_effect_if(
    "vllm_mode is not colocate", _COLOCATE_OPTIONS
)
_LORA_OPTIONS = (
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "lora_target_parameters",
    "lora_modules_to_save",
    "use_rslora",
    "use_dora",
)


def declared_fields(cls: type) -> list[str]:
    """The fields that tsdkd declares, or gives a type or default of its own."""
    package = __name__.partition(".")[0]
    declared = [c.__annotations__ for c in cls.__mro__ if c.__module__.partition(".")[0] == package]
    names = {f.name for f in fields(cls)}
    return [name for name in dict.fromkeys(n for annotations in declared for n in annotations) if name in names]


def get_default(cls: type, name: str) -> Any:
    """The default of a dataclass field (None where there is none)."""
    for f in fields(cls):
        if f.name == name:
            return (
                f.default if f.default is not MISSING else f.default_factory() if callable(f.default_factory) else None
            )
    raise KeyError(name)


def get_rules(cls: Any) -> tuple[dict[str, Check], dict[str, Pointless]]:
    """What the options of a configuration must fulfil, and when they have no effect, by name."""
    metadata = {f.name: f.metadata for f in fields(cls)}
    ranges = {n: valid for n, m in metadata.items() if (valid := m.get("valid") or _RANGES.get(n))}
    pointless = {n: test for n, m in metadata.items() if (test := m.get("pointless") or _NO_EFFECT.get(n))}
    return ranges, pointless


def validate_options(cls: Any, values: Mapping[str, Any]) -> list[str]:
    """All problems of a configuration's values: range, support, contradiction. Values are already of their types."""
    ranges, pointless = get_rules(cls)
    unsupported_options = getattr(cls, "unsupported_options", {})
    changed = sorted(f.name for f in fields(cls) if f.name in values and values[f.name] != get_default(cls, f.name))
    problems = []
    for name, (valid, text) in sorted(ranges.items()):
        value = values.get(name)
        if value is not None and not valid(value):
            problems.append(f"{name}: {text}, found {value!r}")
        elif isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{name}: must be finite, found {value!r}")
    for name in changed:
        if name in UNSUPPORTED_OPTIONS:
            problems.append(f"{name}: not supported here ({UNSUPPORTED_OPTIONS[name]})")
        if name in unsupported_options:
            problems.append(f"{name}: no option of {cls.method}: {unsupported_options[name]}; remove it")
        elif name in pointless and pointless[name][0](values):
            problems.append(f"{name}: {values[name]!r} has no effect because {pointless[name][1]}; remove it")
    return problems + _check_conflicts(values, changed)


def _check_conflicts(values: Mapping[str, Any], changed: list[str]) -> list[str]:
    problems = []
    if values.get("bf16") and values.get("fp16"):
        problems.append("bf16, fp16: at most one can be true")
    if values.get("use_vllm") and values["temperature"] > 2:
        problems.append(f"temperature: vLLM takes at most 2, found {values['temperature']}")
    if "use_peft" in values and not values["use_peft"]:
        for name in (n for n in _LORA_OPTIONS if n in changed):
            problems.append(f"{name}: {values[name]!r} has no effect because use_peft is false; set use_peft: true")
    return problems
