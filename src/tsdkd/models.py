"""The pair: student and teacher, their tokenizers' identity, the vocabulary they share, where a completion stops."""

import os
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PretrainedConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .errors import ModelError, TokenizerMismatchError


def _load(loader: Any, name: str, field: str, what: str, **kwargs: Any) -> Any:
    """`loader.from_pretrained`, its many exceptions turned into one line that names the setting."""
    try:
        return loader.from_pretrained(name, **kwargs)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        if os.path.isdir(name):
            reason = " ".join(str(error).split())[:300]
        elif os.path.exists(name):
            reason = "it is a file, expected a folder or a hub name"
        else:
            reason = "no such folder here, and the hub doesn't have it or can't be reached"
        raise ModelError(f"{field}: no {what} in {name!r}: {reason}") from error


def load_config(name: str, field: str, **kwargs: Any) -> PretrainedConfig:
    """A model's configuration. Raises `ModelError`."""
    return _load(AutoConfig, name, field, "model", **kwargs)


def load_tokenizer(name: str, field: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """A model's tokenizer. Raises `ModelError`."""
    return _load(AutoTokenizer, name, field, "tokenizer", **kwargs)


def load_teacher(name: str, trust_remote_code: bool = False, **kwargs: Any) -> PreTrainedModel:
    """The teacher, in its checkpoint's dtype unless `kwargs` has a `dtype`. Raises `ModelError`."""
    kwargs = {"dtype": "auto", "trust_remote_code": trust_remote_code, **kwargs}
    return _load(AutoModelForCausalLM, name, "teacher_model", "model", **kwargs)


def check_same_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Token-level distillation compares ids, so both tokenizers must be the same map.

    Raises:
        TokenizerMismatchError: naming the first id that differs.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    ours_by_id, theirs_by_id = ({i: t for t, i in vocab.items()} for vocab in (ours, theirs))
    first = min(i for i in ours_by_id.keys() | theirs_by_id.keys() if ours_by_id.get(i) != theirs_by_id.get(i))
    raise TokenizerMismatchError(
        f"teacher_model: its tokenizer is not the student's: id {first} is {ours_by_id.get(first)!r} for the student "
        f"and {theirs_by_id.get(first)!r} for the teacher; choose a teacher with the same tokenizer"
    )


def shared_vocab_size(student: PretrainedConfig, teacher: PretrainedConfig) -> int:
    """Number of ids that both models have logits for.

    One tokenizer often comes with differently padded vocabularies (Qwen2.5: 152064 rows at 14B, 151936 at 1.5B).
    """
    return min(student.get_text_config().vocab_size, teacher.get_text_config().vocab_size)


def context_length(*configs: PretrainedConfig) -> int:
    """The longest sequence, tokens, that all models take."""
    limits = [getattr(c.get_text_config(), "max_position_embeddings", None) for c in configs]
    return min((limit for limit in limits if limit), default=2**31)


def stop_token_ids(*sources: GenerationConfig | PreTrainedTokenizerBase | None) -> set[int]:
    """The union of the end-of-sequence ids of generation configs and tokenizers."""
    ids: set[int] = set()
    for source in sources:
        eos = getattr(source, "eos_token_id", None)
        ids |= set(eos) if isinstance(eos, (list, tuple)) else set() if eos is None else {eos}
    return ids
