"""Data sets and chat templates that strangers wrote: columns with our names, programs without an end."""

import datetime
import gzip
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from tokenizers.processors import TemplateProcessing

from conftest import QUIET, WORDS, build_tokenizer, flags, make_rows, write_jsonl
from tsdkd import DataError, TSDKDConfig, TSDKDTrainer
from tsdkd.cli import main
from tsdkd.data import load_split, prepare_dataset
from tsdkd.models import chat_template
from tsdkd.models.chat_template import limit_template, render_prompt

OURS = ["index", "prompt_ids", "completion_ids", "limit", "input_ids", "prompt_lengths", "lengths", "num_tokens"]
ODD: dict[str, Any] = {
    "numbers": 7,
    "fractions": 0.5,
    "text": "w9",
    "token ids": [5, 6],
    "nothing": None,
    "a mapping": {"a": [1.5]},
    "times": datetime.datetime(2026, 1, 2),
    "huge": 2**40,
}


def prepare(rows: list[dict[str, Any]] | Dataset, tokenizer: Any = None, **options: Any) -> list[dict[str, Any]]:
    rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
    args = TSDKDConfig(output_dir="unused", **QUIET, **options)
    return prepare_dataset(rows, tokenizer or build_tokenizer(), args, 128, needs_completion=False).to_list()


# Columns with our names


@pytest.mark.parametrize("odd", ODD)
def test_columns_with_our_names_change_nothing(odd: str) -> None:
    rows = [{"prompt": f"w{i} w2", "completion": "w3"} for i in range(3)]
    expected = prepare(rows)
    for name in OURS:
        found = prepare([{**row, name: ODD[odd]} for row in rows])
        assert found == expected and [type(row["limit"]) for row in found] == [int] * 3
    assert prepare([{**row, **dict.fromkeys(OURS, ODD[odd])} for row in rows]) == expected
    assert [row["answer"] for row in prepare([{**row, "answer": ODD[odd]} for row in rows])] == [ODD[odd]] * 3


@pytest.mark.parametrize("name", OURS)
def test_a_prompt_may_be_called_anything(name: str) -> None:
    (found,) = prepare([{name: "w1 w2"}], prompt_column=name)
    assert found == prepare([{"prompt": "w1 w2"}])[0]


@pytest.fixture
def trainer(saved_model: Callable[..., str], tmp_path: Path) -> Callable[..., TSDKDTrainer]:
    def make(rows: Dataset, **others: Any) -> TSDKDTrainer:
        options = {"max_completion_length": 4, "per_device_eval_batch_size": 4, "max_steps": 1}
        args = TSDKDConfig(str(tmp_path / "out"), **QUIET, **options)
        return TSDKDTrainer(
            saved_model("qwen3", 0), saved_model("qwen3", 1), args, train_dataset=rows, eval_dataset=rows, **others
        )

    return make


def test_token_ids_of_a_file_are_not_trained_on(trainer: Callable[..., TSDKDTrainer]) -> None:
    plain = Dataset.from_list(make_rows(4))
    ours = {"index": 0, "prompt_ids": [9, 9], "completion_ids": [9], "limit": 2**31}
    expected, found = trainer(plain), trainer(plain.map(lambda row: ours))
    assert found.train_dataset.to_list() == expected.train_dataset.to_list()
    assert found.eval_dataset.to_list() == expected.eval_dataset.to_list()
    assert found.evaluate(plain.map(lambda row: ours))["eval_loss"] == expected.evaluate(plain)["eval_loss"]


def test_what_a_trainer_prepared_can_be_evaluated_on(trainer: Callable[..., TSDKDTrainer]) -> None:
    """Whole, in part, and by name, as with transformers' `Trainer`."""
    rows = Dataset.from_list(make_rows(4))
    made = trainer(rows)
    loss = made.evaluate()["eval_loss"]
    assert made.evaluate(made.eval_dataset)["eval_loss"] == loss
    assert (
        made.evaluate(made.eval_dataset.select(range(2)))["eval_loss"]
        == made.evaluate(rows.select([0, 1]))["eval_loss"]
    )
    found = made.evaluate(DatasetDict(a=rows, b=made.eval_dataset))
    assert found["eval_a_loss"] == found["eval_b_loss"] == loss


