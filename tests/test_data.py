"""Rows in every documented shape -> token ids, lengths and masks."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from conftest import QUIET, TEMPLATE, WORDS, build_tokenizer, flags, make_rows, write_jsonl
from tsdkd import DataError, TSDKDConfig, TSDKDTrainer
from tsdkd.cli import main
from tsdkd.data import collate, completion_mask, load_split, pad_sequences, prepare_dataset

PAD, EOS, USER, ASSISTANT = range(4)
KWARGS_TEMPLATE = TEMPLATE + "{% if thinking is defined %}{{ 'w50' if thinking else 'w51' }} {% endif %}"
Rows = list[dict[str, Any]]


def ids(text: str) -> list[int]:
    """The word-level tokenizer's ids, without the library."""
    special = {"<pad>": PAD, "<eos>": EOS, "<user>": USER, "<assistant>": ASSISTANT}
    return [special.get(word) if word in special else 4 + int(word[1:]) for word in text.split()]


def prepare(rows: Rows, *, tokenizer: Any = None, context: int = 128, needs: bool = False, **options: Any) -> Rows:
    args = TSDKDConfig(output_dir="unused", **QUIET, **options)
    tokenizer = build_tokenizer() if tokenizer is None else tokenizer
    return prepare_dataset(Dataset.from_list(rows), tokenizer, args, context, needs_completion=needs).to_list()


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASKED = "<user> w1 w2 <assistant>"
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    # name -> (row, options, prompt, completion)
    "string": ({"prompt": "w1 w2"}, {}, ASKED, ""),
    "messages as prompt": ({"prompt": [say("user", "w1 w2")]}, {}, ASKED, ""),
    "several turns": (
        {"prompt": [say("user", "w1"), say("assistant", "w2"), say("user", "w3")]},
        {},
        "<user> w1 <assistant> w2 <user> w3 <assistant>",
        "",
    ),
    "messages": ({"messages": [say("user", "w1 w2"), say("assistant", "w3 w4")]}, {}, ASKED, "w3 w4 <eos>"),
    "messages, last assistant turn only": (
        {"messages": [say("user", "w1"), say("assistant", "w2"), say("user", "w3"), say("assistant", "w4")]},
        {},
        "<user> w1 <assistant> w2 <user> w3 <assistant>",
        "w4 <eos>",
    ),
    "messages without an answer": ({"messages": [say("user", "w1 w2")]}, {}, ASKED, ""),
    "prompt and completion": ({"prompt": "w1 w2", "completion": "w3"}, {}, ASKED, "w3 <eos>"),
    "prompt and one assistant message": (
        {"prompt": [say("user", "w1 w2")], "completion": [say("assistant", "w3")]},
        {},
        ASKED,
        "w3 <eos>",
    ),
    "empty completion": ({"prompt": "w1 w2", "completion": ""}, {}, ASKED, "<eos>"),
    "prompt_column": ({"instruction": "w1 w2", "extra": 3}, {"prompt_column": "instruction"}, ASKED, ""),
    "both columns": (
        {"instruction": "w1 w2", "response": "w3", "prompt": "w9", "completion": "w9"},
        {"prompt_column": "instruction", "completion_column": "response"},
        ASKED,
        "w3 <eos>",
    ),
    "prompt wins over messages": ({"prompt": "w1 w2", "messages": [say("user", "w9")]}, {}, ASKED, ""),
    "no template": ({"prompt": "w1 w2", "completion": "w3"}, {"chat_template_source": "none"}, "w1 w2", "w3 <eos>"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_row_shapes(name: str) -> None:
    row, options, prompt, completion = SHAPES[name]
    (got,) = prepare([row], needs=bool(completion), **options)
    assert got["prompt_ids"] == ids(prompt)
    assert got["completion_ids"] == ids(completion)


def test_a_conversation_under_another_name_does_not_put_its_answer_into_the_prompt() -> None:
    """Either it is taken apart, as `messages` is, or it is refused."""
    row = {"conversation": [say("user", "w1 w2"), say("assistant", "w3 w4")]}
    try:
        (got,) = prepare([row], prompt_column="conversation")
    except DataError as error:
        assert "row 0" in str(error) and "assistant" in str(error)
    else:
        assert got["prompt_ids"] == ids(ASKED) and got["completion_ids"] == ids("w3 w4 <eos>")


def test_other_columns_go_and_answer_stays() -> None:
    rows = [{"prompt": "w1", "answer": "7", "source": "x"}, {"prompt": "w2 w3", "answer": "8", "source": "y"}]
    got = prepare(rows)
    assert set(got[0]) == {"index", "prompt_ids", "completion_ids", "limit", "answer"}
    assert [(r["index"], r["answer"]) for r in got] == [(0, "7"), (1, "8")]
    assert "answer" not in prepare([{"prompt": "w1"}])[0]


def test_an_answer_has_another_name() -> None:
    rows = [{"prompt": "w1", "answer": "long", "gold": "7"}, {"prompt": "w2 w3", "answer": "long", "gold": "8"}]
    got = prepare(rows, answer_column="gold")
    assert set(got[0]) == {"index", "prompt_ids", "completion_ids", "limit", "answer"}
    assert [r["answer"] for r in got] == ["7", "8"]
    assert "answer" not in prepare([{"prompt": "w1", "answer": "7"}], answer_column="gold")[0]  # training reads none
    (same,) = prepare([{"prompt": "w1", "gold": "w2"}], answer_column="gold", completion_column="gold")
    assert (same["answer"], same["completion_ids"]) == ("w2", ids("w2 <eos>"))


def test_a_tokenizer_without_a_template_takes_strings_as_they_are() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    assert prepare([{"prompt": "w1 w2"}], tokenizer=tokenizer)[0]["prompt_ids"] == ids("w1 w2")
    with pytest.raises(DataError, match=r"row 0.*template"):
        prepare([{"prompt": [say("user", "w1")]}], tokenizer=tokenizer)


def test_what_the_tokenizer_puts_before_a_text_goes_before_the_prompt_only() -> None:
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<user> $A", special_tokens=[("<user>", USER)]
    )
    (got,) = prepare([{"prompt": "w1", "completion": "w2"}], tokenizer=tokenizer, chat_template_source="none")
    assert (got["prompt_ids"], got["completion_ids"]) == (ids("<user> w1"), ids("w2 <eos>"))


