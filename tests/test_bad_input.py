"""Bad input through the command line: exit code 2, one line a problem that names the field, nothing written."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset

from conftest import QUIET, TEMPLATE, WORDS, build_tokenizer, make_rows, write_jsonl
from tsdkd import ConfigError, EOPDConfig, TSDKDConfig, TSDKDError
from tsdkd.cli import main

GONE = object()
"""As a value: the key is left out."""
Say = tuple[str, ...]
"""What one line of the error output must contain."""
EOPD = {"method": "eopd", "max_length": 32, "rollout_batch_size": 4}


class Workplace:
    """A folder with a valid configuration, and the command line run in it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str], base: dict[str, Any]) -> None:
        self.folder, self.capsys, self.base = folder, capsys, base

    def write(self, changes: dict[str, Any]) -> str:
        """run.yaml: the valid configuration with changes."""
        values = {k: v for k, v in {**self.base, **changes}.items() if v is not GONE}
        (self.folder / "run.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        return "run.yaml"

    def files(self) -> dict[str, bytes | None]:
        """All that is there: folders (None) and files (their bytes)."""
        return {
            str(p.relative_to(self.folder)): p.read_bytes() if p.is_file() else None for p in self.folder.rglob("*")
        }

    def run(self, *argv: str) -> tuple[int, str]:
        """Exit code and error output."""
        self.capsys.readouterr()
        try:
            code: Any = main(argv)
        except SystemExit as stop:  # argparse's own
            code = stop.code
        return code, self.capsys.readouterr().err

    def refuses(self, argv: tuple[str, ...], *lines: Say) -> None:
        """Run; there must be exactly these problems, and nothing else may have happened."""
        before = self.files()
        code, error = self.run(*argv)
        told = [line for line in error.splitlines() if line.startswith(f"tsdkd {argv[0]}:")]
        assert "Traceback" not in error
        assert code == 2, error
        for fragments in lines:
            assert any(all(f in line for f in fragments) for line in told), f"no line has {fragments}:\n{error}"
        assert len(told) == len(lines), error
        assert self.files() == before, "something was written"

    def refuses_config(self, changes: dict[str, Any], flags: tuple[str, ...], *lines: Say) -> None:
        """`refuses` for the valid configuration with changes."""
        self.refuses(("train", "--config", self.write(changes), *flags), *lines)


@pytest.fixture
def place(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    saved_model: Callable[..., str],
    rows_file: str,
) -> Workplace:
    """The current folder, with a configuration that trains one step."""
    monkeypatch.chdir(tmp_path)
    base = {
        "model_name_or_path": saved_model("qwen3", 0),
        "teacher_model_name_or_path": saved_model("qwen3", 1),
        "dataset_name": rows_file,
        "output_dir": "out",
        "max_completion_length": 4,
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        **QUIET,
    }
    return Workplace(tmp_path, capsys, base)


@pytest.fixture(scope="session")
def earlier_run(
    tmp_path_factory: pytest.TempPathFactory, saved_model: Callable[..., str], rows_file: str
) -> Iterator[Path]:
    """The output of a run of one step with a checkpoint: the valid configuration is valid."""
    folder = tmp_path_factory.mktemp("earlier") / "out"
    values = {
        "model_name_or_path": saved_model("qwen3", 0),
        "teacher_model_name_or_path": saved_model("qwen3", 1),
        "dataset_name": rows_file,
        "output_dir": str(folder),
        "max_completion_length": 4,
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        **QUIET,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    (folder.parent / "run.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    assert main(["train", "--config", str(folder.parent / "run.yaml")]) == 0
    assert (folder / "checkpoint-1").is_dir()
    yield folder


# What the configuration says

CONFIGS: dict[str, tuple[dict[str, Any], tuple[str, ...], list[Say]]] = {
    # unknown keys
    "misspelt key": ({"learning_rat": 1e-5}, (), [("learning_rat:", "'learning_rate'")]),
    "misspelt key of the method": ({"opener_ration": 0.2}, (), [("opener_ration", "'opener_ratio'")]),
    "misspelt data key": ({"dataset_nam": "x"}, (), [("dataset_nam:", "'dataset_name'")]),
    "unknown key": ({"zzqx": 1}, (), [("zzqx",)]),
    "unknown key that is a number": ({7: 1}, (), [("7",)]),
    "private name": ({"_n_gpu": 1}, (), [("_n_gpu",)]),
    "misspelt flag": ({}, ("--warmup_step", "3"), [("warmup_step", "'warmup_steps'")]),
    "abbreviated flag": ({}, ("--max_step", "3"), [("max_step", "'max_steps'")]),
    "value without a flag": ({}, ("3e-5",), [("3e-5", "--key")]),
    "one dash": ({}, ("-alpha", "0.2"), [("-alpha", "--key"), ("0.2", "--key")]),
    "unknown method": ({"method": "tsdkd"}, (), [("method", "tsdkd", "'tsd-kd'", "eopd")]),
    "method is a list": ({"method": ["eopd"]}, (), [("method", "eopd")]),
    "method is empty": ({"method": None}, (), [("method", "tsd-kd")]),
    # an option with two names, and names that options had before
    "two names, two values": (
        {"max_new_tokens": 8},
        (),
        [("max_completion_length", "max_new_tokens", "4 and 8")],
    ),
    "two names, two values, by flags": (
        {},
        ("--max_new_tokens", "8", "--max-completion-length", "9"),
        [("max_completion_length", "max_new_tokens", "'9' and '8'")],
    ),
    "checkpointing's other name": (
        {"activation_checkpointing_kwargs": {"zzqx": 1}},
        (),
        [("gradient_checkpointing_kwargs", "zzqx", "use_reentrant")],
    ),
    "both names of checkpointing": (
        {"gradient_checkpointing": True, "activation_checkpointing": False},
        (),
        [("gradient_checkpointing", "activation_checkpointing", "True and False")],
    ),
    "the other name, out of its range": (
        {"max_completion_length": GONE, "max_new_tokens": 0},
        (),
        [("max_completion_length", "0", "at least 1")],
    ),
    **{
        f"{old} is {new}": ({"method": method, old: 1}, (), [(f"{old}: is called {new}",)])
        for method, old, new in [
            ("opd", "clip_epsilon", "epsilon"),
            ("minillm", "epochs_per_rollout", "num_iterations"),
            ("minillm", "discount", "gamma"),
            ("distillm", "own_share", "on_policy_share"),
            ("distillm", "own_share_step", "on_policy_share_step"),
        ]
    },
    # types
    "number is a word": ({"learning_rate": "fast"}, (), [("learning_rate", "number", "fast")]),
    "number is a list": ({"alpha": [0.1]}, (), [("alpha", "number", "[0.1]")]),
    "number is a bool": ({"alpha": True}, (), [("alpha", "number", "True")]),
    "number is nothing": ({"temperature": None}, (), [("temperature", "number", "nothing")]),
    "number is a mapping": ({"beta": {"a": 1}}, (), [("beta", "number")]),
    "integer is a fraction": ({"max_completion_length": 1.5}, (), [("max_completion_length", "whole number", "1.5")]),
    "integer is a word": ({"indirect_top_k": "ten"}, (), [("indirect_top_k", "whole number", "ten")]),
    "integer is a bool": ({"seed": False}, (), [("seed", "whole number", "False")]),
    "bool is a word": ({"gate": "maybe"}, (), [("gate", "true or false", "maybe")]),
    "bool is a number": ({"adaptive_opener": 1}, (), [("adaptive_opener", "true or false", "1")]),
    "string is a list": ({"model_name_or_path": ["a"]}, (), [("model_name_or_path", "string", "['a']")]),
    "string is a mapping": ({"dataset_name": {"a": 1}}, (), [("dataset_name", "string")]),
    "folder is a mapping": ({"output_dir": {"a": 1}}, (), [("output_dir", "string")]),
    "list of numbers": ({"use_peft": True, "lora_target_modules": [["a"]]}, (), [("lora_target_modules", "string")]),
    "list is a mapping": ({"use_peft": True, "lora_target_modules": {"a": 1}}, (), [("lora_target_modules", "list")]),
    "flag with a word": ({}, ("--learning_rate", "fast"), [("learning_rate", "number", "fast")]),
    "flag with a fraction": ({}, ("--max_steps=2.5",), [("max_steps", "whole number", "2.5")]),
    "flag without a value": ({}, ("--alpha",), [("alpha", "needs a value")]),
    "flag with two values": ({}, ("--beta", "0.1", "0.2"), [("beta", "number", "0.2")]),
    "flag with a bad bool": ({}, ("--gate", "yes"), [("gate", "true or false", "yes")]),
    "flag with a bad mapping": ({}, ("--chat_template_kwargs", '{"a": '), [("chat_template_kwargs", "JSON")]),
    "mapping is a number": ({"chat_template_kwargs": 5}, (), [("chat_template_kwargs", "mapping", "5")]),
    "mapping is a word": ({"teacher_model_init_kwargs": "float32"}, (), [("teacher_model_init_kwargs", "mapping")]),
    # choices
    "unknown template source": (
        {"chat_template_source": "teachr"},
        (),
        [("chat_template_source", "'teachr'", "'teacher'", "none")],
    ),
    "unknown reduction": ({"indirect_reduction": "avg"}, (), [("indirect_reduction", "avg", "mean, sum, length")]),
    "unknown skew": ({"method": "distillm", "skew_kl": "both"}, (), [("skew_kl", "both", "forward, reverse")]),
    "unknown strategy": ({"save_strategy": "stepz"}, (), [("save_strategy", "stepz", "steps")]),
    "unknown schedule": ({"lr_scheduler_type": "cosin"}, (), [("lr_scheduler_type", "cosin", "cosine")]),
    "unknown optimizer": ({"optim": "adamx"}, (), [("optim", "adamx", "adamw_torch")]),
    "unknown reporter": ({"report_to": "wandbb"}, (), [("report_to", "wandbb")]),
    "reporter that is not installed": ({"report_to": ["comet_ml"]}, (), [("report_to", "comet")]),
    "length-grouped sampling": (
        {"train_sampling_strategy": "group_by_length"},
        (),
        [("train_sampling_strategy", "group_by_length", "random")],
    ),
    "unknown dtype": ({"dtype": "float33"}, (), [("dtype", "float33")]),
    "unknown attention": ({"attn_implementation": "flashy"}, (), [("attn_implementation", "flashy")]),
    # ranges
    "negative alpha": ({"alpha": -0.1}, (), [("alpha", "-0.1", "at least 0")]),
    "beta above 1": ({"beta": 1.1}, (), [("beta", "1.1", "[0, 1]")]),
    "beta is nan": ({"beta": float("nan")}, (), [("beta", "nan", "[0, 1]")]),
    "one candidate": ({"indirect_top_k": 1}, (), [("indirect_top_k", "1", "at least 2")]),
    "opener of nothing": ({"opener_ratio": 0.0}, (), [("opener_ratio", "0", "(0, 1]")]),
    "gate at temperature 0": ({"gate_temperature": 0}, (), [("gate_temperature", "0", "greater than 0")]),
    "negative entropy weight": ({"entropy_weight": -1}, (), [("entropy_weight", "-1", "at least 0")]),
    "entropy of more than all": ({"entropy_ratio": 1.5}, (), [("entropy_ratio", "1.5", "(0, 1]")]),
    "lmbda above 1": ({"lmbda": 2}, (), [("lmbda", "2", "[0, 1]")]),
    "temperature 0": ({"temperature": 0}, (), [("temperature", "0", "greater than 0")]),
    "infinite temperature": ({"temperature": float("inf")}, (), [("temperature", "inf")]),
    "infinite learning rate": ({}, ("--learning_rate", "inf"), [("learning_rate", "inf")]),
    "infinite alpha": ({"alpha": float("inf")}, (), [("alpha", "inf")]),
    "empty nucleus": ({**EOPD, "top_p": 0}, (), [("top_p", "0", "(0, 1]")]),
    "no new tokens": ({"max_completion_length": 0}, (), [("max_completion_length", "0", "at least 1")]),
    "no room at all": ({"max_length": 1}, (), [("max_length", "1", "at least 2")]),
    "learning rate 0": ({"learning_rate": 0}, (), [("learning_rate", "0", "greater than 0")]),
    "learning rate is nan, by flag": ({}, ("--learning_rate", "nan"), [("learning_rate", "nan")]),
    "no steps": ({"max_steps": 0}, (), [("max_steps", "0", "at least 1")]),
    "negative epochs": ({"num_train_epochs": -1}, (), [("num_train_epochs", "-1", "greater than 0")]),
    "batch of nothing": ({"per_device_train_batch_size": 0}, (), [("per_device_train_batch_size", "0")]),
    "no accumulation": ({"gradient_accumulation_steps": 0}, (), [("gradient_accumulation_steps", "0")]),
    "seed too large": ({"seed": 2**32}, (), [("seed", str(2**32))]),
    "negative seed": ({"seed": -1}, (), [("seed", "-1", "at least 0")]),
    "negative workers": ({"dataloader_num_workers": -1}, (), [("dataloader_num_workers", "-1")]),
    "negative logging": ({"log_term_gradients": -1}, (), [("log_term_gradients", "-1")]),
    "chunk of nothing": ({"head_chunk_gib": 0}, (), [("head_chunk_gib", "0", "greater than 0")]),
    "chunk without fused head": (
        {"fused_head": False, "head_chunk_gib": 0.5},
        (),
        [("head_chunk_gib", "0.5", "no effect", "fused_head")],
    ),
    "adam's beta": ({"adam_beta1": 1.5}, (), [("adam_beta1", "1.5")]),
    "clip of 1": ({**EOPD, "epsilon": 1.0}, (), [("epsilon", "1.0", "(0, 1)")]),
    "negative threshold": ({**EOPD, "entropy_threshold": -0.5}, (), [("entropy_threshold", "-0.5", "at least 0")]),
    "no top-k": ({**EOPD, "forward_kl_top_k": 0}, (), [("forward_kl_top_k", "0", "at least 1")]),
    "random share of nothing": (
        {"method": "eopd-random", "forward_kl_random_ratio": 0},
        (),
        [("forward_kl_random_ratio", "0", "(0, 1]")],
    ),
    "negative shaping": (
        {"method": "opd-advantage-shaping", "advantage_shaping": -1},
        (),
        [("advantage_shaping", "-1", "greater than 0")],
    ),
    "LoRA of rank 0": ({"use_peft": True, "lora_r": 0}, (), [("lora_r", "0", "at least 1")]),
    # options that contradict each other, or have no effect
    "both halves": ({"bf16": True, "fp16": True}, (), [("bf16", "fp16")]),
    "gate temperature without a gate": ({"gate": False, "gate_temperature": 2.0}, (), [("gate_temperature", "gate")]),
    "candidates without indirect": ({"alpha": 0, "indirect_top_k": 5}, (), [("indirect_top_k", "5", "alpha")]),
    "fixed and adaptive opener": (
        {"adaptive_opener": True, "opener_ratio": 0.2},
        (),
        [("opener_ratio", "adaptive_opener")],
    ),
    "entropy share without a weight": (
        {"entropy_weight": 0, "entropy_ratio": 0.3},
        (),
        [("entropy_ratio", "entropy_weight")],
    ),
    "nucleus off-policy": ({**EOPD, "lmbda": 0, "top_p": 0.9}, (), [("top_p", "lmbda")]),
    "nucleus of tsd-kd": ({"top_p": 0.9}, (), [("top_p", "tsd-kd")]),
    "vLLM's settings without vLLM": ({"vllm_mode": "server"}, (), [("vllm_mode", "use_vllm")]),
    "a server's settings without one": (
        {"use_vllm": True, "vllm_server_port": 9000},
        (),
        [("vllm_server_port", "9000", "vllm_mode")],
    ),
    "an engine's settings with a server": (
        {"use_vllm": True, "vllm_mode": "server", "vllm_tensor_parallel_size": 2},
        (),
        [("vllm_tensor_parallel_size", "2", "vllm_mode")],
    ),
    "a rollout ahead without a server": (
        {"use_vllm": True, "rollout_ahead": 1},
        (),
        [("rollout_ahead", "1", "vllm_mode: server")],
    ),
    "two rollouts ahead": (
        {"use_vllm": True, "vllm_mode": "server", "rollout_ahead": 2},
        (),
        [("rollout_ahead", "0 or 1", "2")],
    ),
    "a rollout ahead of a policy that isn't known": (
        {"method": "eopd", "use_vllm": True, "vllm_mode": "server", "rollout_ahead": 1, "top_p": 0.8},
        (),
        [("rollout_ahead", "top_p")],
    ),
    "a rollout ahead that may not be the student's": (
        {"use_vllm": True, "vllm_mode": "server", "rollout_ahead": 1, "lmbda": 0.5},
        (),
        [("rollout_ahead", "lmbda: 1")],
    ),
    "a rollout ahead of a method that chooses its completions": (
        {"method": "distillm", "use_vllm": True, "vllm_mode": "server", "rollout_ahead": 1},
        (),
        [("rollout_ahead", "distillm")],
    ),
    "unknown vLLM mode": ({"use_vllm": True, "vllm_mode": "remote"}, (), [("vllm_mode", "remote", "colocate")]),
    "no memory for vLLM": (
        {"use_vllm": True, "vllm_gpu_memory_utilization": 0},
        (),
        [("vllm_gpu_memory_utilization", "0", "(0, 1]")],
    ),
    "teacher's server without its URL": (
        {"teacher_placement": "server"},
        (),
        [("teacher_placement", "teacher_server_base_url", "missing", "tsdkd serve teacher")],
    ),
    "teacher's server by its name": (
        {"teacher_placement": "server", "teacher_server_base_url": "node7:8001"},
        (),
        [("teacher_server_base_url", "http://127.0.0.1:8001", "node7")],
    ),
    "teacher's server, unused": (
        {"teacher_server_base_url": "http://127.0.0.1:8001"},
        (),
        [("teacher_server_base_url", "teacher_placement is not server")],
    ),
    "teacher's server without patience": (
        {"teacher_placement": "server", "teacher_server_base_url": ["http://a", "http://b"]},
        ("--teacher_server_timeout", "0"),
        [("teacher_server_timeout", "0", "greater than 0")],
    ),
    "teacher's server and whole logits": (
        {"teacher_placement": "server", "teacher_server_base_url": "http://a", "fused_head": False},
        (),
        [("teacher_placement", "fused_head: true")],
    ),
    "teacher's server and a teacher that samples": (
        {"method": "minillm", "teacher_placement": "server", "teacher_server_base_url": "http://a"},
        (),
        [("teacher_placement", "replica", "minillm samples with the teacher")],
    ),
    "no port": ({"use_vllm": True, "vllm_mode": "server", "vllm_server_port": 0}, (), [("vllm_server_port", "0")]),
    "vLLM off-policy": ({"use_vllm": True, "lmbda": 0}, (), [("use_vllm", "lmbda")]),
    "importance weights of tsd-kd": (
        {"use_vllm": True, "vllm_importance_sampling_correction": True},
        (),
        [("vllm_importance_sampling_correction", "eopd")],
    ),
    "a bound without importance weights": (
        {**EOPD, "use_vllm": True, "vllm_importance_sampling_clip_max": 2.0},
        (),
        [("vllm_importance_sampling_clip_max", "vllm_importance_sampling_correction")],
    ),
    "kwargs without a template": (
        {"chat_template_source": "none", "chat_template_kwargs": {"a": 1}},
        (),
        [("chat_template_kwargs", "chat_template_source")],
    ),
    "LoRA options without LoRA": ({"lora_r": 4}, (), [("lora_r", "4", "use_peft")]),
    "another method's option": (
        {**EOPD, "forward_kl_random_ratio": 0.5},
        (),
        [("forward_kl_random_ratio", "eopd-random", "eopd")],
    ),
    "a threshold of opd": ({"method": "opd", "entropy_threshold": 0.5}, (), [("entropy_threshold", "eopd", "opd")]),
    "a teacher of grpo": ({"method": "grpo"}, (), [("teacher_model_name_or_path", "grpo", "no teacher")]),
    "rollouts off-policy": ({"method": "seq-kd", "lmbda": 1}, (), [("lmbda", "seq-kd", "tsdkd generate")]),
    "a teacher that isn't loaded": (
        {"method": "seq-kd", "teacher_placement": "zero3"},
        (),
        [("teacher_placement", "seq-kd")],
    ),
    "an engine without the teacher": (
        {"method": "minillm", "use_vllm": True},
        (),
        [("use_vllm", "minillm", "teacher")],
    ),
    "a growing share without a measure": (
        {"method": "distillm", "on_policy_share_step": 0.2},
        (),
        [("on_policy_share_step", "eval_strategy")],
    ),
    "best model without checkpoints": (
        {"load_best_model_at_end": True, "save_strategy": "no"},
        (),
        [("load_best_model_at_end", "no effect", "save_strategy")],
    ),
    "best model without evaluation": (
        {"load_best_model_at_end": True, "save_strategy": "steps"},
        (),
        [("load_best_model_at_end", "eval")],
    ),
    "evaluation without held-out rows": ({"eval_strategy": "steps", "eval_steps": 1}, (), [("eval_dataset_name",)]),
    "a split of a single file": ({"dataset_train_split": "validation"}, (), [("dataset_train_split", "validation")]),
    "rollout is not a multiple": (
        {**EOPD, "rollout_batch_size": 5},
        (),
        [("rollout_batch_size", "5", "per_device_train_batch_size", "2")],
    ),
    "rollout is not a multiple, dry run": (
        {**EOPD, "rollout_batch_size": 5},
        ("--dry_run",),
        [("rollout_batch_size", "5", "per_device_train_batch_size")],
    ),
    "LoRA on modules that aren't there": (
        {"use_peft": True, "lora_target_modules": ["nope"]},
        (),
        [("lora_target_modules", "nope")],
    ),
    # what only transformers, TRL, torch and peft can tell, before anything is written
    **{
        f"{key}: {value}": ({key: value, **more}, (), [(key,)])
        for key, value, more in [
            ("lr_scheduler_kwargs", {"zzqx": 1}, {}),
            ("gradient_checkpointing_kwargs", {"zzqx": 1}, {"gradient_checkpointing": True}),
            ("model_init_kwargs", {"zzqx": 1}, {}),
            ("model_init_kwargs", {"dtype": "float33"}, {}),
            ("accelerator_config", {"zzqx": 1}, {}),
            ("optim_args", "zzqx", {}),
            ("dataloader_prefetch_factor", 2, {}),
            ("dataloader_drop_last", True, {"per_device_train_batch_size": 64, "max_steps": GONE}),
            ("dtype", "int8", {}),
            ("logging_steps", float("inf"), {}),
            ("log_level", "loud", {}),
            ("neftune_noise_alpha", -1, {}),
            ("hub_strategy", "zzqx", {}),
            ("torch_compile_backend", "zzqx", {}),
            ("ddp_backend", "zzqx", {}),
            ("fsdp", "full_shard", {}),
            ("push_to_hub", True, {}),  # the hub can't be reached here
        ]
    },
    # the other method's options
    "eopd's option in tsd-kd": ({"epsilon": 0.1}, (), [("epsilon", "eopd")]),
    "eopd's option by flag": ({"method": "tsd-kd"}, ("--forward_kl_top_k", "4"), [("forward_kl_top_k", "eopd")]),
    "tsd-kd's option in eopd": ({**EOPD, "alpha": 0.1}, (), [("alpha", "tsd-kd")]),
    "beta in eopd": ({**EOPD, "beta": 0.7}, (), [("beta", "eopd")]),
    "tsd-kd's flag with eopd by flag": ({}, ("--method", "eopd", "--gate", "false"), [("gate", "tsd-kd")]),
    "a budget without packing": (
        {"padding_free": False, "max_tokens_per_micro_batch": 64},
        (),
        [("max_tokens_per_micro_batch", "padding_free")],
    ),
    "no tokens": ({"max_tokens_per_micro_batch": 0}, (), [("max_tokens_per_micro_batch", "at least 1")]),
    # TRL's and transformers' options that can't work here
    **{
        f"unsupported {key}": ({key: value}, (), [(key,)])
        for key, value in {
            "seq_kd": True,
            "packing": True,
            "eval_packing": True,
            "assistant_only_loss": True,
            "completion_only_loss": False,
            "dataset_text_field": "body",
            "label_smoothing_factor": 0.1,
            "auto_find_batch_size": True,
            "loss_type": "dft",
            "use_liger_kernel": True,
            "load_in_4bit": True,
            "eos_token": "<pad>",
        }.items()
    },
    # missing keys
    **{
        f"missing {key}": ({key: GONE}, (), [(key, "missing")])
        for key in ("model_name_or_path", "teacher_model_name_or_path", "dataset_name", "output_dir")
    },
    "empty student": ({"model_name_or_path": None}, (), [("model_name_or_path",)]),
    "empty output": ({"output_dir": ""}, (), [("output_dir",)]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration(name: str, place: Workplace) -> None:
    changes, flags, lines = CONFIGS[name]
    place.refuses_config(changes, flags, *lines)


def test_all_problems_are_told_at_once(place: Workplace) -> None:
    changes = {"learning_rat": 1, "alpha": -1, "gate": "maybe", "packing": True, "epsilon": 0.1}
    changes |= {"entropy_weight": 0, "entropy_ratio": 0.3, "dataset_name": GONE, "teacher_model_name_or_path": GONE}
    place.refuses_config(
        changes,
        ("--max_steps", "x", "--beta=7"),
        ("learning_rat:", "'learning_rate'"),
        ("alpha", "-1"),
        ("gate", "maybe"),
        ("packing",),
        ("epsilon", "eopd"),
        ("entropy_ratio", "entropy_weight"),
        ("dataset_name", "missing"),
        ("teacher_model_name_or_path", "missing"),
        ("max_steps", "x"),
        ("beta", "7"),
    )


# The configuration file

YAMLS: dict[str, tuple[bytes | None, list[Say]]] = {
    "missing": (None, [("--config", "run.yaml")]),
    "empty": (b"", [("run.yaml", "empty", "mapping")]),
    "comments only": (b"# nothing\n", [("run.yaml", "empty", "mapping")]),
    "a list": (b"- alpha: 1\n", [("run.yaml", "mapping", "list")]),
    "a word": (b"hello\n", [("run.yaml", "mapping", "str")]),
    "broken": (b"alpha: [1,\nbeta: 2\n", [("run.yaml", "YAML")]),
    "tab": (b"a:\n\tb: 1\n", [("run.yaml", "YAML")]),
    "python object": (b"alpha: !!python/object/apply:os.getcwd []\n", [("run.yaml", "YAML")]),
    "two documents": (b"alpha: 1\n---\nalpha: 2\n", [("run.yaml", "YAML")]),
    "not text": (b"\xff\xfe\x00\x01\x80", [("run.yaml", "UTF-8")]),
    "key twice": (b"alpha: 0.1\nbeta: 0.5\nalpha: 0.2\n", [("run.yaml", "'alpha'", "duplicate", "3")]),
    "unhashable key": (b"? [a, b]\n: 1\n", [("run.yaml",)]),
}


@pytest.mark.parametrize("name", YAMLS)
def test_configuration_file(name: str, place: Workplace) -> None:
    content, lines = YAMLS[name]
    if content is not None:
        (place.folder / "run.yaml").write_bytes(content)
    place.refuses(("train", "--config", "run.yaml"), *lines)


@pytest.mark.parametrize(
    ("name", "fragments"),
    [("configs", ("read",)), ("configs/none.yaml", ()), ("dmo", ("'demo'",)), ("x" * 300, ()), ("", ())],
    ids=["a folder", "in a folder", "a preset, misspelt", "too long", "empty"],
)
def test_configuration_file_that_isn_t_one(name: str, fragments: Say, place: Workplace) -> None:
    (place.folder / "configs").mkdir()
    place.refuses(("train", "--config", name), ("--config", name, *fragments))


def test_configuration_file_without_permission(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    path = place.write({})

    def refuse(path: str, *args: Any, **kwargs: Any) -> int:
        raise PermissionError(13, "Permission denied", path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)  # a mode of 000 doesn't stop root
        code, error = place.run("train", "--config", path)
    assert code == 2 and error.startswith("tsdkd train:") and len(error.splitlines()) == 1
    assert "--config" in error and path in error and "Permission denied" in error


# The data

PROMPT = {"prompt": "w1 w2"}
BROKEN: dict[str, tuple[str, bytes | list[Any], dict[str, Any], Say]] = {
    # name -> (file, its bytes or rows, changes of the configuration, what the line says)
    "unknown ending": ("rows.txt", b"w1\n", {}, ("dataset_name", "rows.txt", ".jsonl")),
    "no ending": ("rows", b"w1\n", {}, ("dataset_name", "rows", ".jsonl")),
    "empty file": ("rows.jsonl", b"", {}, ("dataset_name", "rows.jsonl")),
    "no rows": ("rows.json", b"[]", {}, ("dataset_name", "rows.json")),
    "header only": ("rows.csv", b"prompt,answer\n", {}, ("dataset_name", "rows.csv")),
    "broken JSON line": ("rows.jsonl", b'{"prompt": "w1"}\n{"prompt": \n', {}, ("dataset_name", "rows.jsonl")),
    "JSON lines of numbers": ("rows.jsonl", b"1\n2\n", {}, ("dataset_name", "rows.jsonl")),
    "JSON of a word": ("rows.json", b'"w1"', {}, ("dataset_name", "rows.json")),
    "JSON that is not text": ("rows.jsonl", b"\xff\xfe\x80\x81", {}, ("dataset_name", "rows.jsonl")),
    "ragged CSV": ("rows.csv", b"prompt,answer\nw1,2\nw1,2,3,4\n", {}, ("dataset_name", "rows.csv")),
    "broken Parquet": ("rows.parquet", b"PAR1 no, it isn't", {}, ("dataset_name", "rows.parquet")),
    "mixed types": ("rows.jsonl", [PROMPT, {"prompt": {"a": 1}}], {}, ("row 1", "prompt")),
    "prompt is null": ("rows.jsonl", [PROMPT, {"prompt": None}], {}, ("row 1", "prompt")),
    "prompt is left out": ("rows.jsonl", [PROMPT, {"answer": "3"}], {}, ("row 1", "prompt")),
    "prompt is empty": ("rows.jsonl", [PROMPT, PROMPT, {"prompt": ""}], {}, ("row 2", "prompt")),
    "prompt is blank": ("rows.jsonl", [PROMPT, {"prompt": " \n"}], {}, ("row 1", "prompt")),
    "prompt is a number": ("rows.jsonl", [{"prompt": 5}], {}, ("row 0", "prompt", "5")),
    "prompt is an empty list": ("rows.jsonl", [{"prompt": []}], {}, ("row 0", "prompt")),
    "prompt is a list of words": ("rows.jsonl", [{"prompt": ["w1", "w2"]}], {}, ("row 0", "prompt")),
    "prompt is a mapping": ("rows.jsonl", [{"prompt": {"role": "user", "content": "w1"}}], {}, ("row 0", "prompt")),
    "message without content": ("rows.jsonl", [{"prompt": [{"role": "user", "content": None}]}], {}, ("row 0",)),
    "message without a role": ("rows.jsonl", [{"prompt": [{"content": "w1"}]}], {}, ("row 0", "role")),
    "messages are null": ("rows.jsonl", [{"messages": None}], {}, ("row 0", "prompt")),
    "messages are a string": ("rows.jsonl", [{"messages": "w1"}], {}, ("row 0", "messages")),
    "messages are empty": ("rows.jsonl", [{"messages": []}], {}, ("row 0", "prompt")),
    "messages are words": ("rows.jsonl", [{"messages": ["w1"]}], {}, ("row 0", "messages")),
    "only an answer": (
        "rows.jsonl",
        [{"messages": [{"role": "assistant", "content": "w1"}]}],
        {},
        ("row 0", "prompt"),
    ),
    "answer is null": (
        "rows.jsonl",
        [{"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": None}]}],
        {"lmbda": 0.0},
        ("row 0", "completion"),
    ),
    "completion is a number": ("rows.jsonl", [{**PROMPT, "completion": 3}], {}, ("row 0", "completion", "int")),
    "completion is two messages": (
        "rows.jsonl",
        [{**PROMPT, "completion": [{"role": "assistant", "content": "w1"}] * 2}],
        {},
        ("row 0", "completion"),
    ),
    "completion is words": ("rows.jsonl", [{**PROMPT, "completion": ["w1"]}], {}, ("row 0", "completion")),
    "no prompt column": (
        "rows.csv",
        b"question,answer\nw1,2\n",
        {},
        ("prompt", "'question', 'answer'", "prompt_column", "dataset_name rows.csv"),
    ),
    "prompt_column isn't there": (
        "rows.jsonl",
        [PROMPT],
        {"prompt_column": "question"},
        ("prompt_column", "'question'", "prompt"),
    ),
    "completion_column isn't there": (
        "rows.jsonl",
        [PROMPT],
        {"completion_column": "response"},
        ("completion_column", "'response'", "prompt"),
    ),
    "completion_column beside messages": (
        "rows.jsonl",
        [{"messages": [{"role": "user", "content": "w1"}], "response": "w2"}],
        {"completion_column": "response"},
        ("completion_column", "messages"),
    ),
    "no completion": ("rows.jsonl", [PROMPT], {"lmbda": 0.5}, ("row 0", "completion", "lmbda", "0.5")),
    "a completion is missing": (
        "rows.jsonl",
        [{**PROMPT, "completion": "w1"}, PROMPT],
        {"lmbda": 0.0},
        ("row 1", "completion", "lmbda"),
    ),
    "messages without an answer": (
        "rows.jsonl",
        [{"messages": [{"role": "user", "content": "w1"}]}],
        {"lmbda": 0.0},
        ("row 0", "completion", "lmbda"),
    ),
    "all prompts too long": (
        "rows.jsonl",
        [{"prompt": "w1 " * 9}] * 3,
        {"max_length": 9},
        ("3", "11", "9", "max_length"),
    ),
    "all prompts longer than the context": (
        "rows.jsonl",
        [{"prompt": "w1 " * 200}],
        {"max_length": 400},
        ("1", "202", "128", "context"),
    ),
    "template takes no such option": (
        "rows.jsonl",
        [PROMPT],
        {"chat_template_kwargs": {"add_generation_prompt": False}},
        ("add_generation_prompt",),
    ),
    "template that doesn't tokenize": (
        "rows.jsonl",
        [PROMPT],
        {"chat_template_kwargs": {"tokenize": False}},
        ("chat_template_kwargs", "tokenize"),
    ),
}


@pytest.mark.parametrize("flag", [(), ("--dry_run",)], ids=["train", "dry run"])
@pytest.mark.parametrize("name", BROKEN)
def test_data_file(name: str, flag: tuple[str, ...], place: Workplace) -> None:
    file, content, changes, line = BROKEN[name]
    if isinstance(content, bytes):
        (place.folder / file).write_bytes(content)
    else:
        write_jsonl(place.folder / file, content)
    place.refuses_config({"dataset_name": file, **changes}, flag, line)


def test_data_that_isn_t_there(place: Workplace) -> None:
    (place.folder / "empty").mkdir()
    for name in ("none.jsonl", "./none", str(place.folder / "none"), "empty", "nobody/has-this-data-set", "a b:c"):
        place.refuses_config({"dataset_name": name}, (), ("dataset_name", name))
    evaluation = {"eval_strategy": "steps", "eval_steps": 1}
    place.refuses_config({**evaluation, "eval_dataset_name": "none.jsonl"}, (), ("eval_dataset_name", "none.jsonl"))
    write_jsonl(place.folder / "blank.jsonl", [PROMPT, {"prompt": ""}])
    place.refuses_config({**evaluation, "eval_dataset_name": "blank.jsonl"}, (), ("row 1", "prompt"))


def test_split_that_isn_t_there(place: Workplace) -> None:
    (place.folder / "data").mkdir()
    write_jsonl(place.folder / "data" / "train.jsonl", make_rows(4))
    changes = {"dataset_name": "data", "dataset_train_split": "validation"}
    place.refuses_config(changes, (), ("data", "validation"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="bfloat16 works here")
def test_bfloat16_without_a_gpu(place: Workplace) -> None:
    """Where it is asked for, the flags that help are told. TRL's own default gives way to float32, with a note."""
    flags = ("--use_cpu true", "--bf16 false")
    asked = {"use_cpu": False, "bf16": True}
    place.refuses_config(asked, (), ("bf16: needs a GPU with bfloat16, and no GPU is visible", *flags))
    config = place.write(asked)
    place.refuses(("generate", "--config", config, "--output_file", "o.jsonl"), ("bf16: needs a GPU", *flags))
    preset = ("train", "--config", "qwen25_14b_to_1p5b.yaml", "--use_vllm", "false", "--output_dir", "out")
    place.refuses(preset, ("bf16: needs a GPU", *flags))
    default = place.write({"use_cpu": GONE, "bf16": GONE})
    assert place.run("train", "--config", default, "--dry_run")[0] == 0
    assert main(("train", "--config", default)) == 0
    out = place.capsys.readouterr().out
    assert out.count("note: no GPU with bfloat16 is visible: the run is in float32") == 1
    assert yaml.safe_load((place.folder / "out/tsdkd_config.yaml").read_text())["bf16"] is False
    assert place.run("generate", "--config", default, "--output_file", "o.jsonl")[0] == 0


def test_parquet_of_another_shape(place: Workplace) -> None:
    Dataset.from_dict({"text": ["w1"], "n": [1]}).to_parquet("rows.parquet")
    place.refuses_config({"dataset_name": "rows.parquet"}, (), ("prompt", "'text', 'n'"))


# The models

FIELDS = {"model_name_or_path": "student", "teacher_model_name_or_path": "teacher"}
each_model = pytest.mark.parametrize("field", FIELDS)


@each_model
def test_model_that_isn_t_there(field: str, place: Workplace) -> None:
    (place.folder / "empty").mkdir()
    (place.folder / "file.bin").write_bytes(b"weights")
    for name in ("./none", "/none/such/folder", "nobody/has-this-model", "empty", "file.bin", "a b:c"):
        place.refuses_config({field: name}, (), (field, name))
        place.refuses_config({field: name}, ("--dry_run",), (field, name))


def test_model_of_the_hub_that_needs_something_else(place: Workplace) -> None:
    """Its files are there, so the reason is another."""
    repository = place.folder / "hub/models--somebody--student"
    shutil.copytree(place.base["model_name_or_path"], repository / "snapshots/abc")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc", encoding="utf-8")
    config = place.write({"model_name_or_path": "somebody/student", "attn_implementation": "flash_attention_2"})
    result = subprocess.run(
        [sys.executable, "-m", "tsdkd", "train", "--config", config],
        env=os.environ | {"HF_HUB_CACHE": str(place.folder / "hub")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("tsdkd")]
    assert "model_name_or_path" in line and "flash" in line.lower() and "not found on the hub" not in line


def _damage(folder: Path, how: str) -> None:
    if how == "config is not JSON":
        (folder / "config.json").write_text("{", encoding="utf-8")
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "config of no model":
        (folder / "config.json").write_text("{}", encoding="utf-8")
    elif how == "config of an encoder":
        (folder / "config.json").write_text('{"model_type": "t5"}', encoding="utf-8")
    elif how == "no weights":
        (folder / "model.safetensors").unlink()
    elif how == "truncated weights":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:2000])
    elif how == "no tokenizer":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    elif how == "tokenizer is not JSON":
        (folder / "tokenizer.json").write_text("[", encoding="utf-8")
    elif how == "weights of another shape":
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 48}), encoding="utf-8")


DAMAGES = ["config is not JSON", "no config", "config of no model", "config of an encoder", "no weights"]
DAMAGES += ["truncated weights", "no tokenizer", "tokenizer is not JSON", "weights of another shape"]


@each_model
@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_model(field: str, how: str, place: Workplace) -> None:
    folder = Path(shutil.copytree(place.base[field], place.folder / FIELDS[field]))
    _damage(folder, how)
    role = FIELDS[field]
    place.refuses_config({field: role}, (), (field, role))


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        ([*WORDS[:30], "x30", *WORDS[31:]], ("34", "'w30'", "'x30'")),  # another token
        ([*WORDS[:9], WORDS[10], WORDS[9], *WORDS[11:]], ("13", "'w9'", "'w10'")),  # two places exchanged
        ([*WORDS, "more"], ("60", "'more'")),
        (WORDS[:-1], ("59", "'w55'")),
    ],
    ids=["another token", "exchanged", "one more", "one less"],
)
@pytest.mark.parametrize("flag", [(), ("--dry_run",)], ids=["train", "dry run"])
def test_another_tokenizer(words: list[str], fragments: Say, flag: tuple[str, ...], place: Workplace) -> None:
    teacher = shutil.copytree(place.base["teacher_model_name_or_path"], place.folder / "teacher")
    build_tokenizer(words).save_pretrained(str(teacher))
    place.refuses_config({"teacher_model_name_or_path": "teacher"}, flag, ("teacher_model", "tokenizer", *fragments))