def test_dry_run_shows_what_is_trained_on(
    saved_model: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "w1 w2", "prompt_ids": [8, 8, 8], "limit": 10**9}])
    paths = {"model_name_or_path": saved_model("qwen3", 0), "teacher_model_name_or_path": saved_model("qwen3", 1)}
    run = flags(**paths, dataset_name=data, output_dir=tmp_path / "out", max_completion_length=4, **QUIET)
    assert main(["train", "--dry_run", *run]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.endswith(": <user> w1 w2 <assistant>") and "at most 4 per step" in printed


# Files

FILES: dict[str, Callable[[Path], Any]] = {
    "deep lists": lambda path: path.write_text('{"prompt": ' + "[" * 200_000 + "]" * 200_000 + "}\n"),
    "deep mappings": lambda path: path.write_text('{"prompt": ' + '{"]": ' * 200_000 + "1" + "}" * 200_001 + "\n"),
    "deep in a later row": lambda path: path.write_text('{"prompt": "\\"["}\n' + '{"prompt": ' + "[" * 200_000),
    "deep, compressed": lambda path: path.write_bytes(gzip.compress(b'{"prompt": ' + b"[" * 200_000 + b"]" * 200_000)),
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("place", ["rows.jsonl", "rows.json", "folder/train.jsonl", "folder/train.jsonl.gz"])
@pytest.mark.parametrize("kind", FILES)
def test_files_that_readers_crash_on_or_wait_for(kind: str, place: str, tmp_path: Path) -> None:
    """pyarrow ends the process where JSON is nested deeply."""
    (tmp_path / "folder").mkdir()
    FILES[kind](tmp_path / place)
    name = str(tmp_path / place.split("/")[0])
    with pytest.raises(DataError, match=rf"^dataset_name: .*{name}") as caught:
        load_split(name, None, "train")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "files",
    [
        "{}/secret.txt",
        "file://{}/secret.txt",
        "local://{}/secret.txt",
        "local://{}/folder/../secret.txt",
        "../secret.txt",
        "gzip://x::{}/secret.txt",
        "gzip://x::local://{}/secret.txt",
    ],
)
def test_a_card_names_files_of_its_folder(files: str, tmp_path: Path) -> None:
    """Somebody's files must not become prompts."""
    (tmp_path / "secret.txt").write_text("mine\n")
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [{"prompt": "w1"}])
    card = yaml.safe_dump({"configs": [{"config_name": "default", "data_files": files.format(tmp_path)}]})
    (folder / "README.md").write_text(f"---\n{card}---\n")
    with pytest.raises(DataError, match=r"^dataset_name: "):
        load_split(str(folder), None, "train")
    (folder / "README.md").write_text(f"---\n{card.replace(files.format(tmp_path), 'train.jsonl')}---\n")
    assert load_split(str(folder), None, "train")["prompt"] == ["w1"]


@pytest.mark.parametrize("feature", [Image(), List(Image()), {"a": Image()}])
def test_columns_that_open_files_are_left_out(feature: Any, tmp_path: Path) -> None:
    """A value names a file, and a pipe would hang the run."""
    value = {"bytes": None, "path": str(tmp_path / "pipe")}
    os.mkfifo(tmp_path / "pipe")
    value = [value] if isinstance(feature, List) else {"a": value} if isinstance(feature, dict) else value
    features = Features({"prompt": Value("string"), "answer": feature})
    table = Dataset.from_dict({"prompt": ["w1"]}).add_column("answer", [value]).data.table
    table = table.cast(features.arrow_schema).replace_schema_metadata(features.arrow_schema.metadata)
    pq.write_table(table, tmp_path / "rows.parquet")
    assert load_split(str(tmp_path / "rows.parquet"), None, "train").column_names == ["prompt"]


