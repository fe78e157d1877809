"""Generates the teacher's or the student's completions of a run's prompts and appends them to a JSONL file.

Such a file is the data set of off-policy runs (`lmbda: 0`) and of sequence-level distillation.
"""

import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PretrainedConfig

from ..config.base import TokenSelectiveConfig
from ..data import Columns, prepare_for_pair, resolve_columns, split_prompt_completion
from ..errors import ConfigError
from ..files import hold_file, open_for_append
from ..models.finite_weights import require_finite_files
from ..models.loading import ModelPair, Role, get_revision, load_frozen_model, resolve_pair
from ..rollout.base import Completion, SamplingConfig, SeedKey
from ..rollout.seeding import prompt_generator, prompt_seed
from ..rollout.vllm import require_vllm
from ..run.arguments import RunArguments
from ..run.build import load_datasets, set_model_init_kwargs
from .rows import SHARED_OPTIONS, output_columns, read_finished, to_json_value

logger = logging.getLogger(__name__)
_MODEL_FIELDS = {"teacher": "teacher_model_name_or_path", "student": "model_name_or_path"}
_PROGRESS_INTERVAL = 10.0  # seconds


@dataclass
class GenerationSetup:
    """The generating model, its sampling options, and the prompts.

    Attributes:
        role: the model that generates.
        model_name_or_path: its folder or hub id.
        revision: its branch, tag or commit on the hub, or None.
        args: the run's training arguments.
        pair: the run's models.
        dataset: all rows of the run's data set, as they were loaded.
        source_columns: the names of its columns.
        tokenized_dataset: the rows to generate for, as `prepare_for_pair` returns them.
    """

    role: Role
    model_name_or_path: str
    revision: str | None
    args: TokenSelectiveConfig
    pair: ModelPair
    dataset: Dataset
    source_columns: Columns
    tokenized_dataset: Dataset

    @property
    def config(self) -> PretrainedConfig:
        """The generating model's configuration."""
        return self.pair.student_config if self.role == "student" else self.pair.teacher_config

    @property
    def metadata(self) -> dict[str, Any]:
        """The values that are the same in all rows of an output file."""
        return {
            "model": self.model_name_or_path,
            "revision": get_revision(self.model_name_or_path, self.config),
            "engine": "vllm" if self.args.use_vllm else "transformers",
            "chat_template_kwargs": self._template_kwargs,
            **{name: getattr(self.args, name) for name in SHARED_OPTIONS},
        }

    @property
    def _template_kwargs(self) -> str:
        """What rendered the prompts, as JSON, for which a data set's column has one type."""
        own = {"teacher": self.args.teacher_chat_template_kwargs} if self.role == "teacher" else {}
        return json.dumps(own | {"shared": self.args.chat_template_kwargs}, sort_keys=True)

    @property
    def sampling(self) -> SamplingConfig:
        """Sample only token ids that both models have, until a stop token of the generating model."""
        return SamplingConfig(
            self.pair.stop_token_ids(self.role), self.pair.shared_vocab_size, self.args.temperature, self.args.top_p
        )

    @property
    def output_columns(self) -> Columns:
        """The names of the prompt, completion and answer columns in the output file."""
        return output_columns(self.args)

    def get_prompt(self, index: int) -> Any:
        """The prompt of a row, unchanged."""
        return split_prompt_completion(self.dataset[index], index, self.source_columns)[0]


@dataclass
class GenerationRequest:
    """One completion to generate.

    Attributes:
        index: row number in the data set.
        sample: number of the completion among those of its prompt, from 0.
        prompt_ids: token ids of the prompt.
        max_new_tokens: maximum length of the completion, tokens.
        seed_key: what the random stream is seeded with.
    """

    index: int
    sample: int
    prompt_ids: list[int]
    max_new_tokens: int
    seed_key: SeedKey