@each_model
def test_tokenizer_with_more_tokens_than_the_model(field: str, place: Workplace, saved_model: Any) -> None:
    """60 tokens, 40 rows: the embedding would be read out of its range in the middle of training."""
    place.refuses_config({field: saved_model("qwen3", 3, 40)}, (), (field, "40", "60"))


def test_neither_has_a_tokenizer(place: Workplace) -> None:
    """transformers makes one up from the model type: the same for both, and wrong."""
    for field, role in FIELDS.items():
        _damage(Path(shutil.copytree(place.base[field], place.folder / role)), "no tokenizer")
    place.refuses_config({**FIELDS}, (), ("model_name_or_path", "tokenizer"))


def test_messages_without_a_template(place: Workplace) -> None:
    student = shutil.copytree(place.base["model_name_or_path"], place.folder / "student")
    for file in ("chat_template.jinja", "tokenizer_config.json"):
        path = Path(student, file)
        if path.is_file():
            path.write_text(path.read_text(encoding="utf-8").replace(TEMPLATE, ""), encoding="utf-8")
    Path(student, "chat_template.jinja").unlink(missing_ok=True)
    write_jsonl(place.folder / "rows.jsonl", [{"prompt": [{"role": "user", "content": "w1"}]}])
    changes = {"model_name_or_path": "student", "dataset_name": "rows.jsonl"}
    place.refuses_config(changes, (), ("row 0", "template"))
    place.refuses_config({**changes, "chat_template_source": "none"}, ("--dry_run",), ("row 0", "template"))