@pytest.mark.parametrize("kwargs", [{"thinking": True}, {"thinking": False}, '{"thinking": false}', None])
def test_chat_template_kwargs_reach_the_template(kwargs: Any) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = KWARGS_TEMPLATE
    (got,) = prepare([{"prompt": "w1 w2"}], tokenizer=tokenizer, chat_template_kwargs=kwargs)
    mark = "" if kwargs is None else " w50" if kwargs == {"thinking": True} else " w51"
    assert got["prompt_ids"] == ids(ASKED + mark)


def test_a_suffix_goes_after_the_question() -> None:
    """Before the chat template; what was there before, completions and answers stay as they are."""
    options = {"prompt_suffix": "w7 w8"}
    for name, (row, other, prompt, completion) in SHAPES.items():
        (got,) = prepare([row], needs=bool(completion), **options, **other)
        expected = (
            f"{prompt} w7 w8" if name == "no template" else f"{prompt.removesuffix('<assistant>')}w7 w8 <assistant>"
        )
        assert (got["prompt_ids"], got["completion_ids"]) == (ids(expected), ids(completion)), name
    spoken = [say("system", "w1"), say("user", "w2"), say("tool", "w3")]
    (got,) = prepare([{"prompt": spoken}], **options)
    assert build_tokenizer().decode(got["prompt_ids"]).split()[2:6] == ["<user>", "w2", "w7", "w8"]
    with pytest.raises(DataError, match=r"row 1.*prompt_suffix"):
        prepare([{"prompt": spoken}, {"prompt": [say("system", "w1")]}], **options)


def test_a_suffix_leaves_less_room() -> None:
    (got,) = prepare([{"prompt": "w1 w2"}], max_length=10, prompt_suffix="w7 w8")
    assert got["limit"] == 4


