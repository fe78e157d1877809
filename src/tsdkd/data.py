"""Prompts in any usual shape -> token ids and lengths, before training starts.

A row is `prompt` (a string or messages), `messages` (the last assistant turn is the completion), or `prompt` +
`completion`. What is prompt and what is completion is later decided by lengths, never by a comparison with the pad
token.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, DatasetInfo, Features, List, Value, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetNotFoundError
from transformers import PreTrainedTokenizerBase

from .config.base import TokenSelectiveConfig
from .config.logs import get_logger
from .errors import DataError, list_names
from .files import load_in_child_first, require_readable_data
from .models.chat_template import render_prompt
from .models.hub import offline_reason

logger = get_logger(__name__)
_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


class _PreparedInfo(DatasetInfo):
    """Marks rows that `prepare_dataset` made, and what is selected of them; no file can carry it."""


def is_prepared(rows: Dataset) -> bool:
    """Whether `prepare_dataset` made these rows."""
    return isinstance(rows.info, _PreparedInfo)


def load_split(name: str, config: str | None, split: str, field: str = "dataset_name") -> Dataset:
    """A split of a local folder or a hub data set; a local file has only the split "train".

    Raises:
        DataError: missing, unreadable, without this split, or empty.
    """
    path = Path(name)
    offline = None
    try:
        if path.exists():
            require_readable_data(path)
        if path.is_file():
            if path.suffix not in _FORMATS:
                raise DataError(
                    f"{field}: {name} must end in {', '.join(_FORMATS)}, found {path.suffix or 'no ending'!r}"
                )
            if split != "train":
                raise DataError(f"{field}: {name} is a single file, it has no split {split!r}")
            rows = load_in_child_first(
                lambda: load_dataset(_FORMATS[path.suffix], data_files=str(path), split="train")
            )
        elif not path.exists() and (path.suffix in _FORMATS or path.is_absolute() or name.startswith(".")):
            raise DataError(f"{field}: there is no file {name!r}")
        elif path.exists():
            _require_own_files(path, config)
            folder = os.path.abspath(path)  # or one that is called json would be taken for a reader
            rows = load_in_child_first(lambda: load_dataset(folder, config, split=split))
        else:
            offline = offline_reason()
            rows = load_dataset(name, config, split=split)
    except DataError:
        raise
    except Exception as error:  # the readers raise whatever their formats raise
        if isinstance(error, (DatasetNotFoundError, ConnectionError, FileNotFoundError)) and not path.exists():
            reason = f"there is no copy; {offline}" if offline else "the hub doesn't have it"
            raise DataError(f"{field}: {name!r} is no local file, and {reason}") from error
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:300] or f"it is empty, or has no rows ({type(cause).__name__})"
        raise DataError(f"{field}: {name} (split {split}) can't be read: {reason}") from error
    if len(rows) == 0:
        raise DataError(f"{field}: {name} has no rows")
    return rows.select_columns([column for column, feature in rows.features.items() if not _opens_files(feature)])


def _require_own_files(folder: Path, config: str | None) -> None:
    """Raise `ValueError` if a folder's README.md says that files elsewhere are its data."""
    places = [Path(os.path.abspath(folder)), Path(os.path.realpath(folder))]
    files = load_dataset_builder(str(places[0]), config).config.data_files or {}
    for file in (str(file) for some in files.values() for file in some):  # a URL, of any protocol, is no file of it
        if not any(Path(os.path.normpath(file)).is_relative_to(place) for place in places):
            raise ValueError(f"{file[:200]!r} isn't in the folder")


def _opens_files(feature: Any) -> bool:
    """Whether reading a value opens the file that it names: an image, a sound, a video."""
    if isinstance(feature, dict):
        return any(_opens_files(part) for part in feature.values())
    if type(feature).__name__ == "Json":  # which older versions of datasets don't have
        return False
    return hasattr(feature, "decode_example") or _opens_files(getattr(feature, "feature", {}))