def test_template_that_refuses_the_prompt(place: Workplace) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    student = shutil.copytree(place.base["model_name_or_path"], place.folder / "student")
    tokenizer.save_pretrained(str(student))
    place.refuses_config({"model_name_or_path": "student"}, (), ("row 0", "template", "no system role"))


@pytest.mark.parametrize("kwargs", [{"dtype": "float33"}, {"zzqx": 1}], ids=str)
def test_teacher_options(kwargs: dict[str, Any], place: Workplace) -> None:
    place.refuses_config({"teacher_model_init_kwargs": kwargs}, (), ("teacher_model",))


# The output directory


def test_output_that_is_someone_else_s(place: Workplace) -> None:
    (place.folder / "out").mkdir()
    (place.folder / "out" / "thesis.tex").write_text("precious", encoding="utf-8")
    place.refuses_config({}, (), ("output_dir", "out", "thesis.tex"))
    place.refuses_config({}, ("--dry_run",), ("output_dir", "out", "thesis.tex"))


def test_output_that_is_a_file(place: Workplace) -> None:
    (place.folder / "out").write_text("precious", encoding="utf-8")
    place.refuses_config({}, (), ("output_dir", "out", "file"))
    place.refuses_config({}, ("--resume_from_checkpoint", "true"), ("output_dir", "out", "file"))


