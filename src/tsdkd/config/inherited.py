"""Validation rules for options inherited from TRL and transformers.

The rules of tsdkd's own options are in their declarations (`tsdkd.config.options.option`).
"""

from .options import (
    AT_LEAST_ONE,
    BELOW_ONE,
    NON_NEGATIVE,
    POSITIVE,
    ConflictRule,
    Rules,
    ValueRule,
    enum_value,
)


def _one_of(*choices: str) -> ValueRule:
    return (lambda v: v in choices), f"must be one of {', '.join(choices)}"


def _only_keys(*allowed: str) -> ValueRule:
    return (lambda v: set(v) <= set(allowed)), f"must have only the keys {', '.join(sorted(allowed))}"


_WITHOUT_PEFT = (lambda v: not v["use_peft"], "use_peft is false; set use_peft: true")
_WITHOUT_CHECKPOINTS = (lambda v: enum_value(v["save_strategy"]) == "no", "save_strategy is no")

INHERITED_RULES: dict[str, Rules] = {
    # the model (ModelConfig)
    "dtype": Rules(_one_of("auto", "float32", "bfloat16", "float16")),
    "lora_r": Rules(AT_LEAST_ONE, _WITHOUT_PEFT),
    "lora_alpha": Rules(AT_LEAST_ONE, _WITHOUT_PEFT),
    "lora_dropout": Rules(BELOW_ONE, _WITHOUT_PEFT),
    **dict.fromkeys(
        ("lora_target_modules", "lora_target_parameters", "lora_modules_to_save", "use_rslora", "use_dora"),
        Rules(no_effect=_WITHOUT_PEFT),
    ),
    # the data
    "dataset_num_proc": Rules(AT_LEAST_ONE),
    "dataloader_num_workers": Rules(NON_NEGATIVE),
    "train_sampling_strategy": Rules(
        (lambda v: v in ("random", "sequential"), "must be 'random' or 'sequential'"),
    ),
    # the optimizer
    "learning_rate": Rules(POSITIVE),
    "weight_decay": Rules(NON_NEGATIVE),
    "warmup_steps": Rules(NON_NEGATIVE),
    "max_grad_norm": Rules(NON_NEGATIVE),
    "adam_beta1": Rules(BELOW_ONE),
    "adam_beta2": Rules(BELOW_ONE),
    "adam_epsilon": Rules(POSITIVE),
    "neftune_noise_alpha": Rules(POSITIVE),
    "seed": Rules((lambda v: 0 <= v < 2**32, "must be at least 0 and below 2**32")),
    # steps and batches
    "per_device_train_batch_size": Rules(AT_LEAST_ONE),
    "per_device_eval_batch_size": Rules(AT_LEAST_ONE),
    "gradient_accumulation_steps": Rules(AT_LEAST_ONE),
    "num_train_epochs": Rules(POSITIVE),
    "max_steps": Rules((lambda v: v == -1 or v >= 1, "must be at least 1 (or -1 for num_train_epochs)")),
    "gradient_checkpointing_kwargs": Rules(
        _only_keys("use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop", "selective")
    ),
    # what is logged, saved and evaluated
    "log_level": Rules(_one_of("debug", "info", "warning", "error", "critical", "passive")),
    "logging_steps": Rules(POSITIVE),
    "save_steps": Rules(POSITIVE, (lambda v: enum_value(v["save_strategy"]) != "steps", "save_strategy is not steps")),
    "save_total_limit": Rules(AT_LEAST_ONE, _WITHOUT_CHECKPOINTS),
    "load_best_model_at_end": Rules(no_effect=_WITHOUT_CHECKPOINTS),
    "eval_steps": Rules(POSITIVE, (lambda v: enum_value(v["eval_strategy"]) != "steps", "eval_strategy is not steps")),
    "eval_delay": Rules(NON_NEGATIVE),
}

CONFLICTS: list[ConflictRule] = [
    (("bf16", "fp16"), lambda v: v["bf16"] and v["fp16"], "at most one can be true"),
]
"""Rules for combinations of options."""

# Refused because they would have no effect or a wrong effect.
UNSUPPORTED_OPTIONS: dict[str, str] = {
    "seq_kd": "use lmbda: 0 with the teacher's completions as data",
    **dict.fromkeys(("packing", "packing_strategy", "eval_packing"), "use padding_free"),
    "pad_to_multiple_of": "use padding_free; without it, sequences are padded to the longest of their micro-batch",
    **dict.fromkeys(("completion_only_loss", "assistant_only_loss"), "the loss always covers only the completion"),
    "dataset_text_field": "use prompt_column",
    "dataset_kwargs": "use prompt_column, completion_column and chat_template_kwargs",
    "truncation_mode": "prompts are never truncated; prompts that leave no room for a completion are dropped",
    "shuffle_dataset": "the sampler shuffles; see train_sampling_strategy",
    "chat_template_path": "use chat_template_source, or save the template with the tokenizer",
    "eos_token": "set it in the tokenizer; the stop tokens of the generation config are used",
    "pad_token": "padding is masked by length; no pad token is needed",
    **dict.fromkeys(("loss_type", "label_smoothing_factor", "router_aux_loss_coef"), "the method determines the loss"),
    "auto_find_batch_size": "it would change the batch size",
    "enable_jit_checkpoint": "it overwrites a valid checkpoint with mid-step state; SIGTERM saves one anyway",
    "save_only_model": "such a checkpoint can't be resumed; use save_total_limit to limit disk usage",
    "save_on_each_node": "output_dir must be a folder shared by all nodes",
    "average_tokens_across_devices": "terms are always averaged over the global batch",
    **dict.fromkeys(
        ("include_for_metrics", "batch_eval_metrics", "prediction_loss_only"), "the logged metrics are fixed"
    ),
    "label_names": "the collator creates no labels",
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), "it replaces the model's forward"),
    **dict.fromkeys(
        ("torch_compile", "torch_compile_backend", "torch_compile_mode"), "shapes change with every sampled token"
    ),
    **dict.fromkeys(("fsdp", "fsdp_config", "parallelism_config"), "use DeepSpeed ZeRO through accelerate"),
    **dict.fromkeys(
        ("load_in_8bit", "load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_quant_storage", "use_bnb_nested_quant"),
        "quantized weights are not supported; set use_peft to save memory",
    ),
    "lora_task_type": "students are causal language models",
}
