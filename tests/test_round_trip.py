"""Tokenizers that lose the prompts are told of; those that only normalize them are not."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from conftest import QUIET, build_model, build_tokenizer, flags, write_jsonl
from tsdkd import DataError
from tsdkd.cli import main
from tsdkd.models.round_trip import check_round_trip

TEXTS = [
    "Find the value of $x^2 + 3x - 5$ when x = 7.\n\nPlease reason step by step.",
    "Café naïve Ünïcode — “quotes” … ½ ﬁne 你好 😀 \t tab",
    "\\boxed{\\frac{1}{2}} <|im_start|>user\nHi there!<|im_end|>",
    "x" * 5000,
]
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def byte_level() -> Tokenizer:
    """As Qwen's and Llama 3's; its unknown token is its end of text, which a template may write."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=special)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def sentencepiece(byte_fallback: bool = True) -> Tokenizer:
    """As Llama 2's and Gemma's: spaces are ▁, and bytes stand for unknown characters."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=byte_fallback, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fallback = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(fallback)
    special = ["<unk>", "<s>", *(BYTES if byte_fallback else [])]
    tokenizer.train_from_iterator(TEXTS[:1], trainers.BpeTrainer(vocab_size=400, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def unigram() -> Tokenizer:
    """As T5's and XLNet's: compatible characters are one, and so is whitespace."""
    tokenizer = Tokenizer(models.Unigram())
    whitespace = normalizers.Replace(r"\s+", " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), whitespace, normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", special_tokens=["<unk>"])
    tokenizer.train_from_iterator([text.replace("\n", " ") for text in TEXTS], trainer)
    return tokenizer


def wordpiece() -> Tokenizer:
    """As BERT's: lower case, no accents, and spaces around punctuation."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["<unk>"])
    tokenizer.train_from_iterator([text[:200] for text in TEXTS], trainer)
    return tokenizer


def check(tokenizer: Tokenizer, texts: list[str]) -> None:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    check_round_trip(texts, fast, "model_name_or_path")


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What the check warns of."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("tsdkd.models.round_trip")
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


@pytest.mark.parametrize("build", [byte_level, sentencepiece, unigram, wordpiece])
def test_a_tokenizer_that_normalizes_is_not_accused(build: Callable[[], Tokenizer], warnings: list[str]) -> None:
    texts = TEXTS if build is not wordpiece else [text[:200] for text in TEXTS]  # it knows no words above 100 letters
    check(build(), texts[:3] if build is wordpiece else texts)
    check(build(), ["<unk>Hi there!<unk>"] * 3)
    assert not warnings


def test_characters_that_are_lost_are_warned_of(warnings: list[str]) -> None:
    """Without byte fallback; one in a thousand tokens is not worth a word."""
    check(sentencepiece(byte_fallback=False), [*TEXTS[:1] * 9, "Find the ½ 😀 value of x"])
    (warning,) = warnings
    assert "tokens are unknown" in warning and "'Find the ½ 😀 value of x'" in warning
    check(sentencepiece(byte_fallback=False), [*["Find the value of x when x = 7"] * 100, "Find ½"])
    assert len(warnings) == 1


def test_a_prompt_that_is_lost_is_refused() -> None:
    with pytest.raises(DataError, match=r"model_name_or_path: its tokenizer.*'你好 你好' becomes '<unk> <unk>'"):
        check(sentencepiece(byte_fallback=False), ["你好 你好"])


def qwen_with_words(folder: Path, words: list[str]) -> str:
    """A word-level tokenizer beside a Qwen2 model: transformers 5 loads it as `Qwen2Tokenizer`, a byte-level one."""
    build_model("qwen2").save_pretrained(folder)
    build_tokenizer(words).save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    settings = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("tokenizer_class", "backend")}
    path.write_text(json.dumps(settings))
    if type(AutoTokenizer.from_pretrained(folder)).__name__ != "Qwen2Tokenizer":
        pytest.skip("this version of transformers loads it as it is")
    return str(folder)


@pytest.mark.parametrize(
    ("prompt", "code"),
    [("What is one plus two ?", 2), ("1 + 2 = ? 3 + 4 = ? 5 + 6 = ? 7 + 8 = ? 9 + 1 = ? What ?", 0)],
)
def test_a_tokenizer_of_another_class(
    prompt: str, code: int, tmp_path: Path, warnings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """What its class can't represent is told: refused where little is left, else a warning."""
    words = [*["What", "is", "one", "plus", "two"], *"0123456789+-=?", "<user>"]
    model = qwen_with_words(tmp_path / "model", words)
    values: dict[str, Any] = {"model_name_or_path": model, "teacher_model_name_or_path": model, **QUIET}
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": prompt}] * 4)
    values |= {"dataset_name": rows, "output_dir": tmp_path / "out", "chat_template_source": "none"}
    values |= {"max_steps": 1, "max_new_tokens": 4}
    assert main(["train", *flags(**values)]) == code
    error = capsys.readouterr().err
    assert (tmp_path / "out").exists() == (code == 0)
    text = error if code else "".join(warnings)
    assert "model_name_or_path: its tokenizer, a Qwen2Tokenizer, can't represent the prompts" in text
    assert "What" in text and "Traceback" not in error


def test_the_tests_own_tokenizer_is_whole(warnings: list[str]) -> None:
    tokenizer = build_tokenizer()
    text = tokenizer.apply_chat_template([{"role": "user", "content": "w1 w2"}], tokenize=False)
    check_round_trip([str(text)], tokenizer, "model_name_or_path")
    assert not warnings
