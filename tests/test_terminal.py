"""What strangers wrote reaches a terminal as text: nothing steers it, forges a line, or fails to print."""

import io
import logging
import re
import sys
import unicodedata
import warnings
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from conftest import QUIET, build_model, build_tokenizer, flags, write_jsonl
from tsdkd.cli import main
from tsdkd.cli.logs import log_to_streams
from tsdkd.config.console import PlainConsole
from tsdkd.errors import DataError, escape_controls, escape_line

HOSTILE = [
    "\x1b[31m",
    "\x1b]0;title\x07",
    "\x9b2J",
    "a\x85b",
    "a\rb",
    "a\x08\x08",
    "\x7f",
    "\u202eevil",
    "\u2066x",
    "\u2028",
]
WORDS = [text for text in HOSTILE if len(text.split()) == 1 and text.split()[0] == text]
_BIDI = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def steers(character: str) -> bool:
    """By Unicode's own tables, not by tsdkd's."""
    is_control = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") and character not in "\n\t"
    return is_control or unicodedata.bidirectional(character) in _BIDI


def assert_harmless(text: str) -> None:
    found = [c for c in text if steers(c)]
    assert not found, ascii(found[:5])


def test_every_character_that_steers_is_escaped() -> None:
    """And no other one but the marks of direction."""
    marks = "\u061c\u200e\u200f"
    for character in map(chr, range(0x11000)):
        shown = escape_controls(character)
        assert (shown != character) == (steers(character) or character in marks), ascii(character)
        assert shown == character or (shown.isascii() and shown.isprintable())
    assert escape_controls("\x1b[2J\u202e\udc80\r") == r"\x1b[2J\u202e\udc80\r"
    assert escape_line("a\nb\tc") == r"a\nb\tc" and escape_controls("a\nb\tc") == "a\nb\tc"


@pytest.mark.parametrize("text", [*HOSTILE, "\udc9b", "x\ntsdkd report: saved the student"])
@pytest.mark.parametrize(
    "command",
    [
        ["report", "{}"],
        ["analyze", "{}"],
        ["analyze", "x", "--{}"],
        ["compare", "--config", "{}"],
        ["train", "--config", "{}"],
        ["eval", "a", "--suite", "demo", "--data_dir", "{}"],
        ["eval", "{}=b", "--suite", "demo"],
        ["configs", "{}"],
        ["demo", "--method", "{}"],
    ],
)
def test_arguments_that_are_quoted(
    command: list[str], text: str, capsys: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code: Any = main([word.format(text) for word in command])
    except SystemExit as stop:  # argparse's
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2
    assert_harmless(out + err)
    assert not any(line.startswith("tsdkd report: saved") for line in err.splitlines())


def test_prompts_names_and_completions(tmp_path: Path, capfd: Any) -> None:
    """Of a dry run's table, a first prompt, and TRL's table of completions; the model knows nothing but such words."""
    words = [f"{word}{i}" for i in range(8) for word in WORDS][:56]
    rows = [{"prompt": " ".join(words[i : i + 4])} for i in range(8)]
    for name, seed in (("\x1b[5mstudent", 0), ("teacher[/red]\nmethod gkd", 1)):
        build_model("qwen3", seed).save_pretrained(tmp_path / name)
        build_tokenizer(words=words).save_pretrained(tmp_path / name)
    values = {**QUIET, "dataset_name": write_jsonl(tmp_path / "rows\x9b.jsonl", rows), "run_name": "[bold]\x1b[1m"}
    values |= {"model_name_or_path": tmp_path / "\x1b[5mstudent", "max_steps": 1, "max_new_tokens": 6}
    values |= {"teacher_model_name_or_path": tmp_path / "teacher[/red]\nmethod gkd", "log_completions": True}
    values |= {"per_device_train_batch_size": 4, "logging_steps": 1, "disable_tqdm": True}
    command = ["train", *flags(**values, output_dir=tmp_path / "out\u202e")]
    assert main([*command, "--dry_run"]) == 0
    out = capfd.readouterr().out
    assert_harmless(out)
    assert "first prompt" in out and r"\x1b[31m0" in out and "[bold]" in out and "[/red]" in out
    assert main(command) == 0
    out = capfd.readouterr().out
    assert_harmless(out)
    assert "Completion" in out and re.search(r"\\x1b|\\x9b|\\u202e|\\x7f|\\x08", out)


@pytest.mark.parametrize("text", HOSTILE)
def test_logs_and_warnings(text: str, capsys: Any) -> None:
    """tsdkd's, another library's and Python's; with an exception too."""
    with log_to_streams():
        library, handler = logging.getLogger("somebody"), logging.StreamHandler(sys.stderr)
        library.addHandler(handler)
        logging.getLogger("tsdkd.x").warning("left out: %s", f"{text}\nforged")
        library.warning("%s", text)
        try:
            raise ValueError(text)
        except ValueError:
            logging.getLogger("tsdkd.x").exception("failed")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            sys.stderr.write(warnings.formatwarning(text, UserWarning, f"file{text}", 1, text))
        library.removeHandler(handler)
    err = capsys.readouterr().err
    assert_harmless(err)
    assert "forged" not in err.splitlines()


def test_afterwards_logging_is_as_before() -> None:
    before = (logging.getLogRecordFactory(), warnings.formatwarning, getattr(sys.stdout, "errors", None))
    with log_to_streams():
        pass
    assert before == (logging.getLogRecordFactory(), warnings.formatwarning, getattr(sys.stdout, "errors", None))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_terminals_that_lack_characters(encoding: str, monkeypatch: Any) -> None:
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding=encoding))
    assert main(["methods"]) == 0
    with log_to_streams():
        logging.getLogger("tsdkd.x").info("漢字 ± \udc80 é")
        table = Table("漢字", title="±")
        table.add_row("\udc80 é")
        PlainConsole().print(table)
    sys.stdout.flush()
    assert b"tsd-kd" in buffer.getvalue() and rb"\u6f22" in buffer.getvalue()


@pytest.mark.parametrize("text", ["[red]", "[/]", "[/bold]", "[link=x]y[/link]", ":smile:", "[", "\\[red]", *HOSTILE])
def test_rich_prints_texts_as_they_are(text: str) -> None:
    file = io.StringIO()
    table = Table("a", title=text, caption=text)
    table.add_column(text)
    table.add_row(text, text)
    console = PlainConsole(file=file, force_terminal=True, color_system=None, width=100)
    console.print(table)
    console.print(text, f"{text}!")
    assert_harmless(file.getvalue())
    assert file.getvalue().count(escape_line(text)[:5]) >= 5


def test_an_error_is_its_lines() -> None:
    assert DataError("a\nb").lines == ["a\nb"]