def generate_completions(
    arguments: RunArguments,
    role: Role,
    output: Path,
    num_samples: int = 1,
    limit: int | None = None,
    top_p: float | None = None,
) -> None:
    """Generate the rows that `output` doesn't have yet, and append each one as soon as it is finished.

    Args:
        arguments: the run: its models, prompts, length limits and `vllm_…` options.
        role: the model that generates.
        output: a JSONL file, one row per completion.
        num_samples: completions per prompt.
        limit: use only the first `limit` prompts; None: all.
        top_p: nucleus sampling, instead of the run's value. It may differ: no loss has to model these samples.

    Raises:
        TSDKDError: something is wrong with the input, or generation failed. Finished rows are kept.
    """
    if top_p is not None:
        arguments.training_args.top_p = top_p
    setup = _prepare_setup(arguments, role, limit)
    is_new = not output.exists()
    with hold_file(output, "output_file"):
        try:
            _append_completions(setup, output, num_samples)
        finally:
            if is_new and output.exists() and output.stat().st_size == 0:
                os.unlink(os.path.realpath(output))  # nothing was generated


def engine_memory_utilization(arguments: RunArguments, device: torch.device) -> float:
    """The share of a GPU's memory for vLLM, which has the GPU to itself here. The configuration's value assumes that
    training uses the same GPU."""
    if device.type == "cuda" and "vllm_gpu_memory_utilization" not in arguments.flag_names:
        return 0.9
    return arguments.training_args.vllm_gpu_memory_utilization