def prepare_dataset(
    rows: Dataset,
    template_tokenizer: PreTrainedTokenizerBase,
    args: TokenSelectiveConfig,
    context_length: int,
    needs_completion: bool,
) -> Dataset:
    """Tokenise, and drop the prompts that leave no room for a completion.

    Args:
        rows: see the module's first lines; `answer`, if there, is kept.
        template_tokenizer: the tokenizer whose chat template renders the prompts.
        args: column names, template settings, length limits.
        context_length: the longest sequence that both models take, tokens.
        needs_completion: whether every row must have one (`lmbda` below 1).

    Returns:
        Columns `index` (row number in `rows`), `prompt_ids`, `completion_ids` (empty without one), `limit` (the most
        tokens that the completion may have) and, if given, `answer`.

    Raises:
        DataError: a row without a usable prompt, or no row left.
    """
    columns = resolve_columns(rows, args)
    total = max_sequence_length(args, context_length)

    def tokenize(row: dict[str, Any], index: int) -> dict[str, Any]:
        prompt, completion = split_prompt_completion(row, index, columns)
        prompt_ids = _prompt_ids(
            append_prompt_suffix(prompt, index, args.prompt_suffix), index, template_tokenizer, args
        )
        if not prompt_ids:
            raise DataError(f"row {index}: the tokenizer makes no token of the prompt {str(prompt)[:60]!r}")
        if completion is None and needs_completion:
            raise DataError(
                f"row {index}: no completion, but {args.method} (lmbda {args.lmbda}) trains on the data set's"
            )
        limit = min(args.max_completion_length, total - len(prompt_ids))
        ids = [] if completion is None else _completion_ids(completion, template_tokenizer, row)
        return {"index": index, "prompt_ids": prompt_ids, "completion_ids": ids[: max(limit, 0)], "limit": limit}

    features = {"index": Value("int64"), "prompt_ids": List(Value("int64")), "completion_ids": List(Value("int64"))}
    features |= {"limit": Value("int64")}  # given: columns of the same names would impose their types
    features |= {name: type_ for name, type_ in rows.features.items() if name == "answer"}
    with PartialState().main_process_first():
        tokenized = rows.map(
            tokenize,
            with_indices=True,
            remove_columns=[name for name in rows.column_names if name != "answer"],
            features=Features(features),
            num_proc=args.dataset_num_proc,
            desc="Tokenizing",
        )
        dataset = tokenized.filter(
            lambda limits: [limit >= 1 for limit in limits], batched=True, input_columns="limit"
        )
    if len(dataset) == 0:
        shortest = min(total - limit for limit in tokenized["limit"])
        raise DataError(
            f"all {len(rows)} prompts leave no room for a completion: the shortest has {shortest} tokens, the limit "
            f"of prompt and completion is {total} (max_length, vllm_max_model_length, or the models' context)"
        )
    if len(dataset) < len(rows):
        dropped = len(rows) - len(dataset)
        logger.warning(f"dropped {dropped} of {len(rows)} prompts: they leave no room for a completion")
    dataset.info.__class__ = _PreparedInfo
    return dataset


def max_sequence_length(args: TokenSelectiveConfig, context_length: int) -> int:
    """The most tokens that prompt and completion may have together: by the options, the models and the engine."""
    limits = [args.max_length, args.vllm_max_model_length if args.use_vllm else None]
    return min([context_length, *(limit for limit in limits if limit)])


def resolve_columns(rows: Dataset, args: TokenSelectiveConfig) -> tuple[str, str | None]:
    """The columns of prompt and completion. Raises `DataError`."""
    columns = rows.column_names
    for field in ("prompt_column", "completion_column"):
        name = getattr(args, field)
        if name is not None and name not in columns:
            raise DataError(f"{field}: the data set has no column {name!r}, it has {list_names(columns)}")
    completion = args.completion_column or ("completion" if "completion" in columns else None)
    prompt = args.prompt_column or ("prompt" if "prompt" in columns else None)
    if prompt is not None:
        return prompt, completion
    if "messages" not in columns:
        raise DataError(
            f"the data set has no column 'prompt' or 'messages', it has {list_names(columns)}; set prompt_column"
        )
    if args.completion_column:
        raise DataError("completion_column: no use beside messages, whose last assistant turn is the completion")
    return "messages", None


def split_prompt_completion(
    row: dict[str, Any], index: int, columns: tuple[str, str | None]
) -> tuple[Any, str | None]:
    """Prompt (string or messages) and completion. The last assistant turn of a conversation is its completion."""
    prompt_column, completion_column = columns
    prompt = row[prompt_column]
    completion = row[completion_column] if completion_column else None
    if isinstance(completion, list):
        _check_messages(completion, index, completion_column)
        if len(completion) != 1 or completion[0]["role"] != "assistant":
            raise DataError(f"row {index}: {completion_column} must be a string or one assistant message")
        completion = completion[0]["content"]
    if completion is not None and not isinstance(completion, str):
        raise DataError(f"row {index}: {completion_column} must be a string, found {type(completion).__name__}")
    if not isinstance(prompt, str) or prompt_column == "messages" or not prompt.strip():
        if not prompt or not isinstance(prompt, list):
            found = "nothing" if not prompt or not str(prompt).strip() else repr(prompt)[:60]
            raise DataError(f"row {index}: no prompt: {prompt_column} must be a string or messages, found {found}")
        _check_messages(prompt, index, prompt_column)
        if completion is None and prompt[-1]["role"] == "assistant":
            prompt, completion = prompt[:-1], prompt[-1]["content"]
            if not prompt:
                raise DataError(f"row {index}: no prompt: {prompt_column} has only an assistant turn")
    return prompt, completion


