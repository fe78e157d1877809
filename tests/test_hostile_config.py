"""Configurations that strangers wrote: YAML and JSON of any kind, and values that child processes read unchanged."""

import json
import os
import re
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import QUIET
from tsdkd.cli import main
from tsdkd.compare.config import read_comparison
from tsdkd.errors import ConfigError, DataError
from tsdkd.run.output_dir import read_run_config

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command line in an empty folder: exit code and error output."""
    monkeypatch.chdir(tmp_path)

    def call(*argv: str) -> tuple[int, str]:
        capsys.readouterr()
        return main(argv), capsys.readouterr().err

    return call


def bomb(merge: bool = False) -> str:
    """Ten levels, each ten times the one before."""
    lines = ["a0: &a0 {x: y}"]
    for i in range(1, 11):
        ten = ", ".join([f"*a{i - 1}"] * 10)
        lines.append(f"a{i}: &a{i} {{<<: [{ten}], k{i}: 1}}" if merge else f"a{i}: &a{i} [{ten}]")
    return "\n".join(lines)


YAMLS: dict[str, tuple[str | bytes, str]] = {
    # name -> (content, what the line says)
    "alias bomb": (bomb(), "aliases"),
    "merge bomb": (bomb(merge=True), "aliases"),
    "a long text, often": (f"a: &a {'x' * 90_000}\nb: [*a, *a, *a, *a]", "aliases"),
    "a chain of aliases": ("a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 3000)), "levels"),
    "an alias in itself": ("a: &a [1, *a]", "contains it"),
    "a merge of itself": ("a: &a\n  <<: *a", "contains it"),
    "3,000 lists": ("a: " + "[" * 3000 + "]" * 3000, "levels"),
    "3,000 mappings": ("a: " + "{a: " * 3000 + "1" + "}" * 3000, "levels"),
    "3,000 dashes": ("- " * 3000 + "x", "levels"),
    "3,000 keys in keys": ("? " * 3000 + "x", "levels"),
    "too large": ("a: x\n" * 100_000, "larger"),
    "a long number": (f"a: {'9' * 5000}", "number"),
    "10^400": (f"a: 1{'0' * 400}", "number"),
    "hexadecimal": (f"a: 0x{'f' * 5000}", "number"),
    "65 bits": (f"a: {2**64}", "64 bits"),
    "base 60": (f"a: 1{':59' * 60_000}", "number"),
    "a fraction of base 60": (f"a: 1{':59' * 5_000}.5", "number"),
    "a word that says it is a number": ("a: !!int word", "int"),
    "nothing that says it is a number": ("a: !!int ''", "int"),
    "a word that says it is true": ("a: !!bool word", "bool"),
    "binary": ("a: !!binary aGk=", "binary"),
    "a set": ("a: !!set {x, y}", "set"),
    "an ordered mapping": ("a: !!omap [x: 1]", "omap"),
    "python": ("a: !!python/object/apply:os.getcwd []", "python"),
    "python by another prefix": ("%TAG ! tag:yaml.org,2002:python/\n---\na: !name:os.system x", "python"),
    "a tag of one's own": ("a: !mine x", "mine"),
    "a tab": ("a:\n\tb: 1", "YAML"),
    "NUL": ("a: x\0", "YAML"),
    "an escaped NUL": ('a: "x\\0"', "lone surrogate"),
    "half a character": ('a: "\\ud800"', "lone surrogate"),
    "UTF-16": ("a: 1".encode("utf-16"), "UTF-8"),
    "Latin-1": (b"a: \xe9", "UTF-8"),
    "a key twice": ("a: 1\nb: 2\n'a': 3", "duplicate key"),
    "a key twice, below": ("a: {b: 1, b: 2}", "duplicate key"),
    "a list as a key": ("? [a]\n: 1", "key"),
    "a long key": (f"? {'k' * 5000}\n: 1", "key"),
    "two documents": ("a: 1\n---\nb: 2", "document"),
}


@pytest.mark.parametrize("name", YAMLS)
def test_yaml_that_is_no_configuration(name: str, run: Run, tmp_path: Path) -> None:
    """Wherever YAML is read: one line, nothing written, in bounded time and memory."""
    content, said = YAMLS[name]
    file = tmp_path / "tsdkd_config.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = resource.getrusage(resource.RUSAGE_SELF)
    for command in ("train", "compare"):
        code, error = run(command, "--config", file.name)
        assert code == 2 and len(error.splitlines()) == 1 and len(error) < 1000, error
        assert error.startswith(f"tsdkd {command}: --config: tsdkd_config.yaml can't be read: ") and said in error
    code, error = run("train", "--config", "demo", "--accelerate_config", file.name, "--output_dir", "out")
    assert code == 2 and "accelerate_config: " in error and said in error
    with pytest.raises(DataError, match=re.escape(said)):
        read_run_config(tmp_path)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime - before.ru_utime < 20 and after.ru_maxrss - before.ru_maxrss < 2**19  # s, KiB
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_yaml_as_people_write_it(run: Run, tmp_path: Path) -> None:
    """Anchors, merges, a byte order mark, Windows' line ends; what looks like a date is the text that it is."""
    text = (
        "\ufeffname: 2026-01-02\r\nbase: &base {a: 1, b: [x]}\r\nmore: {<<: *base, a: 2}\r\n7: yes\r\nsame: *base\r\n"
    )
    (tmp_path / "tsdkd_config.yaml").write_bytes(text.encode())
    base = {"a": 1, "b": ["x"]}
    expected = {"name": "2026-01-02", "base": base, "more": {**base, "a": 2}, "7": True, "same": base}
    assert read_run_config(tmp_path) == expected