@pytest.mark.parametrize(
    ("options", "context", "limit"),
    [
        ({"max_new_tokens": 5, "max_length": 100}, 128, 5),  # max_new_tokens binds
        ({"max_new_tokens": 50, "max_length": 7}, 128, 3),  # max_length, the prompt has 4 tokens
        ({"max_new_tokens": 50, "max_length": None}, 10, 6),  # the models' context
        ({"max_new_tokens": 50, "max_length": 100}, 10, 6),
    ],
)
def test_limit_and_truncated_completion(options: dict[str, Any], context: int, limit: int) -> None:
    words = " ".join(WORDS[:20])
    (got,) = prepare([{"prompt": "w1 w2", "completion": words}], context=context, needs=True, **options)
    assert got["limit"] == limit
    assert got["completion_ids"] == ids(words)[:limit]
    (fits,) = prepare([{"prompt": "w1 w2", "completion": "w9 w8"}], context=context, needs=True, **options)
    assert fits["completion_ids"] == ids("w9 w8 <eos>")


def test_prompts_without_room_are_dropped() -> None:
    """A prompt's ids and two of the template: at least one token must be left."""
    rows = [{"prompt": " ".join(["w1"] * n), "answer": str(n)} for n in (3, 9, 5, 6, 4, 40)]
    got = prepare(rows, max_length=8)
    assert [(r["index"], r["limit"], r["answer"]) for r in got] == [(0, 3, "3"), (2, 1, "5"), (4, 2, "4")]


def test_a_completion_is_needed_on_every_row_when_lmbda_is_below_one() -> None:
    rows = [{"prompt": "w1", "completion": "w2"}, {"prompt": "w3", "completion": None}]
    with pytest.raises(DataError, match=r"row 1.*lmbda"):
        prepare(rows, needs=True, lmbda=0.5)
    assert [r["completion_ids"] for r in prepare(rows)] == [ids("w2 <eos>"), []]


def test_eos_as_pad_changes_nothing() -> None:
    rows: Rows = make_rows(8)
    apart, same = prepare(rows), prepare(rows, tokenizer=build_tokenizer(pad_token="<eos>"))
    assert apart == same and all(r["completion_ids"][-1] == EOS for r in apart)
    batches = [pad_sequences(b["prompt_ids"], b["completion_ids"]) for b in (collate(apart), collate(same))]
    assert all(torch.equal(batches[0][key], batches[1][key]) for key in batches[0])
    assert int(completion_mask(batches[1]).sum()) == sum(len(r["completion_ids"]) for r in same)


def test_collate_keeps_lists() -> None:
    batch = collate(prepare([{"prompt": "w1", "answer": "3"}, {"prompt": "w2 w3", "answer": "4"}]))
    assert batch["index"] == [0, 1]
    assert batch["prompt_ids"] == [ids("<user> w1 <assistant>"), ids("<user> w2 w3 <assistant>")]
    assert batch["answer"] == ["3", "4"]


PAIRS: list[tuple[list[int], list[int]]] = [
    ([5, 6, 7], [8, EOS]),
    ([5], [EOS]),  # one token
    ([5, 6], []),  # empty
    ([PAD, 6], [PAD, 8, PAD, PAD, 9, EOS]),  # the pad id in the prompt and in the middle
    ([EOS, EOS], [8, EOS, EOS]),  # eos = pad, inside
    ([5, 6, 7, 8], [9, PAD]),  # cut at its limit, the last token is the pad id
]


@pytest.mark.parametrize("rows", [PAIRS, *([pair] for pair in PAIRS)], ids=lambda rows: str(len(rows)))
def test_padding_and_mask_come_from_lengths(rows: list[tuple[list[int], list[int]]]) -> None:
    prompts, completions = (list(part) for part in zip(*rows, strict=True))
    batch = pad_sequences(prompts, completions)
    mask = completion_mask(batch)
    width = max(len(p) + len(c) for p, c in rows)
    assert batch["input_ids"].shape == (len(rows), width)
    assert mask.shape == (len(rows), width - 1) and mask.dtype == torch.bool
    for i, (prompt, completion) in enumerate(rows):
        length = len(prompt) + len(completion)
        assert batch["input_ids"][i, :length].tolist() == prompt + completion
        expected = list(range(len(prompt) - 1, length - 1))
        assert mask[i].nonzero().flatten().tolist() == expected
        assert batch["input_ids"][i, 1:][mask[i]].tolist() == completion


