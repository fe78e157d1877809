"""Tokenizes the prompts and completions of a data set."""

from typing import Any

from accelerate import PartialState
from datasets import Dataset, DatasetInfo, Features, List, Value
from transformers import PreTrainedTokenizerBase

from ..config.base import TokenSelectiveConfig
from ..config.logs import get_logger
from ..errors import DataError
from ..models.chat_template import render_prompt
from ..models.loading import ModelPair
from ..models.round_trip import check_round_trip
from .columns import Columns, append_prompt_suffix, resolve_columns, split_prompt_completion

logger = get_logger(__name__)
_CHECKED_ROWS = 200  # whose prompts are compared with what the tokenizer makes of them


class _PreparedInfo(DatasetInfo):
    """Marks rows that `prepare_dataset` made. The mark survives `select`, and no file can contain it."""


def is_prepared(rows: Dataset) -> bool:
    """Whether `prepare_dataset` made these rows."""
    return isinstance(rows.info, _PreparedInfo)


def prepare_for_pair(
    rows: Dataset,
    pair: ModelPair,
    args: TokenSelectiveConfig,
    needs_completion: bool = False,
    source: str = "the data set",
    needs_answer: bool = False,
    for_teacher: bool = True,
) -> Dataset:
    """`prepare_dataset` with the templates and the context of a run's models.

    Args:
        rows, args, needs_completion, source, needs_answer: see `prepare_dataset`.
        pair: the models.
        for_teacher: whether the teacher reads the rows, too, which may take prompts of its own.
    """
    teacher_tokenizer = pair.teacher_tokenizer if for_teacher else None
    return prepare_dataset(
        rows,
        pair.template_tokenizer,
        args,
        pair.context_length,
        needs_completion,
        source,
        needs_answer,
        teacher_tokenizer,
    )


