"""Files that `tsdkd generate` and `tsdkd eval` append to: what isn't wholly theirs is refused, and never changed."""

import json
import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import flags, make_rows, write_jsonl
from tsdkd.cli import main
from tsdkd.errors import OutputDirError
from tsdkd.evaluation.items import ItemResult, ItemResults
from tsdkd.files import hold_file, open_for_append

COMMON = {"use_cpu": "true", "bf16": "false", "gradient_checkpointing": "false", "disable_tqdm": "true", "seed": 3}
COMMON |= {"max_length": 64, "max_new_tokens": 4, "report_to": "none"}
Generate = Callable[..., tuple[int, str]]


@pytest.fixture
def generate(saved_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Generate:
    """`tsdkd generate` for six prompts: exit code and error output."""
    data = write_jsonl(tmp_path / "rows.jsonl", make_rows(6))
    models = {"model_name_or_path": saved_model("qwen3", 0), "teacher_model_name_or_path": saved_model("qwen3", 1)}

    def call(output: Path | str, **values: object) -> tuple[int, str]:
        capsys.readouterr()
        code = main(
            ["generate", *flags(**{**models, "dataset_name": data, **COMMON, "output_file": output, **values})]
        )
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tsdkd generate: ")]
        return code, "\n".join(errors)

    return call


@pytest.fixture
def written(generate: Generate, tmp_path: Path) -> list[bytes]:
    """The lines of a whole file."""
    assert generate(tmp_path / "whole.jsonl")[0] == 0
    return (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)


FOREIGN: dict[str, Callable[[list[bytes]], bytes]] = {
    # name -> content, of the lines of a whole file
    "one line without an end": lambda ours: b'{"prompt": "mine"}',
    "one line, cut off": lambda ours: b'{"prompt": "mi',
    "one of ours, cut off": lambda ours: ours[0][:40],
    "an opening bracket": lambda ours: b"{",
    "an empty line": lambda ours: b"\n",
    "an empty line among ours": lambda ours: ours[0] + b"\n" + ours[1],
    "empty Windows lines": lambda ours: b"\r\n\r\n",
    "notes after ours": lambda ours: ours[0] + b"my notes",
    "JSON after ours": lambda ours: ours[0] + b'{"prompt": "mine"}',
    "other lines, the last cut off": lambda ours: b'{"prompt": "mine"}\n' * 3 + ours[0][:40],
    "NUL": lambda ours: b"\0" * 100,
    "NUL after ours": lambda ours: ours[0] + b"\0" * 100,
    "binary": lambda ours: bytes(range(256)) * 99,
    "UTF-16": lambda ours: ours[0].decode().encode("utf-16"),
    "a million short lines": lambda ours: b"1\n" * 10**6,
    "a long line": lambda ours: b'{"prompt": "' + b"x" * 10**7,
    "deep": lambda ours: b"[" * 10**5 + b"\n",
    "an object without ours": lambda ours: b"{}\n",
    "a list": lambda ours: b"[1]\n",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_is_refused_and_unchanged(
    name: str, generate: Generate, written: list[bytes], tmp_path: Path
) -> None:
    output = tmp_path / "notes.jsonl"
    output.write_bytes(FOREIGN[name](written))
    before, modified = output.read_bytes(), output.stat().st_mtime_ns
    for link in ("itself", "symbolic", "hard"):
        path = output if link == "itself" else tmp_path / link
        if link != "itself":
            (path.symlink_to if link == "symbolic" else path.hardlink_to)(output)
        code, error = generate(path)
        assert code == 2 and len(error.splitlines()) == 1 and "output_file: " in error and path.name in error
        assert output.read_bytes() == before and output.stat().st_mtime_ns == modified


@pytest.mark.parametrize(
    "value", [-1, 6, 10**30, "0", 0.0, True, None, [0], {"a": 1}, float("nan"), float("inf")], ids=str
)
@pytest.mark.parametrize("key", ["index", "sample"])
def test_an_odd_index_is_no_row(
    key: str, value: Any, generate: Generate, written: list[bytes], tmp_path: Path
) -> None:
    """`dataset[-1]` is a row, too."""
    row = json.loads(written[5])
    if key == "sample" and value == 6:
        return  # a file may have more samples than this call asks for
    (tmp_path / "rows2.jsonl").write_text(json.dumps({**row, key: value}) + "\n")
    code, error = generate(tmp_path / "rows2.jsonl")
    assert code == 2 and "line 1 of" in error and "rows2.jsonl" in error and len(error.splitlines()) == 1
    assert (tmp_path / "rows2.jsonl").read_text() == json.dumps({**row, key: value}) + "\n"


OURS: dict[str, Callable[[list[bytes]], bytes]] = {
    "empty": lambda ours: b"",
    "some": lambda ours: b"".join(ours[:3]),
    "the last without its end": lambda ours: b"".join(ours[:3])[:-1],
    "one without its end": lambda ours: ours[0][:-1],
    "the last cut off": lambda ours: b"".join(ours[:3]) + ours[3][:30],
    "the last hardly begun": lambda ours: b"".join(ours[:3]) + ours[3][:1],
    "the last cut off in a character's middle": lambda ours: b"".join(ours[:3]) + ours[3][:12] + b"\xc3",
}


@pytest.mark.parametrize("name", OURS)
def test_a_file_of_ours_is_completed(name: str, generate: Generate, written: list[bytes], tmp_path: Path) -> None:
    output = tmp_path / "part.jsonl"
    output.write_bytes(OURS[name](written))
    assert generate(output)[0] == 0
    assert sorted(output.read_bytes().splitlines(keepends=True)) == sorted(written)


@pytest.mark.parametrize("kind", ["a pipe", "a device", "a folder", "a socket", "a link to a device", "a pipe's link"])
def test_output_goes_into_files_only(kind: str, generate: Generate, tmp_path: Path) -> None:
    path = tmp_path / "o.jsonl"
    with socket.socket(socket.AF_UNIX) as listener:
        if kind == "a socket":
            os.chdir(tmp_path)  # its name must be short
            listener.bind("o.jsonl")
        elif kind == "a folder":
            path.mkdir()
        elif "device" in kind:
            path.symlink_to("/dev/null")
        else:
            os.mkfifo(tmp_path / "pipe")
            path.symlink_to("pipe")
        code, error = generate(path)
    assert code == 2 and len(error.splitlines()) == 1 and "output_file: " in error and "o.jsonl" in error
    with pytest.raises(OutputDirError, match="expected a file"), open_for_append(path):
        pass
    with pytest.raises(OutputDirError, match=r"o\.jsonl"):
        ItemResults(path, {})


def test_two_at_once_are_not_mixed(generate: Generate, tmp_path: Path) -> None:
    """The second is refused, before it loads a model, and the first one's rows stay."""
    output = tmp_path / "o.jsonl"
    with hold_file(output, "output_file"):
        code, error = generate(output)
    assert code == 2 and f"output_file: another process is writing {output}" in error and output.exists()
    assert generate(output)[0] == 0


def test_a_link_to_nothing_is_followed_and_survives(generate: Generate, tmp_path: Path) -> None:
    link, target = tmp_path / "link.jsonl", tmp_path / "target.jsonl"
    link.symlink_to(target)
    assert generate(link, dataset_name="/none.jsonl")[0] == 2
    assert link.is_symlink() and not target.exists()
    assert generate(link)[0] == 0
    assert link.is_symlink() and len(target.read_text().splitlines()) == 6


@pytest.mark.parametrize("column", ["answer", "index", "sample", "model", "seed", "num_tokens", "prompt_suffix"])
def test_columns_of_the_output_hold_one_thing(column: str, generate: Generate, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "named.jsonl", [{column: "w1 w2", "completion": "w3", "prompt": "w4"}])
    for field in ("prompt_column", "completion_column"):
        code, error = generate(tmp_path / "o.jsonl", dataset_name=data, **{field: column})
        assert code == 2 and field in error and repr(column) in error and not (tmp_path / "o.jsonl").exists()
    code, error = generate(tmp_path / "o.jsonl", dataset_name=data, prompt_column="completion")
    assert code == 2 and "completion" in error


@pytest.mark.parametrize("size", [100, 10_000, 10_000_000])
def test_a_write_that_ends_half_way_leaves_no_half_line(size: int, tmp_path: Path) -> None:
    """Here a limit of the file's size, elsewhere a full disk; more than a buffer is one write, too."""
    path = tmp_path / "o.jsonl"
    path.write_bytes(b"whole\n")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_for_append(path) as append:
        append("x" * size + "\n")
    whole = path.read_bytes()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + size // 2, before[1]))
        with pytest.raises(OutputDirError, match="No space left"), open_for_append(path) as append:
            append("y" * size + "\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == whole == b"whole\n" + b"x" * size + b"\n"


# Items of an evaluation

META = {"model": "m", "samples": 2}
ITEM = {"task": "t", "doc_id": 0, "scores": [0.0, 1.0], "responses": ["a", "b"], **META}
ODD_ITEMS: dict[str, bytes] = {
    **{
        f"{key} is {value!r}": json.dumps({**ITEM, key: value}).encode() + b"\n"
        for key, value in [
            ("doc_id", -1),
            ("doc_id", "0"),
            ("doc_id", 0.0),
            ("doc_id", True),
            ("task", 5),
            ("task", None),
            ("scores", [0.0, float("nan")]),
            ("scores", [0.0, 2.0]),
            ("scores", [0.0, "1"]),
            ("scores", [True, False]),
            ("scores", [1.0]),
            ("scores", {"a": 1, "b": 2}),
            ("responses", [5]),
            ("responses", 5),
            ("responses", "ab"),
            ("responses", {"a": 1}),
            ("doc_id", 10**400),
            ("samples", 10**400),
            ("model", [[[]]]),
        ]
    },
    "a foreign line without an end": b'{"mine": 1}',
    "a foreign line, cut off": b'{"task": "m',
    "a line of ours, cut off": json.dumps(ITEM).encode()[:30],
    "notes": json.dumps(ITEM).encode() + b"\nmy notes",
    "an empty line": b"\n",
    "deep": b"[" * 10**5,
    "NUL": b"\0" * 9,
}


@pytest.mark.parametrize("name", ODD_ITEMS)
def test_items_that_are_not_ours_are_refused_and_unchanged(name: str, tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_bytes(ODD_ITEMS[name])
    with pytest.raises(OutputDirError, match=r"items\.jsonl") as caught:
        ItemResults(path, META)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert path.read_bytes() == ODD_ITEMS[name]


@pytest.mark.parametrize("end", [b"", b"\n", b'\n{"task": "t", "do', b"\n{"])
def test_items_of_ours_are_completed(end: bytes, tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_bytes(json.dumps(ITEM).encode() + end)
    items = ItemResults(path, META)
    items.add([ItemResult("t", 1, [0.0, 0.5], ["c", "d"])])
    assert ItemResults(path, META).results.keys() == {("t", 0), ("t", 1)}
    assert len(path.read_text().splitlines()) == 2
