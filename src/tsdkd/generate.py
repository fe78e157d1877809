"""Completions of the teacher or the student for the prompts of a run, as rows of a JSONL file: data for off-policy
runs (`lmbda: 0`) and sequence-level distillation."""

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from .config.base import TokenSelectiveConfig
from .data import prepare_dataset, resolve_columns, split_prompt_completion
from .errors import ConfigError, OutputDirError
from .files import open_for_append
from .models.loading import (
    ModelPair,
    collect_stop_token_ids,
    get_revision,
    load_frozen_model,
    load_generation_config,
    resolve_pair,
)
from .rollout.base import Completion, Key, SamplingConfig
from .rollout.seeding import prompt_generator, prompt_seed
from .rollout.vllm import require_vllm
from .run.arguments import RunArguments
from .run.build import load_datasets, set_model_init_kwargs

ROLES = {"teacher": "teacher_model_name_or_path", "student": "model_name_or_path"}
_PROGRESS_INTERVAL = 10.0  # seconds


@dataclass
class GenerationSetup:
    """Who generates, how, and for what.

    Attributes:
        role, name, config, tokenizer, vocab_size: of the generating model; `vocab_size` counts its logits.
        revision: the branch, tag or commit that is asked for.
        args, pair: the run's.
        rows, shape, prepared: the data set, its columns of prompt and completion, and its rows as token ids.
    """

    role: str
    model_name_or_path: str
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    revision: str | None
    args: TokenSelectiveConfig
    pair: ModelPair
    dataset: Dataset
    source_columns: tuple[str, str | None]
    tokenized_dataset: Dataset

    @property
    def metadata(self) -> dict[str, Any]:
        """What all rows of a file share."""
        return {
            "model": self.model_name_or_path,
            "revision": get_revision(self.model_name_or_path, self.config),
            "engine": "vllm" if self.args.use_vllm else "transformers",
            **{
                name: getattr(self.args, name)
                for name in ("seed", "temperature", "top_p", "max_new_tokens", "prompt_suffix")
            },
        }

    @property
    def sampling_params(self) -> SamplingConfig:
        """Only ids that both models have, until the generating model stops."""
        own = load_generation_config(self.model_name_or_path, self.config, self.revision)
        shared = self.pair.shared_vocab_size
        stop_ids = frozenset(i for i in collect_stop_token_ids(own, self.tokenizer) if i < shared)
        return SamplingConfig(stop_ids, shared, self.args.temperature, self.args.top_p)

    @property
    def output_columns(self) -> tuple[str, str]:
        """Of prompt and completion, as the run will look for them."""
        return self.args.prompt_column or "prompt", self.args.completion_column or "completion"

    def get_prompt(self, row: dict[str, Any], index: int) -> Any:
        """The prompt of a row of the data set, as it stands there."""
        return split_prompt_completion(row, index, self.source_columns)[0]


@dataclass
class PendingCompletion:
    """One completion to be made."""

    index: int
    sample: int
    prompt_ids: list[int]
    limit: int
    seed_key: Key


def generate_completions(
    arguments: RunArguments, role: str, output: Path, num_completions: int = 1, top_p: float | None = None
) -> None:
    """Append the rows that `output` lacks, each as soon as it is done.

    Args:
        arguments: the run: its pair, prompts, limits and `vllm_…` settings.
        role: "teacher" or "student".
        output: a JSONL file, a row a completion.
        per_prompt: completions for each prompt.
        top_p: nucleus mass, instead of the run's: no loss has to model these samples.

    Raises:
        TSDKDError: with all finished rows kept.
    """
    if top_p is not None:
        arguments.training_args.top_p = top_p
    setup = _prepare_setup(arguments, role)
    is_new = not output.exists()
    try:
        _append_completions(setup, output, num_completions)
    finally:
        if is_new and output.exists() and output.stat().st_size == 0:
            output.unlink()  # nothing was made


def engine_memory_utilization(arguments: RunArguments, device: torch.device) -> float:
    """Share of a device's memory for an engine that has it to itself: the file's is for one beside a training."""
    if device.type == "cuda" and "vllm_gpu_memory_utilization" not in arguments.flag_names:
        return 0.9
    return arguments.training_args.vllm_gpu_memory_utilization


def _append_completions(setup: GenerationSetup, output: Path, num_completions: int) -> None:
    with open_for_append(output, "output_file"):
        done = _read_finished(output, setup)
    pending = [
        PendingCompletion(
            row["index"], sample, row["prompt_ids"], row["limit"], (setup.args.seed, sample, row["index"])
        )
        for sample in range(num_completions)
        for row in setup.tokenized_dataset
        if (row["index"], sample) not in done
    ]
    _print_progress(f"{output}: {len(done)} completions are there, {len(pending)} to go")
    if not pending:
        return
    if setup.args.use_vllm and setup.args.vllm_mode == "colocate":
        _print_progress("starting vLLM's engine, which takes a minute or two")
    metadata = setup.metadata
    completions = (
        _generate_with_vllm(setup, pending) if setup.args.use_vllm else _generate_with_transformers(setup, pending)
    )
    with open_for_append(output, "output_file") as file:
        for position, completion in _with_progress(completions, len(pending)):
            file.write(
                json.dumps(_build_row(setup, pending[position], completion) | metadata, ensure_ascii=False) + "\n"
            )
            file.flush()