def prepare_dataset(
    rows: Dataset,
    template_tokenizer: PreTrainedTokenizerBase,
    args: TokenSelectiveConfig,
    context_length: int,
    needs_completion: bool,
    source: str = "the data set",
    needs_answer: bool = False,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> Dataset:
    """Tokenize, and drop the prompts that leave no room for a completion.

    Args:
        rows: as `tsdkd.data` describes them.
        template_tokenizer: the tokenizer whose chat template renders the prompts.
        args: column names, template settings, length limits.
        context_length: the longest sequence that both models take, tokens.
        needs_completion: whether every row must have one (`lmbda` below 1).
        source: what messages about a missing column call the data set.
        needs_answer: whether `answer_column`, where it is set, must be there.
        teacher_tokenizer: its chat template renders the teacher's prompts, if `teacher_chat_template_kwargs` is set.

    Returns:
        Columns `index` (row number in `rows`), `prompt_ids`, `completion_ids` (empty without one), `limit` (the most
        tokens that the completion may have), where the rows have one, `answer`, and, where the teacher's prompts
        differ, `teacher_prompt_ids`.

    Raises:
        DataError: a column is missing, a row has no usable prompt, the tokenizer can't represent the prompts, or no
            row is left.
    """
    columns = resolve_columns(rows, args, source, needs_answer)
    total = max_sequence_length(args, context_length)
    _check_tokenizer(rows, template_tokenizer, args, columns)
    if args.teacher_chat_template_kwargs is None:
        teacher_tokenizer = None
    if teacher_tokenizer is not None and teacher_tokenizer.chat_template is None:
        raise DataError("teacher_chat_template_kwargs: the teacher's tokenizer has no chat template")

    def tokenize(row: dict[str, Any], index: int) -> dict[str, Any]:
        prompt, completion = split_prompt_completion(row, index, columns)
        text, is_rendered = _render(prompt, index, template_tokenizer, args)
        prompt_ids = list(template_tokenizer(text, add_special_tokens=not is_rendered)["input_ids"])
        _require_tokens(prompt_ids, index, prompt)
        others = {"answer": row[columns.answer]} if columns.answer else {}
        longest = len(prompt_ids)
        if teacher_tokenizer is not None:
            prompt = append_prompt_suffix(prompt, index, args.prompt_suffix)
            text = _apply_template(prompt, index, teacher_tokenizer, args.teacher_chat_template_kwargs)
            others["teacher_prompt_ids"] = list(teacher_tokenizer(text, add_special_tokens=False)["input_ids"])
            _require_tokens(others["teacher_prompt_ids"], index, prompt)
            longest = max(longest, len(others["teacher_prompt_ids"]))
        if completion is None and needs_completion:
            raise DataError(
                f"row {index}: no completion, but {args.method} (lmbda {args.lmbda}) trains on the data set's"
            )
        limit = min(args.max_completion_length, total - longest)
        ids = [] if completion is None else _completion_ids(completion, template_tokenizer, row)
        return {
            "index": index,
            "prompt_ids": prompt_ids,
            "completion_ids": ids[: max(limit, 0)],
            "limit": limit,
            **others,
        }

    features = {"index": Value("int64"), "prompt_ids": List(Value("int64")), "completion_ids": List(Value("int64"))}
    features |= {"limit": Value("int64")}  # given: columns of the same names would impose their types
    if columns.answer:
        features |= {"answer": rows.features[columns.answer]}
    if teacher_tokenizer is not None:
        features |= {"teacher_prompt_ids": List(Value("int64"))}
    with PartialState().main_process_first():
        tokenized = rows.map(
            tokenize,
            with_indices=True,
            remove_columns=rows.column_names,
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
    """Maximum number of tokens of prompt plus completion, by the options, the models and the engine."""
    limits = [args.max_length, args.vllm_max_model_length if args.use_vllm else None]
    return min([context_length, *(limit for limit in limits if limit)])


def _check_tokenizer(
    rows: Dataset, template_tokenizer: PreTrainedTokenizerBase, args: TokenSelectiveConfig, columns: Columns
) -> None:
    """Warn or raise `DataError` if the tokenizer loses a part of the first prompts."""
    first = rows.select(range(min(_CHECKED_ROWS, len(rows))))
    texts = [
        _render(split_prompt_completion(row, index, columns)[0], index, template_tokenizer, args)[0]
        for index, row in enumerate(first)
    ]
    field = "teacher_model_name_or_path" if args.chat_template_source == "teacher" else "model_name_or_path"
    check_round_trip(texts, template_tokenizer, field)


def _render(
    prompt: Any, index: int, template_tokenizer: PreTrainedTokenizerBase, args: TokenSelectiveConfig
) -> tuple[str, bool]:
    """The text of a prompt, and whether a chat template rendered it: then the text has its special tokens already."""
    prompt = append_prompt_suffix(prompt, index, args.prompt_suffix)
    has_template = template_tokenizer.chat_template is not None
    if isinstance(prompt, str) and (args.chat_template_source == "none" or not has_template):
        return prompt, False
    if not has_template:
        raise DataError(f"row {index}: the prompt is a list of messages, but the tokenizer has no chat template")
    return _apply_template(prompt, index, template_tokenizer, args.chat_template_kwargs), True


def _require_tokens(ids: list[int], index: int, prompt: Any) -> None:
    if not ids:
        raise DataError(f"row {index}: the tokenizer makes no token of the prompt {str(prompt)[:60]!r}")


def _apply_template(prompt: Any, index: int, tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any] | None) -> str:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        return render_prompt(tokenizer, messages, **(kwargs or {}))
    except DataError as error:
        raise DataError(f"row {index}: {error}") from error


def _completion_ids(completion: str, template_tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> list[int]:
    """The completion's ids with the end token, from which the student learns to stop. A completion that `tsdkd
    generate` cut off has none."""
    ids = list(template_tokenizer(completion, add_special_tokens=False)["input_ids"])
    cut = template_tokenizer.eos_token_id is None or row.get("finish_reason") == "length"
    return ids if cut else [*ids, template_tokenizer.eos_token_id]