@pytest.mark.parametrize("flag", [(), ("--dry_run",)], ids=["train", "dry run"])
def test_output_below_a_file(flag: tuple[str, ...], place: Workplace) -> None:
    (place.folder / "out").write_text("precious", encoding="utf-8")
    place.refuses_config({"output_dir": "out/below"}, flag, ("output_dir", "out"))


def test_output_without_a_name(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be the current folder, which is empty here."""
    path = place.write({"output_dir": ""})
    (place.folder / "here").mkdir()
    monkeypatch.chdir(place.folder / "here")
    place.refuses(("train", "--config", f"../{path}"), ("output_dir",))


def test_output_that_holds_an_earlier_run(place: Workplace, earlier_run: Path) -> None:
    shutil.copytree(earlier_run, place.folder / "out")
    place.refuses_config({}, (), ("output_dir", "out", "--resume true"))
    place.refuses_config({}, ("--dry_run",), ("output_dir", "out", "--resume true"))
    shutil.rmtree(place.folder / "out" / "checkpoint-1")
    place.refuses_config({}, ("--resume_from_checkpoint", "true"), ("resume", "out"))


@pytest.mark.parametrize("text", ["", "a: [", "- 1"])
def test_output_whose_configuration_is_damaged(text: str, place: Workplace, earlier_run: Path) -> None:
    shutil.copytree(earlier_run, place.folder / "out")
    (place.folder / "out" / "tsdkd_config.yaml").write_text(text, encoding="utf-8")
    place.refuses_config({}, ("--resume", "true"), ("output_dir", "tsdkd_config.yaml"))


@pytest.mark.parametrize("resume", ["true", "none/such/folder", "folder", "file.bin", "hollow", "trainer_state.json"])
def test_nothing_to_resume_from(resume: str, place: Workplace) -> None:
    (place.folder / "folder").mkdir()
    (place.folder / "file.bin").write_bytes(b"x")
    (place.folder / "hollow").mkdir()
    (place.folder / "hollow" / "trainer_state.json").write_text("{}", encoding="utf-8")
    (place.folder / "trainer_state.json").write_text("{}", encoding="utf-8")
    place.refuses_config({}, ("--resume_from_checkpoint", resume), ("resume", resume.replace("true", "out")))


def test_resume_of_one_run_into_someone_else_s_folder(place: Workplace, earlier_run: Path) -> None:
    (place.folder / "out").mkdir()
    (place.folder / "out" / "thesis.tex").write_text("precious", encoding="utf-8")
    resume = ("--resume_from_checkpoint", str(earlier_run / "checkpoint-1"))
    place.refuses_config({"max_steps": 2}, resume, ("output_dir", "out", "thesis.tex"))


# The commands


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        ((), ("command",)),
        (("trian",), ("trian", "train")),
        (("--verbose",), ("command",)),
        (("train", "--config"), ("--config",)),
        (("train", "--dry_run=yes"), ("dry_run",)),
        (("configs", "extra"), ("extra",)),
        (("configs", "--paths"), ("--paths",)),
        (("demo", "extra"), ("extra",)),
        (("demo", "--stepz", "3"), ("stepz",)),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, tuple) else None,
)
def test_commands_argparse_refuses(argv: tuple[str, ...], fragments: Say, place: Workplace) -> None:
    code, error = place.run(*argv)
    assert code == 2 and "Traceback" not in error
    assert all(fragment in error for fragment in fragments)
    assert not place.files()


def test_train_without_a_configuration(place: Workplace) -> None:
    place.refuses(("train",), ("--config",))
    path = place.write({})
    code, error = place.run("train", path)  # `--config` forgotten
    assert code == 2 and path in error and "--config" in error and "Traceback" not in error


# The Python API


def test_python_configuration_lists_all_problems() -> None:
    with pytest.raises(ConfigError) as caught:
        TSDKDConfig(
            output_dir="x",
            **QUIET,
            alpha=-1,
            beta=2,
            max_completion_length=0,
            packing=True,
            gate_temperature=float("nan"),
        )
    error = caught.value
    assert isinstance(error, ValueError) and isinstance(error, TSDKDError) and error.exit_code == 2
    assert len(error.problems) == len(str(error).splitlines()) == 5
    for name, found in (
        ("alpha", "-1"),
        ("beta", "2"),
        ("max_completion_length", "0"),
        ("packing", ""),
        ("gate_temp", "nan"),
    ):
        assert sum(line.startswith(name) and found in line for line in error.problems) == 1


@pytest.mark.parametrize(
    ("cls", "values", "fragments"),
    [
        (TSDKDConfig, {"alpha": "high"}, ("alpha", "high")),
        (TSDKDConfig, {"learning_rate": "5e-6x"}, ("learning_rate", "5e-6x")),
        (TSDKDConfig, {"temperature": None}, ("temperature",)),
        (TSDKDConfig, {"indirect_reduction": "avg"}, ("indirect_reduction", "avg", "length")),
        (TSDKDConfig, {"chat_template_source": "nobody"}, ("chat_template_source", "nobody", "teacher")),
        (TSDKDConfig, {"lr_scheduler_type": "cosin"}, ("cosin",)),
        (EOPDConfig, {"beta": 0.7}, ("beta", "eopd", "JSD")),
        (EOPDConfig, {"epsilon": 0}, ("epsilon", "0")),
        (EOPDConfig, {"rollout_batch_size": 0}, ("rollout_batch_size", "0")),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_python_configuration(cls: Any, values: dict[str, Any], fragments: Say) -> None:
    with pytest.raises(ConfigError) as caught:
        cls(output_dir="x", **QUIET, **values)
    (problem,) = caught.value.problems
    assert all(fragment in problem for fragment in fragments)


@pytest.mark.parametrize("found", [None, "0.10.2", "0.32.0"])
def test_vllm_that_is_missing_or_too_old_or_too_new(found: str | None, place: Workplace, monkeypatch: Any) -> None:
    names = {} if found is None else {"vllm": ["vllm"]}
    monkeypatch.setattr("tsdkd.rollout.vllm.packages_distributions", lambda: names)
    monkeypatch.setattr("tsdkd.rollout.vllm.version", lambda name: found)
    place.refuses_config({"use_vllm": True}, (), ("use_vllm", found or "extra 'vllm'"))
