"""Loads tokenizers, checks that both models share one, and defines where a completion ends."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from ..config.coercion import shorten
from ..errors import ModelError, TokenizerMismatchError
from .hub import load_pretrained

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")


def load_tokenizer(name: str, field: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """A model's tokenizer; `kwargs` are `from_pretrained`'s. Raises `ModelError`."""
    folder = Path(name)
    if folder.is_dir() and not any(next(folder.glob(pattern), None) for pattern in _TOKENIZER_FILES):
        # transformers would build one from the model type
        raise ModelError(f"{field}: no tokenizer in {name!r}: the folder has no tokenizer files")
    return load_pretrained(AutoTokenizer.from_pretrained, name, field, "tokenizer", **kwargs)


def check_same_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Check that both tokenizers map tokens to the same ids, as token-level distillation requires.

    Raises:
        TokenizerMismatchError: naming the first id that differs.
    """
    student_vocab, teacher_vocab = student.get_vocab(), teacher.get_vocab()
    if student_vocab == teacher_vocab:
        return
    student_tokens, teacher_tokens = ({i: t for t, i in vocab.items()} for vocab in (student_vocab, teacher_vocab))
    ids = student_tokens.keys() | teacher_tokens.keys()
    first = min(i for i in ids if student_tokens.get(i) != teacher_tokens.get(i))
    raise TokenizerMismatchError(
        "teacher_model_name_or_path: its tokenizer is not the student's: "
        f"id {first} is {shorten(student_tokens.get(first))} for the student and "
        f"{shorten(teacher_tokens.get(first))} for the teacher; choose a teacher with the same tokenizer"
    )


def check_vocab_fits(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, field: str) -> None:
    """Check that the embedding has a row for every id of the tokenizer."""
    largest, rows = max(tokenizer.get_vocab().values()), config.get_text_config().vocab_size
    if largest >= rows:
        raise ModelError(f"{field}: its tokenizer has {largest + 1} ids, but the model only {rows} embeddings")


def stop_token_ids(
    vocab_size: int, *models: tuple[GenerationConfig | None, PreTrainedTokenizerBase]
) -> frozenset[int]:
    """The rule for where a completion ends, everywhere: training, generation, evaluation.

    A completion ends at an end-of-sequence token of the model that writes it, or of the model whose chat template
    renders the prompt (a base student that is trained with the teacher's template must end its turn as the teacher
    does). A model names its end-of-sequence tokens in its generation config and in its tokenizer, and often not the
    same: Gemma's end of a turn is in its generation config only.

    Args:
        vocab_size: the number of ids that can be sampled; stop tokens are below it.
        models: generation config and tokenizer of the model that writes, and of the one whose template is used.
    """
    ids: set[int] = set()
    for model in models:
        for source in model:
            eos = getattr(source, "eos_token_id", None)
            ids |= set(eos) if isinstance(eos, (list, tuple)) else set() if eos is None else {eos}
    return frozenset(i for i in ids if 0 <= i < vocab_size)