def _append_completions(setup: GenerationSetup, output: Path, num_samples: int) -> None:
    done = read_finished(output, setup.output_columns.prompt, setup.metadata, len(setup.dataset), setup.get_prompt)
    requests = [
        GenerationRequest(
            row["index"],
            sample,
            row.get("teacher_prompt_ids", row["prompt_ids"]),
            row["limit"],
            (setup.args.seed, sample, row["index"]),
        )
        for sample in range(num_samples)
        for row in setup.tokenized_dataset
        if (row["index"], sample) not in done
    ]
    _log_progress(f"{output}: {len(done)} completions are finished, {len(requests)} remain")
    if not requests:
        return
    if setup.args.use_vllm and setup.args.vllm_mode == "colocate":
        _log_progress("starting the vLLM engine, which takes a minute or two")
    metadata = setup.metadata
    generate = _generate_with_vllm if setup.args.use_vllm else _generate_with_transformers
    completions = generate(setup, requests)
    with open_for_append(output, "output_file") as append:
        for position, completion in _with_progress(completions, len(requests)):
            row = _build_row(setup, requests[position], completion) | metadata
            append(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def _prepare_setup(arguments: RunArguments, role: Role, limit: int | None) -> GenerationSetup:
    args = arguments.training_args
    if args.world_size > 1:
        raise ConfigError(
            [
                f"tsdkd generate must run in one process, found {args.world_size}; to use several GPUs, set "
                "vllm_tensor_parallel_size"
            ]
        )
    if args.use_vllm:
        require_vllm()
        args.vllm_gpu_memory_utilization = engine_memory_utilization(arguments, args.device)
    output_columns(args)  # check the names before anything is loaded
    dataset, _ = load_datasets(arguments.data_args, args)
    columns = resolve_columns(dataset, args, needs_answer=True)
    set_model_init_kwargs(arguments)
    student, teacher = str(arguments.model_args.model_name_or_path), str(args.teacher_model_name_or_path)
    pair = resolve_pair(student, teacher, args)
    rows = dataset.select(range(min(limit or len(dataset), len(dataset))))
    tokenized = prepare_for_pair(rows, pair, args, for_teacher=role == "teacher")
    init_kwargs = args.model_init_kwargs if role == "student" else args.teacher_model_init_kwargs
    return GenerationSetup(
        role,
        student if role == "student" else teacher,
        (init_kwargs or {}).get("revision"),
        args,
        pair,
        dataset,
        columns,
        tokenized,
    )


def _build_row(setup: GenerationSetup, request: GenerationRequest, completion: Completion) -> dict[str, Any]:
    source_row, columns = setup.dataset[request.index], setup.output_columns
    source_answer = setup.source_columns.answer
    return {
        columns.prompt: setup.get_prompt(request.index),
        str(columns.completion): setup.pair.tokenizer.decode(completion.ids, skip_special_tokens=True),
        **({str(columns.answer): to_json_value(source_row[source_answer])} if source_answer else {}),
        "index": request.index,
        "sample": request.sample,
        "num_tokens": len(completion.ids),
        "finish_reason": "stop" if completion.stopped else "length",
    }


def _generate_with_vllm(setup: GenerationSetup, requests: list[GenerationRequest]) -> Iterator[tuple[int, Completion]]:
    """Yield the position of each request and its completion, in the order in which they finish."""
    if setup.args.vllm_mode == "colocate" or Path(setup.model_name_or_path).is_dir():
        require_finite_files(setup.model_name_or_path, _MODEL_FIELDS[setup.role], setup.revision)
    from ..rollout.vllm.colocate import iter_completions, shared_sampling_params, start_engine  # vLLM is an extra

    bodies: list[dict[str, Any]] = [
        {"prompt": r.prompt_ids, "max_tokens": r.max_new_tokens, "seed": prompt_seed(*r.seed_key)} for r in requests
    ]
    longest = max(len(r.prompt_ids) + r.max_new_tokens for r in requests)
    if setup.args.vllm_mode == "server":
        from ..rollout.vllm.server import connect_to_server

        parameters = shared_sampling_params(setup.sampling, setup.config.get_text_config().vocab_size)
        client = connect_to_server(setup.args, longest, setup.model_name_or_path)
        return client.complete([body | parameters for body in bodies])
    engine = start_engine(setup.model_name_or_path, setup.revision, setup.args, longest)
    return iter_completions(engine, bodies, setup.sampling)


def _generate_with_transformers(
    setup: GenerationSetup, requests: list[GenerationRequest]
) -> Iterator[tuple[int, Completion]]:
    """See `_generate_with_vllm`."""
    from ..rollout.hf import make_step, sample_with_step

    field, size = _MODEL_FIELDS[setup.role], setup.args.per_device_eval_batch_size
    model = load_frozen_model(setup.model_name_or_path, setup.args, field, setup.args.device).eval()
    sampling = setup.sampling
    step = make_step(model, vocab_size=sampling.vocab_size, temperature=sampling.temperature, top_p=sampling.top_p)
    # Similar lengths share a batch, to pad little. The longest come first: if memory is short, it shows at once
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt_ids) - requests[i].max_new_tokens)
    for positions in (order[i : i + size] for i in range(0, len(order), size)):
        batch = [requests[i] for i in positions]
        generators = [(prompt_generator(*request.seed_key),) for request in batch]
        prompts, limits = [request.prompt_ids for request in batch], [request.max_new_tokens for request in batch]
        completions = sample_with_step(step, prompts, limits, generators, stop_token_ids=sampling.stop_token_ids)
        yield from zip(positions, completions, strict=True)


def _with_progress(completions: Iterator[tuple[int, Completion]], total: int) -> Iterator[tuple[int, Completion]]:
    """Pass the completions on, and log the progress every `_PROGRESS_INTERVAL` seconds."""
    start = last_logged = time.perf_counter()
    num_tokens = 0
    for count, (position, completion) in enumerate(completions, 1):
        yield position, completion
        num_tokens, now = num_tokens + len(completion.ids), time.perf_counter()
        if count == total or now - last_logged >= _PROGRESS_INTERVAL:
            last_logged, speed = now, num_tokens / (now - start)
            _log_progress(f"{count} of {total} completions, {num_tokens} tokens, {speed:.0f} tokens/s")


def _log_progress(text: str) -> None:
    logger.info("tsdkd generate: %s", text)