@pytest.mark.parametrize("rows", [{f"c{i}": 1 for i in range(300)}, {"c" * 90_000: 1}, {"image": None}])
@pytest.mark.parametrize("column", [None, "question"])
def test_a_message_lists_few_columns(rows: dict[str, Any], column: str | None) -> None:
    with pytest.raises(DataError, match="no column") as caught:
        prepare([rows], prompt_column=column)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["json", "csv", "text"])
def test_a_folder_may_be_called_as_a_reader(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).mkdir()
    write_jsonl(tmp_path / name / "train.jsonl", [{"prompt": "w1"}])
    monkeypatch.chdir(tmp_path)
    assert load_split(name, None, "train")["prompt"] == ["w1"]


def test_brackets_in_texts_are_no_levels(tmp_path: Path) -> None:
    texts = ["[" * 5000, '\\"{' * 500, "\\frac{a}{b" * 300, '"' + "[{" * 500]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": text} for text in texts])
    assert load_split(path, None, "train")["prompt"] == texts


# Templates

ENDLESS = {
    "a loop in a loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a loop that writes": "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "a power": "{{ 10 ** (10 ** 9) }}",
    "a constant": "{{ 10 ** (10 ** 9) > 1 }}",
    "a library's text": "{{ lipsum(n=10 ** 9) }}",
}
GREEDY = {
    "a long string": "{{ 'a' * 10 ** 10 }}",
    "a long list": "{{ [1] * 10 ** 10 }}",
    "doubling": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "padding": "{{ '%9999999999d' % 5 }}",
}
REFUSED = {
    "long text": "{{ 'a' * 10 ** 7 }}",
    "nested parentheses": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "nested conditions": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "nested signs": "{{ " + "-" * 5000 + "1 }}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "an exception": "{{ raise_exception('no\nsystem role') }}",
    "no template": "{% for %}",
    "another type": 5,
}


@pytest.mark.parametrize("name", [*ENDLESS, *GREEDY, *REFUSED])
def test_a_template_is_bounded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.3 if name in ENDLESS else 600.0)
    if name in GREEDY:
        monkeypatch.setattr(chat_template, "MAX_MEMORY", 2**28)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = {**ENDLESS, **GREEDY, **REFUSED}[name]
    with pytest.raises(DataError, match=r"^row 0: the chat template ") as caught:
        prepare([{"prompt": "w1"}], tokenizer)
    message = str(caught.value)
    assert len(message) < 400 and "\n" not in message
    assert ("0.3 seconds" in message) == (name in ENDLESS) and ("GiB" in message) == (name in GREEDY)
    tokenizer.chat_template = None
    assert prepare([{"prompt": "w1"}], tokenizer)[0]["prompt_ids"] == [5], "nothing is left bounded"


def test_the_bound_is_a_decorator_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """How the evaluation harness's own rendering is bounded."""
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.1)

    def spin() -> None:
        while True:
            pass

    with pytest.raises(DataError, match=r"0\.1 seconds"):
        limit_template()(spin)()


TEMPLATES = [
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}<assistant> ",
    "{{ bos_token }}{{ messages[-1]['content'] }}{{ eos_token }}",
    "  {{ messages[0]['content'] }}\n\n<pad><eos> w3<eos>w4 ",
    "",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_rendering_and_tokenizing_apart_gives_the_same_ids(template: str) -> None:
    rng = random.Random(template)
    for adds_special_tokens in (False, True):
        tokenizer = build_tokenizer()
        if adds_special_tokens:
            special = [("<eos>", 1), ("<pad>", 0)]
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single="<eos> $A <pad>", special_tokens=special
            )
        tokenizer.chat_template = template
        tokenizer.bos_token = "<user>"
        for _ in range(20):
            words = [*WORDS, "<eos>", "<pad>", "\n", "  ", "é"]
            messages = [
                {"role": rng.choice(["user", "system"]), "content": " ".join(rng.choices(words, k=rng.randint(1, 9)))}
                for _ in range(rng.randint(1, 4))
            ]
            ids = tokenizer(render_prompt(tokenizer, messages), add_special_tokens=False)["input_ids"]
            assert ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