@pytest.mark.parametrize("kind", ["a pipe", "a device", "a folder", "a link to a device", "a link to nothing"])
def test_only_files_are_read(kind: str, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    makers: dict[str, Callable[[], Any]] = {
        "a pipe": lambda: os.mkfifo(path),
        "a device": lambda: path.symlink_to("/dev/zero"),
        "a link to a device": lambda: (path.with_suffix(".2").symlink_to("/dev/full"), path.symlink_to("file.2")),
        "a folder": path.mkdir,
        "a link to nothing": lambda: path.symlink_to("nothing"),
    }
    makers[kind]()
    for argv in (["train"], ["compare"], ["plan"], ["generate", "--output_file", "rows.jsonl"]):
        code, error = run(argv[0], "--config", "file.yaml", *argv[1:])
        assert code == 2 and len(error.splitlines()) == 1 and "file.yaml" in error
        assert kind.rpartition(" ")[2] in error or "no file" in error or "no such file" in error
    code, error = run("train", "--config", "demo", "--output_dir", "out", "--accelerate_config", "file.yaml")
    assert code == 2 and "accelerate_config" in error
    code, error = run("train", "--config", "demo", "--output_dir", "out", "--dataset_name", "file.yaml")
    assert code == 2 and "dataset_name" in error


NESTED: dict[str, tuple[Any, str]] = {
    "NaN": ({"a": [1, float("nan")]}, "finite"),
    "infinity": ({"a": {"b": float("-inf")}}, "finite"),
    "a long number": ('{"a": ' + "9" * 4000 + "}", "64 bits"),
    "a longer number": ('{"a": ' + "9" * 5000 + "}", "limit"),
    "deep": ('{"a":' * 60 + "1" + "}" * 60, "levels"),
    "deeper": ('{"a":' * 5000 + "1" + "}" * 5000, "levels"),
    "lists": ('{"a":' + "[" * 5000 + "]" * 5000 + "}", "levels"),
    "unfinished": ('{"a":' * 5000, ""),
    "a key twice": ('{"a": 1, "a": 2}', "twice"),
    "NUL": ('{"a": "\\u0000"}', "text"),
    "half a character": ('{"\\ud800": 1}', "text"),
}
DICT_OPTIONS = ["chat_template_kwargs", "model_init_kwargs", "teacher_model_init_kwargs", "lr_scheduler_kwargs"]


@pytest.mark.parametrize("name", NESTED)
def test_mappings_hold_plain_values(name: str, run: Run, tmp_path: Path) -> None:
    value, said = NESTED[name]
    for key in DICT_OPTIONS:
        if not isinstance(value, str):
            (tmp_path / "run.yaml").write_text(yaml.safe_dump({key: value}))
            _, error = run("train", "--config", "run.yaml")
            assert [line for line in error.splitlines() if f"{key}: " in line and said in line], error
        text = value if isinstance(value, str) else json.dumps(value)
        code, error = run("train", "--config", "demo", "--output_dir", "out", f"--{key}={text}")
        (line,) = error.splitlines()
        assert code == 2 and line.startswith(f"tsdkd train: {key}: ") and said in line and len(line) < 500


@pytest.mark.parametrize("value", ["9" * 5000, "9" * 40, "1e400", "nan", "-inf", "x" * 100_000, "\udcff"])
def test_numbers_and_texts_without_a_measure(value: str, run: Run) -> None:
    for key in ("max_steps", "learning_rate", "warmup_steps", "dataloader_num_workers", "run_name"):
        if (key == "run_name" and value != "\udcff") or (
            key in ("learning_rate", "warmup_steps") and value == "9" * 40
        ):
            continue
        code, error = run("train", "--config", "demo", "--output_dir", "out", f"--{key}={value}")
        assert code == 2 and len(error.splitlines()) == 1 and f"{key}: " in error and len(error) < 1000


def test_ten_thousand_unknown_keys(run: Run, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("".join(f"learnin_rate{i}: 1\n" for i in range(10_000)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    code, error = run("train", "--config", "run.yaml")
    assert code == 2 and "9950 more unknown keys" in error and len(error.splitlines()) < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - before < 20  # seconds


@pytest.mark.parametrize(
    "values", ["num_processes: word", "num_machines: [2]", "machine_rank: -1", "main_process_port: 1.5", "- 1", "x"]
)
def test_launch_configurations_have_numbers(values: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "launch.yaml").write_text(f"{values}\n")
    code, error = run("train", "--config", "demo", "--output_dir", "out", "--accelerate_config", "launch.yaml")
    assert code == 2 and len(error.splitlines()) == 1 and "accelerate_config: launch.yaml" in error


@pytest.mark.parametrize("content", ["[" * 9000, "{", None], ids=["deep", "broken", "a pipe"])
def test_deepspeed_s_own_file(content: str | None, run: Run, tmp_path: Path) -> None:
    (tmp_path / "launch.yaml").write_text("deepspeed_config: {deepspeed_config_file: zero.json}\n")
    if content is None:
        os.mkfifo("zero.json")
    else:
        (tmp_path / "zero.json").write_text(content)
    for command in ("train", "plan"):
        code, error = run(command, "--config", "demo", "--output_dir", "out", "--accelerate_config", "launch.yaml")
        assert code == 2 and len(error.splitlines()) == 1 and "accelerate_config: launch.yaml: zero.json" in error


# What a child process reads

BASE = {
    "model_name_or_path": "student",
    "teacher_model_name_or_path": "teacher",
    "dataset_name": "rows.jsonl",
    **QUIET,
}
TEXTS = [
    "--trust_remote_code=true",
    "-h",
    "--",
    "",
    "true",
    "null",
    "1e5",
    "[1]",
    "{}",
    "~",
    "a\nb",
    " a ",
    "a=b",
    "--a-b",
]
TEXTS += ["--gate false", "$(touch x)", "`touch x`", "'\"", "%x", "é", "2026-01-02", "0777", "--output_dir=elsewhere"]


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """What `tsdkd train` would train with, of a comparison's only run; None if the comparison is refused."""
    seen: list[Any] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tsdkd.run.train.train", seen.append)
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))

    def call(values: dict[str, Any], **others: Any) -> Any:
        file = {"config": "base.yaml", "output_dir": "out", "seeds": [3], "runs": {"a": values}, **others}
        (tmp_path / "comparison.yaml").write_text(yaml.safe_dump(file))
        try:
            comparison = read_comparison("comparison.yaml")
        except ConfigError as error:
            assert any(name in str(error) for name in values), error
            return None
        assert main(["train", f"--config={comparison.config}", *comparison.train_flags(comparison.tasks[-1])]) == 0
        return seen.pop().explicit_values

    return call


@pytest.mark.parametrize("key", ["run_name", "prompt_suffix", "hub_model_id", "model_revision"])
def test_a_child_reads_the_text_that_is_meant(key: str, received: Callable[..., Any]) -> None:
    for text in TEXTS:
        values = received({key: text})
        assert values is not None and values[key] in (
            [None, text] if text == "null" else [text]
        )  # None: as in a run's file
        assert values["output_dir"] == "out/a/seed-3" and values["seed"] == 3 and "trust_remote_code" not in values


@pytest.mark.parametrize(
    "texts", [["a", text] for text in TEXTS] + [[text] for text in TEXTS] + [[], ["a", None], [[1]]]
)
def test_a_child_reads_the_list_that_is_meant_or_it_is_refused(texts: list[Any], received: Callable[..., Any]) -> None:
    values = received({"use_peft": True, "lora_target_modules": texts})
    assert values is None or values["lora_target_modules"] == texts
    assert values is not None or not texts or texts[-1] is None or str(texts[-1])[0] in "-[n"


@pytest.mark.parametrize(
    "values",
    [
        {"alpha": 1e-05, "beta": 0.1 + 0.2, "gate": False, "max_steps": -1},
        {"chat_template_kwargs": {"--a": ["-h", None, True, {"b": "\n'"}], "c": 1e300}},
        {"chat_template_kwargs": {}, "lr_scheduler_kwargs": None, "max_length": None},
        {"learning_rate": "5e-6", "save_strategy": False, "eval_strategy": False},
    ],
    ids=str,
)
def test_a_child_reads_values_of_all_types(values: dict[str, Any], received: Callable[..., Any]) -> None:
    found = received(values)
    expected = {"learning_rate": 5e-6, "save_strategy": "no", "eval_strategy": "no"}
    for key, value in values.items():
        assert found[key] == (expected.get(key, value))


@pytest.mark.parametrize(
    "key", ["run_name=--trust_remote_code", "--run_name", "dry_run", "help", "config", "a\nb", "run-name", ""]
)
def test_a_key_is_an_option_or_refused(key: str, received: Callable[..., Any]) -> None:
    assert received({key: "true"}) is None


@pytest.mark.parametrize("name", ["student", "teacher.log", "results.jsonl", "teacher_completions.partial.jsonl"])
def test_a_run_is_not_called_as_a_comparison_s_files(name: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    file = {"config": "base.yaml", "output_dir": "out", "runs": {name: {}}}
    (tmp_path / "comparison.yaml").write_text(yaml.safe_dump(file))
    code, error = run("compare", "--config", "comparison.yaml", "--report")
    assert code == 2 and name in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "many", [{"runs": {f"r{i}": {} for i in range(1500)}}, {"seeds": list(range(20_000))}], ids=["runs", "seeds"]
)
def test_a_comparison_of_thousands(many: dict[str, Any], run: Run, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    file = {"config": "base.yaml", "output_dir": "out", "runs": {"a": {}}, **many}
    (tmp_path / "comparison.yaml").write_text(yaml.safe_dump(file))
    code, error = run("compare", "--config", "comparison.yaml", "--report")
    assert code == 2 and "1000" in error and len(error.splitlines()) == 1


# Job scripts


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], list[list[str]]]]:
    """A script's commands as bash splits them, with stand-ins for SLURM's and tsdkd itself."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("srun", "scontrol", "tsdkd", "rm", "touch"):
        (folder / name).write_text(f'#!/bin/bash\nprintf "%s\\0" {name} "$@" >> "$LOG"; printf "\\n\\0" >> "$LOG"\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    for name in ("SLURM_JOB_NODELIST", "SLURM_NNODES", "SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.setenv(name, "1")

    def split(script: str) -> list[list[str]]:
        (tmp_path / "log").unlink(missing_ok=True)
        subprocess.run(["bash", "-c", script], check=False, capture_output=True)
        return [line.strip("\0").split("\0") for line in (tmp_path / "log").read_text().split("\n\0") if line]

    yield split


@pytest.mark.parametrize(
    "text", [text for text in TEXTS if text not in ("--", "-h")] + ["a\rb", "\udcff", "#SBATCH -p x"]
)
def test_a_job_script_says_what_was_meant(
    text: str, words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**BASE, "output_dir": f"x{text}" if text != "\udcff" else "x"}))
    command = ["slurm", "--config", "run.yaml", "--time", "01:00:00", f"--run_name={text}"]
    if any(bad in text for bad in ("\n", "\r", "\udcff")):
        assert main(command) == 2 and "run_name" in capsys.readouterr().err
        command[-1:] = []
        if text != "\udcff":
            assert main(command) == 2 and "line break" in capsys.readouterr().err
        return
    assert main(command) == 0
    script = capsys.readouterr().out
    head = script.partition("\nset -u")[0]
    assert len(re.findall(r"^#SBATCH", head, re.MULTILINE)) == head.count("\n#SBATCH") == 9
    (started,) = [line for line in words(script) if line[0] == "srun"]
    assert started[started.index("train") :][:4] == ["train", "--config", "run.yaml", f"--run_name={text}"]
    assert ["rm", "-f", f"x{text}/.preempted"] in words(script)


@pytest.mark.parametrize("name", ["-x.yaml", "--report", "a b.yaml", "$(touch y).yaml"])
def test_a_job_script_names_any_file(
    name: str, words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(yaml.safe_dump({**BASE, "output_dir": "-out"}))
    assert main(["slurm", f"--config={name}", "--time", "01:00:00"]) == 0
    commands = words(capsys.readouterr().out)
    assert ["rm", "-f", "./-out/.preempted"] in commands
    (started,) = [line for line in commands if line[0] == "srun"]
    operand = started[started.index("--config") + 1]
    assert not operand.startswith("-") and Path(operand).is_file()
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    (tmp_path / name).write_text(yaml.safe_dump({"config": "base.yaml", "output_dir": "out", "runs": {"a": {}}}))
    assert main(["compare", f"--config={name}", "--slurm"]) == 0
    (started,) = [line for line in words(capsys.readouterr().out) if line[0] == "srun"]
    assert started[1:6] == ["tsdkd", "compare", "--config", operand, "--task"]