def write_table(path: Path, rows: Rows) -> str:
    """Write rows in the format of the path's ending."""
    if path.suffix == ".jsonl":
        write_jsonl(path, rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".csv":
        Dataset.from_list(rows).to_csv(str(path))
    else:
        Dataset.from_list(rows).to_parquet(str(path))
    return str(path)


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "parquet"])
def test_file_formats(tmp_path: Path, ending: str) -> None:
    rows: Rows = make_rows(5)
    loaded = load_split(write_table(tmp_path / f"rows.{ending}", rows), None, "train").to_list()
    assert [{**row, "answer": str(row["answer"])} for row in loaded] == rows
    completions = [ids(f"{row['completion']} <eos>") for row in rows]
    assert [row["completion_ids"] for row in prepare(loaded, needs=True)] == completions


@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet"])
def test_file_formats_keep_messages(tmp_path: Path, ending: str) -> None:
    rows: Rows = [{"messages": [say("user", "w1 w2"), say("assistant", "w3")]}] * 2
    loaded = load_split(write_table(tmp_path / f"chats.{ending}", rows), None, "train").to_list()
    assert [(r["prompt_ids"], r["completion_ids"]) for r in prepare(loaded)] == [(ids(ASKED), ids("w3 <eos>"))] * 2


def test_a_folder_has_splits(tmp_path: Path) -> None:
    for split, count in (("train", 4), ("test", 2)):
        write_table(tmp_path / f"{split}.jsonl", make_rows(count))  # type: ignore[arg-type]
    assert [len(load_split(str(tmp_path), None, split)) for split in ("train", "test")] == [4, 2]


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    """The library that reads files caches what it has read."""
    path = tmp_path / "rows.jsonl"
    for text in ("w1", "w2"):
        write_jsonl(path, [{"prompt": text}])
        assert load_split(str(path), None, "train")[0]["prompt"] == text


# The command line

Paths = Callable[..., str]


def dry_run(capsys: pytest.CaptureFixture[str], student: str, teacher: str, data: str, **options: object) -> str:
    """What `tsdkd train --dry_run` prints, line breaks out; nothing may be written."""
    out = Path(data).parent / "never"
    paths = {"model_name_or_path": student, "teacher_model_name_or_path": teacher, "dataset_name": data}
    assert main(["train", "--dry_run", *flags(**paths, output_dir=out, **QUIET, **options)]) == 0
    assert not out.exists()
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("source", "first"),
    [
        ("student", "<user> w1 w2 <assistant>"),
        ("teacher", "w55 w1 w2 w54"),
        ("none", "w1 w2"),
    ],
)
def test_dry_run_shows_the_prompt_of_the_chosen_template(
    source: str, first: str, saved_model: Paths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = Path(shutil.copytree(saved_model("qwen3", 1), tmp_path / "teacher"))
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "w55 {{ messages[0]['content'] }} w54"
    tokenizer.save_pretrained(str(teacher))
    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "w1 w2"}])
    printed = dry_run(capsys, saved_model("qwen3", 0), str(teacher), data, chat_template_source=source)
    assert printed.endswith(f": {first}")


def test_dry_run_shows_the_suffix(saved_model: Paths, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "w1 w2"}])
    printed = dry_run(capsys, saved_model(), saved_model("qwen3", 1), data, prompt_suffix="w7")
    assert printed.endswith(": <user> w1 w2 w7 <assistant>")