def append_prompt_suffix(prompt: Any, index: int, suffix: str | None) -> Any:
    """A prompt, string or messages, with a line after it: after its last user message.

    Raises:
        DataError: there is no user message.
    """
    if not suffix:
        return prompt
    if isinstance(prompt, str):
        return f"{prompt}\n{suffix}"
    last = max((i for i, message in enumerate(prompt) if message["role"] == "user"), default=None)
    if last is None:
        raise DataError(f"row {index}: no user message after which prompt_suffix could go")
    message = {**prompt[last], "content": f"{prompt[last]['content']}\n{suffix}"}
    return [*prompt[:last], message, *prompt[last + 1 :]]


def _check_messages(messages: list[Any], index: int, column: str | None) -> None:
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            found = f"{message.get('role')}: no content" if isinstance(message, dict) else repr(message)
            what = "completion" if isinstance(message, dict) and message.get("role") == "assistant" else "prompt"
            raise DataError(
                f"row {index}: no {what}: {column} must hold messages, each with role and content, found {found[:60]}"
            )


def _prompt_ids(
    prompt: Any, index: int, template_tokenizer: PreTrainedTokenizerBase, args: TokenSelectiveConfig
) -> list[int]:
    if isinstance(prompt, str):
        if args.chat_template_source == "none" or template_tokenizer.chat_template is None:
            return list(template_tokenizer(prompt)["input_ids"])
        prompt = [{"role": "user", "content": prompt}]
    if template_tokenizer.chat_template is None:
        raise DataError(f"row {index}: the prompt is a list of messages, but the tokenizer has no chat template")
    try:
        text = render_prompt(template_tokenizer, prompt, **(args.chat_template_kwargs or {}))
    except DataError as error:
        raise DataError(f"row {index}: {error}") from error
    return list(template_tokenizer(text, add_special_tokens=False)["input_ids"])


def _completion_ids(completion: str, template_tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> list[int]:
    """The completion, with the end of its turn unless `tsdkd generate` had to cut it: without the end token a student
    never learns to stop."""
    ids = list(template_tokenizer(completion, add_special_tokens=False)["input_ids"])
    cut = template_tokenizer.eos_token_id is None or row.get("finish_reason") == "length"
    return ids if cut else [*ids, template_tokenizer.eos_token_id]


def hash_rows(rows: Dataset) -> str:
    """A digest of tokenized rows as they are trained on."""
    digest = hashlib.sha256()
    for some in rows.select_columns(["prompt_ids", "completion_ids", "limit"]).iter(1000):
        digest.update(repr(some).encode())
    return digest.hexdigest()


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rows as lists: nothing is moved to a device before the rollout."""
    return {key: [row[key] for row in rows] for key in rows[0]}


def pad_sequences(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Prompt + completion, padded on the right.

    There is no attention mask: a causal model never sees what comes later, and to look at a mask transformers would
    make the host wait for the device.

    Returns:
        `input_ids` `[B, S]`; `prompt_lengths`, `completion_lengths` `[B]`, all int64.
    """
    sequences = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
    width = max(len(s) for s in sequences)
    return {
        "input_ids": torch.tensor([s + [0] * (width - len(s)) for s in sequences]),
        "prompt_lengths": torch.tensor([len(p) for p in prompts]),
        "completion_lengths": torch.tensor([len(c) for c in completions]),
    }


def target_ids(batch: dict[str, torch.Tensor], index: torch.Tensor) -> torch.Tensor:
    """The tokens `[N]` that are predicted at the positions `index` of `[B, S - 1]`."""
    return batch["input_ids"][:, 1:].flatten().index_select(0, index)


def completion_mask(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The positions whose *next* token belongs to the completion.

    Returns:
        `[B, S - 1]` bool: where true, the logits there predict a completion token.
    """
    position = torch.arange(1, batch["input_ids"].shape[1], device=batch["input_ids"].device)
    start = batch["prompt_lengths"].unsqueeze(-1)
    return (position >= start) & (position < start + batch["completion_lengths"].unsqueeze(-1))