def _prepare_setup(arguments: RunArguments, role: str) -> GenerationSetup:
    args = arguments.training_args
    if args.world_size > 1:
        raise ConfigError(
            [f"it runs in one process, found {args.world_size}; vLLM takes vllm_tensor_parallel_size GPUs"]
        )
    if args.use_vllm:
        require_vllm()
        args.vllm_gpu_memory_utilization = engine_memory_utilization(arguments, args.device)
    dataset, _ = load_datasets(arguments.data_args, args)
    set_model_init_kwargs(arguments)
    student, teacher = str(arguments.model_args.model_name_or_path), str(args.teacher_model_name_or_path)
    pair = resolve_pair(student, teacher, args)
    tokenized_dataset = prepare_dataset(
        dataset, pair.template_tokenizer, args, pair.context_length, needs_completion=False
    )
    if role == "student":
        model_fields = (student, pair.student_config, pair.tokenizer, pair.vocab_sizes[0])
        revision = (args.model_init_kwargs or {}).get("revision")
    else:
        model_fields = (teacher, pair.teacher_config, pair.teacher_tokenizer, pair.vocab_sizes[1])
        revision = (args.teacher_model_init_kwargs or {}).get("revision")
    return GenerationSetup(
        role, *model_fields, revision, args, pair, dataset, resolve_columns(dataset, args), tokenized_dataset
    )


def _build_row(
    setup: GenerationSetup, pending_completion: PendingCompletion, completion: Completion
) -> dict[str, Any]:
    original, (prompt, completion_) = setup.dataset[pending_completion.index], setup.output_columns
    return {
        prompt: setup.get_prompt(original, pending_completion.index),
        completion_: setup.pair.tokenizer.decode(completion.ids, skip_special_tokens=True),
        **({"answer": original["answer"]} if "answer" in original else {}),
        "index": pending_completion.index,
        "sample": pending_completion.sample,
        "num_tokens": len(completion.ids),
        "finish_reason": "stop" if completion.stopped else "length",
    }


def _read_finished(output: Path, setup: GenerationSetup) -> set[tuple[int, int]]:
    """(index, sample) of the rows that are there; a last line that was cut off is removed."""
    done, whole, metadata = set(), 0, setup.metadata
    start = f'{{"{setup.output_columns[0]}": '.encode()
    with output.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n") and line.startswith(start[: len(line)]):
                break
            try:
                row = json.loads(line)
                place, prompt = (row["index"], row["sample"]), row[setup.output_columns[0]]
                found = {model_name_or_path: row[model_name_or_path] for model_name_or_path in metadata} | {
                    "prompt": prompt
                }
                expected = metadata | {"prompt": setup.get_prompt(setup.dataset[row["index"]], row["index"])}
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise OutputDirError(f"output_file: line {number} of {output} isn't from tsdkd generate") from error
            other = next(
                (
                    model_name_or_path
                    for model_name_or_path in expected
                    if found[model_name_or_path] != expected[model_name_or_path]
                ),
                None,
            )
            if other is not None:
                raise OutputDirError(
                    f"output_file: {output} has other rows: {other} was {repr(found[other])[:80]}, now "
                    f"{repr(expected[other])[:80]}; choose another file"
                )
            done.add(place)
            whole += len(line)
    if whole < output.stat().st_size:
        os.truncate(output, whole)
    return done


def _generate_with_vllm(setup: GenerationSetup, pending: list[PendingCompletion]) -> Iterator[tuple[int, Completion]]:
    """Position and completion of each ticket, as they are done."""
    from .rollout.vllm.colocate import iter_completions, shared_sampling_params, start_engine  # vLLM is an extra

    requests = [{"prompt": t.prompt_ids, "max_tokens": t.limit, "seed": prompt_seed(*t.seed_key)} for t in pending]
    longest = max(len(t.prompt_ids) + t.limit for t in pending)
    if setup.args.vllm_mode == "server":
        from .rollout.vllm.server import connect_to_server

        parameters = shared_sampling_params(setup.sampling_params, setup.vocab_size)
        return connect_to_server(setup.args, longest, setup.model_name_or_path).complete(
            [request | parameters for request in requests]
        )
    return iter_completions(
        start_engine(setup.model_name_or_path, setup.revision, setup.args, longest), requests, setup.sampling_params
    )


def _generate_with_transformers(
    setup: GenerationSetup, pending: list[PendingCompletion]
) -> Iterator[tuple[int, Completion]]:
    from .rollout.hf import sample_completions

    model = load_frozen_model(setup.model_name_or_path, setup.args, ROLES[setup.role], setup.args.device).eval()
    sampling_params, size = setup.sampling_params, setup.args.per_device_eval_batch_size
    # alike lengths, so that little is padded; the longest first, so that memory runs out at once or not at all
    order = sorted(range(len(pending)), key=lambda i: -len(pending[i].prompt_ids) - pending[i].limit)
    for positions in (order[i : i + size] for i in range(0, len(order), size)):
        some = [pending[i] for i in positions]
        generators = [prompt_generator(*t.seed_key) for t in some]
        prompts, limits = [t.prompt_ids for t in some], [t.limit for t in some]
        yield from zip(
            positions, sample_completions(model, prompts, limits, generators, **vars(sampling_params)), strict=True
        )


def _with_progress(completions: Iterator[tuple[int, Completion]], total: int) -> Iterator[tuple[int, Completion]]:
    """The same, with progress on stderr."""
    start = last_printed = time.perf_counter()
    tokens = 0
    for count, (position, completion) in enumerate(completions, 1):
        yield position, completion
        tokens, now = tokens + len(completion.ids), time.perf_counter()
        if count == total or now - last_printed >= _PROGRESS_INTERVAL:
            last_printed = now
            _print_progress(f"{count} of {total} completions, {tokens} tokens, {tokens / (now - start):.0f} tokens/s")


def _print_progress(text: str) -> None:
    print(f"tsdkd generate: {text}", file=sys.stderr, flush=True)