def test_dry_run_counts_what_is_dropped(
    saved_model: Paths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": " ".join(["w1"] * n)} for n in (3, 9, 5, 40)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    warnings: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = warnings.append  # type: ignore[method-assign]
    logging.getLogger("tsdkd.data").addHandler(handler)
    try:
        dry_run(capsys, saved_model(), saved_model("qwen3", 1), data, max_length=8)
    finally:
        logging.getLogger("tsdkd.data").removeHandler(handler)
    (warning,) = [record.getMessage() for record in warnings]
    assert "2 of 4" in warning and "dropped" in warning


MISSING: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    # name -> (training row, options, what the line says; an evaluation row is {"prompt": "w1", "answer": "3"})
    "misspelt": (
        {"prompt": "w1", "quest": "w1"},
        {"prompt_column": "quests"},
        "prompt_column: dataset_name rows.jsonl has no column 'quests'; it has 'prompt', 'quest'; "
        "did you mean 'quest'?",
    ),
    "usual name": (
        {"query": "w1", "n": 1},
        {"prompt_column": "text"},
        "prompt_column: dataset_name rows.jsonl has no column 'text'; it has 'query', 'n'; did you mean 'query'?",
    ),
    "nothing to guess": (
        {"prompt": "w1", "x": "w1"},
        {"completion_column": "reply"},
        "completion_column: dataset_name rows.jsonl has no column 'reply'; it has 'prompt', 'x'",
    ),
    "no prompt": (
        {"problem": "w1"},
        {},
        "prompt_column: dataset_name rows.jsonl has no column 'prompt' or 'messages'; it has 'problem'; "
        "set prompt_column; did you mean 'problem'?",
    ),
    "of the evaluation": (
        {"problem": "w1", "prompt": "w1"},
        {"prompt_column": "problem", "eval_strategy": "steps", "eval_steps": 1},
        "prompt_column: eval_dataset_name held_out.jsonl has no column 'problem'; it has 'prompt', 'answer'; "
        "did you mean 'prompt'?",
    ),
    "answers of the evaluation": (
        {"prompt": "w1"},
        {"answer_column": "gold", "eval_strategy": "steps", "eval_steps": 1},
        "answer_column: eval_dataset_name held_out.jsonl has no column 'gold'; it has 'prompt', 'answer'; "
        "did you mean 'answer'?",
    ),
    "a name that writes to the terminal": (
        {"prompt": "w1"},
        {"prompt_column": "a\x1b[2J"},
        "prompt_column: dataset_name rows.jsonl has no column 'a\\x1b[2J'; it has 'prompt'; did you mean 'prompt'?",
    ),
}


@pytest.mark.parametrize("name", MISSING)
@pytest.mark.parametrize("command", ["train", "dry run", "generate"])
def test_a_missing_column_is_told_with_its_data_set(
    command: str,
    name: str,
    saved_model: Paths,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    row, options, line = MISSING[name]
    write_jsonl(tmp_path / "rows.jsonl", [row])
    write_jsonl(tmp_path / "held_out.jsonl", [{"prompt": "w1", "answer": "3"}])
    paths = {"model_name_or_path": saved_model("qwen3", 0), "teacher_model_name_or_path": saved_model("qwen3", 1)}
    paths |= {"dataset_name": "rows.jsonl", "eval_dataset_name": "held_out.jsonl"}
    argv = {"train": ["train", "--output_dir=out"], "dry run": ["train", "--dry_run", "--output_dir=out"]}
    argv |= {"generate": ["generate", "--output_file=out.jsonl"]}
    assert main([*argv[command], *flags(**paths, **{**QUIET, **options})]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"tsdkd {argv[command][0]}: {line}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["held_out.jsonl", "rows.jsonl"]


def test_a_missing_column_in_python(saved_model: Paths, tmp_path: Path) -> None:
    rows = {name: Dataset.from_list([{column: "w1"}]) for name, column in (("train", "prompt"), ("eval", "question"))}
    with pytest.raises(DataError, match="prompt_column: eval_dataset has no column 'prompt' or 'messages'"):
        TSDKDTrainer(
            saved_model("qwen3", 0),
            saved_model("qwen3", 1),
            TSDKDConfig(str(tmp_path), **QUIET),
            train_dataset=rows["train"],
            eval_dataset=rows["eval"],
        )
