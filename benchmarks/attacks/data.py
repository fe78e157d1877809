"""Attacks: data sets, configurations, files and models that strangers made, in random shapes."""

import contextlib
import gzip
import io
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tsdkd import DataError, TSDKDConfig
from tsdkd.cli import main
from tsdkd.compare.config import read_comparison
from tsdkd.data import prepare_dataset
from tsdkd.errors import ConfigError, OutputDirError
from tsdkd.evaluation.items import ItemResult, ItemResults
from tsdkd.files import resolve_path

_SECONDS = 60  # for one command; the slowest that holds takes 15 on a busy core
_MODELS = {"model_name_or_path": "tsdkd://demo/student", "teacher_model_name_or_path": "tsdkd://demo/teacher"}
_RUN = {**_MODELS, "max_completion_length": 2, "max_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none"}
_RUN |= {
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "per_device_train_batch_size": 2,
}


# What holds


def _call(*argv: str) -> tuple[int, str]:
    """Exit code and error output of a command, which has a time limit."""

    def too_long(*_: Any) -> None:
        raise AssertionError(f"more than {_SECONDS} seconds: {argv}")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(_SECONDS)
    try:
        with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()):
            try:
                code = main(argv)
            except SystemExit as stop:  # argparse's
                code = int(stop.code or 0)
        return code, errors.getvalue()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _refused(folder: Path, *argv: str, names: tuple[str, ...] = ()) -> str:
    """A command is refused in a line or a few that name the culprit, and nothing in the folder changes."""
    before = _snapshot(folder)
    code, error = _call(*argv)
    lines = [line for line in error.splitlines() if line.startswith(f"tsdkd {argv[0]}: ")]
    assert code == 2, (code, argv, error[-500:])
    assert 1 <= len(lines) <= 60 and all(len(line) < 2000 for line in lines) and "Traceback" not in error, error[
        -2000:
    ]
    assert all(name in error for name in names), (names, error[-500:])
    assert _snapshot(folder) == before, "something was written"
    return error


def _snapshot(folder: Path) -> dict[str, bytes | int]:
    found: dict[str, bytes | int] = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        is_small_file = path.is_file() and not path.is_symlink() and status.st_size < 2**24
        found[str(path)] = path.read_bytes() if is_small_file else status.st_size
    return found


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    logging.disable(logging.WARNING)
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        logging.disable(logging.NOTSET)


def _flags(values: dict[str, Any]) -> list[str]:
    return [f"--{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in values.items()]


# What strangers write


def _word(rng: random.Random) -> str:
    odd = [
        "--trust_remote_code=true",
        "--",
        "-h",
        "null",
        "true",
        "1e5",
        "[1]",
        "{}",
        "~",
        "$(id)",
        "`id`",
        "%x",
        "\\",
        "a=b",
    ]
    odd += [
        "",
        "  ",
        "é",
        "\U0001f600",
        "'",
        '"',
        "#SBATCH -p x",
        "--output_dir=x",
        "*",
        "0x1f",
        "1_0",
        "=",
        "<<",
        "no",
        "2026-01-01",
    ]
    return (
        rng.choice(odd)
        if rng.random() < 0.5
        else "".join(rng.choices("abc-=_ $'\"\\{}[]:,#&*!|>%@`~\té漢", k=rng.randint(1, 12)))
    )


def _value(rng: random.Random, level: int = 0) -> Any:
    leaves = [None, True, 0, -1, 2**40, 0.5, 1e300, 1e-9, _word(rng)]
    kind = rng.random() if level < 3 else 1
    if kind < 0.15:
        return [_value(rng, level + 1) for _ in range(rng.randint(0, 3))]
    if kind < 0.3:
        return {_word(rng): _value(rng, level + 1) for _ in range(rng.randint(0, 3))}
    return rng.choice(leaves)


def _yaml_nested(rng: random.Random) -> str:
    count = int(10 ** rng.uniform(2, 4.7))
    opening, closing = rng.choice(
        [("[", "]"), ("{a: ", "}"), ("- ", ""), ("? ", ""), ("[{a: ", "}]"), ("!!seq [", "]")]
    )
    return rng.choice(["a: ", "", "--- "]) + opening * count + "1" + closing * rng.choice([0, count])


def _yaml_bomb(rng: random.Random) -> str:
    width, form = rng.randint(2, 30), rng.choice(["[{}]", "{{k: [{}]}}", "{{<<: [{}], own: 1}}"])
    lines = [f"a0: &a0 {'{x: 1}' if '<<' in form else rng.choice(['[x]', '{x: 1}', 'x' * 500])}"]
    for i in range(1, 40 if width < 8 else 12):
        lines.append(f"a{i}: &a{i} " + form.format(", ".join([f"*a{i - 1}"] * width)))
    return "\n".join(lines)


def _yaml_number(rng: random.Random) -> str:
    count = int(10 ** rng.uniform(2.1, 5))
    forms = [
        "9" * count,
        "0x" + "f" * count,
        "0b" + "1" * count,
        "1" + ":59" * (count // 3),
        "-" + "7" * count,
        "1_" * count + "1",
    ]
    return f"a: {rng.choice(forms)}" if rng.random() < 0.9 else f"a: {rng.randint(2**63, 2**70)}"


def _yaml_loop(rng: random.Random) -> str:
    return rng.choice(
        ["a: &a [{}*a]", "a: &a {{b: {}*a}}", "&a [{}*a]", "a: &a\n  b: [{}*a]", "a: &a\n  <<: *a\n  b: [{}*a]"]
    ).format("1, " * rng.randint(0, 3) if rng.random() < 0.5 else "")


def _yaml_tag(rng: random.Random) -> str:
    tags = [
        "!!binary aGk=",
        "!!set {x}",
        "!!omap [x: 1]",
        "!!pairs [x: 1]",
        "!!timestamp 2026-01-01",
        "!x y",
        "!!int x",
        "!!bool x",
    ]
    tags += [
        "!!float x",
        "!!python/name:os.system",
        "!!python/object/new:os.system [id]",
        "!<tag:yaml.org,2002:python/none> x",
        "!!int ''",
    ]
    return f"{_indent(rng)}a: {rng.choice(tags)}"


def _indent(rng: random.Random) -> str:
    return rng.choice(["", "# x\n", "%YAML 1.1\n---\n", "b: 1\n"])


def _yaml_bytes(rng: random.Random) -> bytes:
    text = "alpha: 0.1\nbeta: 0.5\n"
    spoilt = [
        text.encode("utf-16"),
        text.encode("utf-32"),
        b"\0" + text.encode(),
        text.encode() + b"a: \xff\n",
        b"a: x\0y\n",
    ]
    spoilt += [
        rng.randbytes(rng.randint(1, 5000)) + b"\xff",
        b'a: "\\ud83d"\n',
        b"a:\n\tb: 1\n",
        b"alpha: 1\n'alpha': 2\n",
    ]
    spoilt += [
        b"a: 1\n---\nb: 1\n",
        b"? [a]\n: 1\n",
        b"k" * 500 + b": 1\n",
        b"a: x\n" * rng.randint(60_000, 10**6),
        b"{a, a}",
    ]
    return rng.choice(spoilt)


_YAMLS: list[Callable[[random.Random], str | bytes]] = [
    _yaml_nested,
    _yaml_bomb,
    _yaml_number,
    _yaml_loop,
    _yaml_tag,
    _yaml_bytes,
]


def _odd_file(rng: random.Random, path: Path) -> str:
    """Something at a path that is no regular file."""
    kind = rng.choice(["pipe", "device", "folder", "link"])
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to(rng.choice(["/dev/zero", "/dev/full", "/dev/null", "/dev/urandom"]))
    else:
        os.mkfifo(path.with_name("pipe"))
        path.with_name("hop").symlink_to("pipe")
        path.symlink_to("hop")
    return kind


# The kinds


def _hostile_yaml(rng: random.Random, folder: Path) -> None:
    content = rng.choice(_YAMLS)(rng)
    (folder / "x.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with _inside(folder):
        command = rng.choice(["train", "compare", "plan", "launch"])
        if command == "launch":
            argv = ("train", "--config", "demo", "--output_dir", "out", "--accelerate_config", "x.yaml")
            _refused(folder, *argv, names=("accelerate_config", "x.yaml"))
        else:
            _refused(folder, command, "--config", "x.yaml", names=("--config", "x.yaml"))


def _odd_configuration_file(rng: random.Random, folder: Path) -> None:
    with _inside(folder):
        _odd_file(rng, folder / "x.yaml")
        command = rng.choice(["train", "compare", "plan", "generate"])
        _refused(
            folder,
            command,
            "--config",
            "x.yaml",
            *(["--output_file", "o"] if command == "generate" else []),
            names=("x.yaml",),
        )


def _hostile_json_flag(rng: random.Random, folder: Path) -> None:
    count = int(10 ** rng.uniform(1.8, 4.3))
    texts = [
        '{"a":' * count + "1" + "}" * count,
        '{"a":' + "[" * count + "]" * count + "}",
        '{"a":' * count,
        '{"a": NaN}',
    ]
    texts += [
        '{"a": [-Infinity]}',
        '{"a": ' + "9" * (count + 20) + "}",
        '{"a": 1, "a": 1}',
        '{"a": "\\u0000"}',
        '{"\\udc00": 1}',
        '{"a": 1e999}',
    ]
    key = rng.choice(["chat_template_kwargs", "teacher_model_init_kwargs", "lr_scheduler_kwargs", "model_init_kwargs"])
    with _inside(folder):
        _refused(
            folder, "train", "--config", "demo", "--output_dir", "out", f"--{key}={rng.choice(texts)}", names=(key,)
        )


def _values_of_a_child(rng: random.Random, folder: Path) -> None:
    """What a comparison's run is given is what `tsdkd train` reads, or it is refused by name."""
    texts = [
        "run_name",
        "prompt_suffix",
        "hub_model_id",
        "logging_dir",
        "chat_template_kwargs",
        "lora_target_modules",
        "alpha",
        "gate",
    ]
    key = rng.choice(texts)
    value: Any = {
        "chat_template_kwargs": lambda: {_word(rng): _value(rng) for _ in range(3)},
        "lora_target_modules": lambda: [_word(rng) for _ in range(rng.randint(1, 3))],
        "alpha": lambda: rng.choice([rng.random(), 10 ** rng.uniform(-12, 3)]),
        "gate": lambda: rng.choice([True, False]),
    }.get(key, lambda: _word(rng))()
    values = {key: value, **({"use_peft": True} if "lora" in key else {})}
    with _inside(folder):
        (folder / "base.yaml").write_text(yaml.safe_dump({**_RUN, "dataset_name": "rows.jsonl"}))
        file = {"config": "base.yaml", "output_dir": "out", "seeds": [1], "runs": {_word(rng) + "x": values}}
        (folder / "comparison.yaml").write_text(yaml.safe_dump(file))
        try:
            comparison = read_comparison("comparison.yaml")
        except ConfigError as error:
            assert key in str(error) or "key of" in str(error) or "YAML" in str(error), error
            return
        seen: list[Any] = []
        with mock.patch("tsdkd.run.train.train", seen.append):
            code, error = _call("train", "--config=base.yaml", *comparison.train_flags(comparison.tasks[-1]))
        assert code == 0, error
        read, same = seen[0].explicit_values, value if value != "null" else None
        assert read[key] == same and read["seed"] == 1 and read["output_dir"].startswith("out/"), (read[key], value)
        assert set(read) == {*_RUN, "dataset_name", "output_dir", "resume", "seed", *values}, set(read)


def _job_scripts(rng: random.Random, folder: Path) -> None:
    """bash reads the words that were given, and runs nothing else."""
    name, out = _word(rng), _word(rng) + "x"
    with _inside(folder):
        (folder / "run.yaml").write_text(yaml.safe_dump({**_RUN, "dataset_name": "rows.jsonl", "output_dir": out}))
        argv = ("slurm", "--config", "run.yaml", "--time", "01:00:00", f"--run_name={name}")
        with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(io.StringIO()) as errors:
            code = main(argv)
        assert code in (0, 2) and (code == 0 or "tsdkd slurm: " in errors.getvalue()), errors.getvalue()
        if code:
            return
        bin_folder = folder / "bin"
        bin_folder.mkdir()
        for command in ("srun", "rm", "scontrol", "tsdkd", "id"):
            (bin_folder / command).write_text(f'#!/bin/bash\nprintf "%s\\0" {command} "$@" "END" >> {folder}/log\n')
            (bin_folder / command).chmod(0o755)
        environment = {
            "PATH": f"{bin_folder}:/usr/bin:/bin",
            "SLURM_JOB_NODELIST": "n",
            "SLURM_NNODES": "1",
            "SLURM_JOB_ID": "1",
        }
        subprocess.run(
            ["bash", "-c", printed.getvalue()], env=environment, capture_output=True, timeout=_SECONDS, check=False
        )
        words = (folder / "log").read_text().split("\0")
        assert f"--run_name={name}" in words and "id" not in words, words
        assert any(word.removeprefix("./") == f"{Path(out)}/.preempted" for word in words), (out, words)


def _odd_data(rng: random.Random, folder: Path) -> None:
    """Files of data that no reader may see, alone or in a folder, and damaged ones."""
    path = folder / rng.choice(
        ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "data/train.jsonl", "data/train.parquet"]
    )
    path.parent.mkdir(exist_ok=True)
    count, opening = int(10 ** rng.uniform(2.1, 5)), rng.choice(["[", '{"a": ', '{"]": ', "[\n", '[{"a":', '["]", '])
    kind = rng.random()
    if kind < 0.3:
        _odd_file(rng, path)
        if path.is_dir() and path.parent != folder:
            return  # a folder in a folder of data may be empty
    elif kind < 0.7 and "json" in path.suffix:
        row = rng.choice(["", '{"prompt": "x"}\n', '{"prompt": "\\"]"}\n'])
        path.write_text(
            row + '{"prompt": ' + opening * count + rng.choice(["", "1"]) + rng.choice(["", "]" * count, "}" * count])
        )
    else:
        path.write_bytes(
            rng.choice([b"PAR1", b"", b"\xff\xfe", b"{", b"[1"]) + rng.randbytes(rng.randint(0, 3000)) + b"\xff\0"
        )
    with _inside(folder):
        name = path.relative_to(folder).parts[0]
        _refused(folder, "train", *_flags({**_RUN, "dataset_name": name, "output_dir": "out"}))


def _deep_data(rng: random.Random, folder: Path) -> None:
    """JSON of any depth, in files of any ending that a reader takes, for training and for an evaluation."""
    count, opening, closing = int(10 ** rng.uniform(4.3, 5.5)), *rng.choice(["[]", "{}"])
    opening = opening if opening == "[" else f'{{"{_letters(rng)}": '
    row = f'{{"prompt": {opening * count}1{closing * count}}}\n'.encode()
    name = rng.choice(["train.jsonl", "train.ndjson", "train.jsonl.gz", "test.jsonl"])
    task = folder / "demo_greedy"
    task.mkdir()
    (task / name).write_bytes(gzip.compress(row) if name.endswith("gz") else row)
    with _inside(folder):
        if name == "test.jsonl":
            flags = ["--suite", "demo", "--benchmarks", "demo_greedy", "--data_dir", ".", "--output_dir", "out"]
            code, error = _call("eval", "m=tsdkd://demo/student", *flags)
            assert code == 2 and "demo_greedy" in error and "Traceback" not in error, (code, error[-500:])
            assert not any(path.is_file() for path in (folder / "out").rglob("*")), "something was written"
        else:
            _refused(folder, "train", *_flags({**_RUN, "dataset_name": "demo_greedy", "output_dir": "out"}))


def _card(rng: random.Random, folder: Path) -> None:
    """A card has a folder's data read elsewhere."""
    secret, data, row = folder / _letters(rng) / "rows.jsonl", folder / "data", '{"prompt": "x"}\n'
    for path in (secret, data / "train.jsonl", data / "sub" / "train.jsonl"):
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(row)
    (data / "spec.json").write_text(json.dumps({"version": 1, "refs": {"x.jsonl": [str(secret)]}}))
    up = rng.choice(["../", "sub/../../", "./../", f"{data}/../", f"{data}/sub/../../"])
    places = [f"{up}{secret.parent.name}/{rng.choice(['rows.jsonl', '*.jsonl', '**'])}", str(secret)]
    place = rng.choice(
        [*places, f"{rng.choice(['file', 'local'])}://{secret}", f"reference://x.jsonl::{data}/spec.json"]
    )
    files = rng.choice(
        [place, [place], ["train.jsonl", place], {"train": place}, [{"split": "train", "path": [place]}]]
    )
    config: dict[str, Any] = {"config_name": _letters(rng), "data_files": files}
    if rng.random() < 0.2:
        config = {"config_name": _letters(rng), "data_dir": f"../{secret.parent.name}"}
    card = yaml.safe_dump({"configs": [config]})
    if rng.random() < 0.2:
        (data / ".huggingface.yaml").write_text(card)
    else:
        (data / "README.md").write_text(f"---\n{card}---\n")
    with _inside(folder):
        _refused(folder, "train", *_flags({**_RUN, "dataset_name": "data", "output_dir": "out"}))


def _media(rng: random.Random, folder: Path) -> None:
    """A column whose values name a pipe, which would hang whoever opens it."""
    os.mkfifo(folder / "pipe")
    value: Any = {"bytes": None, "path": str(folder / "pipe")}
    feature: Any = {"_type": rng.choice(["Image", "Audio", "Video", "Pdf", "Nifti"])}
    for _ in range(rng.randint(0, 4)):
        if rng.random() < 0.5:
            value, feature = [value], {"_type": rng.choice(["List", "LargeList", "Sequence"]), "feature": feature}
        else:
            name = _letters(rng)
            value, feature = {name: value}, {name: feature}
    column, features = rng.choice(["prompt", "answer", "x"]), {"prompt": {"_type": "Value", "dtype": "string"}}
    table = pa.Table.from_pylist([{"prompt": "27,7 x+5 -> y+3", column: value}] * rng.randint(1, 3))
    info = {"info": {"features": features | {column: feature}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), folder / "rows.parquet")
    with _inside(folder):
        code, error = _call(
            "train", "--dry_run", *_flags({**_RUN, "dataset_name": "rows.parquet", "output_dir": "out"})
        )
    assert (code == 2 or column != "prompt") and code in (0, 2) and "Traceback" not in error, (code, error[-500:])


def _many_columns(rng: random.Random, folder: Path) -> None:
    """Thousands of columns, or long names, and none that is a prompt: the message stays short."""
    names = [_letters(rng) * rng.choice([1, 1, 900]) + str(i) for i in range(rng.randint(1, 2000))]
    (folder / "rows.jsonl").write_text(json.dumps(dict.fromkeys(names, "x")) + "\n")
    with _inside(folder):
        _refused(
            folder, "train", *_flags({**_RUN, "dataset_name": "rows.jsonl", "output_dir": "out"}), names=("column",)
        )


def _letters(rng: random.Random) -> str:
    return "".join(rng.choices("abcdefgh", k=rng.randint(1, 8)))


def _odd_columns(rng: random.Random, folder: Path) -> None:
    """Columns with internal names, of any type, change nothing."""
    ours = [
        "index",
        "prompt_ids",
        "completion_ids",
        "limit",
        "input_ids",
        "prompt_lengths",
        "completion_lengths",
        "lengths",
    ]
    ours += ["scores", "num_tokens", "labels", "length", "sampling_per_token_logps", "old_per_token_logps"]
    kinds: list[Callable[[], Any]] = [
        lambda: rng.randint(-5, 2**62),
        lambda: rng.random() * 10 ** rng.randint(0, 300),
        lambda: _word(rng),
        lambda: [rng.randint(0, 50) for _ in range(4)],
        lambda: {"a": [1.0], "b": "x"},
        lambda: None,
        lambda: rng.random() < 0.5,
        lambda: float("nan"),
    ]
    rows = [{"prompt": f"{i},7 x+5 -> y+3", "completion": "x+5"} for i in range(rng.randint(1, 4))]
    extra = {name: rng.choice(kinds) for name in rng.sample(ours, rng.randint(1, 6))}
    logging.disable(logging.WARNING)
    plain, odd = (_prepare(r) for r in (rows, [{**row, **{k: make() for k, make in extra.items()}} for row in rows]))
    logging.disable(logging.NOTSET)
    assert plain == odd and repr(plain) == repr(odd)


@cache
def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(resolve_path("tsdkd://demo/student"))


def _prepare(rows: list[dict[str, Any]], tokenizer: Any = None) -> list[dict[str, Any]]:
    args = TSDKDConfig("unused", use_cpu=True, bf16=False, report_to="none")
    dataset = Dataset.from_list(rows)
    return prepare_dataset(dataset, tokenizer or _tokenizer(), args, 512, needs_completion=False).to_list()


def _templates(rng: random.Random, folder: Path) -> None:
    """Any template ends, in a line that names the row or in a prompt."""
    many = int(10 ** rng.uniform(3, 5))
    body = rng.choice(["", "x", "{{ 'x' * 999 }}", "{% if messages %}{% endif %}", "{% set y = [1] * 999 %}"])
    loop = "{% for i in range(99999) %}"
    number = f"10**(10**{rng.randint(6, 10)})"
    forms = [
        loop * rng.randint(2, 4) + body + "{% endfor %}" * 4,
        "{{ 'ab' * " + number + " }}",
        "{{ (" + number + ") % 7 }}",
        "{{ [1] * " + number + " }}",
        "{{ 'x'." + rng.choice(["center", "ljust", "rjust", "zfill"]) + "(" + number + ") }}",
        "{% set n = namespace(x='ab') %}"
        + loop
        + "{% set n.x = n.x "
        + rng.choice(["~", "+"])
        + " n.x %}{% endfor %}",
        "{% set n = namespace(x=[1]) %}" + loop + "{% set n.x = n.x + n.x %}{% endfor %}",
        "{% macro f(x) %}{{ f(x ~ x) }}{% endmacro %}{{ f('a') }}",
        "{{ " + rng.choice(["(", "[", "-", "not ", "{1: "]) * many + "1 }}",
        ("{% if 1 %}" * many) + ("{% endif %}" * many),
        "{{ 1" + rng.choice(["|string", " ~ 1", " + 1", "|list"]) * many + " }}",
        "{{ lipsum(n=" + str(many) + "**2) }}",
        "{{ raise_exception('x' * " + str(many) + ") }}",
        "{% " + _word(rng) + " %}",
        "{{ messages[0]." + rng.choice(["__class__", "nothing.at.all", "pop('content')", "content * 9**9"]) + " }}",
    ]
    tokenizer = AutoTokenizer.from_pretrained(resolve_path("tsdkd://demo/student"))
    tokenizer.chat_template = rng.choice(forms)
    logging.disable(logging.WARNING)
    try:
        with mock.patch("tsdkd.models.chat_template.MAX_SECONDS", 0.5):
            assert len(_prepare([{"prompt": "27,7 x+5 -> y+3"}], tokenizer)) == 1
    except DataError as error:
        expected = ("row 0: the chat template", "no token", "room", "can't represent")
        assert len(str(error)) < 500 and any(text in str(error) for text in expected), error
    finally:
        logging.disable(logging.NOTSET)


@cache
def _generated() -> tuple[Path, list[bytes]]:
    """A data set of five prompts, and the file that `tsdkd generate` makes of it."""
    folder = Path(tempfile.mkdtemp())
    rows = "".join(json.dumps({"prompt": f"{i},7 x+5 -> y+3", "answer": str(i + 4)}) + "\n" for i in range(5))
    (folder / "rows.jsonl").write_text(rows)
    code, error = _call("generate", *_generate_flags(folder), f"--output_file={folder / 'whole.jsonl'}")
    assert code == 0, error
    return folder, (folder / "whole.jsonl").read_bytes().splitlines(keepends=True)


def _generate_flags(folder: Path) -> list[str]:
    return _flags({**_RUN, "dataset_name": folder / "rows.jsonl"})


def _foreign_output(rng: random.Random, folder: Path) -> None:
    """A file that isn't wholly ours is refused and unchanged."""
    source, ours = _generated()
    some = b"".join(rng.sample(ours, rng.randint(0, 4)))
    row = json.loads(rng.choice(ours))
    key = rng.choice(["index", "sample", "seed", "model", "temperature", "prompt", "revision"])
    odd = json.dumps(
        {
            **row,
            key: rng.choice([-1, 10**20, "0", 0.5, None, [0], {"a": 0}, True, float("nan"), float("inf"), "x" * 99]),
        }
    )
    foreign = [
        odd.encode() + rng.choice([b"", b"\n", b"\r\n"]),
        json.dumps({_word(rng): _value(rng)}).encode() + rng.choice([b"", b"\n"]),
        rng.choice([b"\n", b"\r\n", b" \n"]),
        rng.randbytes(rng.randint(1, 20_000)) + b"\xff",
        b"\0" * rng.randint(1, 9999),
        _word(rng).encode() + b"x" + rng.choice([b"", b"\n"]),
        b"[" * 10**5 + b"\n",
        "\n".join(str(rng.random()) for _ in range(10**4)).encode(),
    ]
    content = some + rng.choice(foreign)
    if rng.random() < 0.2:
        content = ours[0][: rng.randint(1, len(ours[0]) - 3)]
    if rng.random() < 0.2:
        content = rng.choice(foreign).rstrip(b"\n") + b"\n" + ours[0][: rng.randint(1, 40)]
    with _inside(folder):
        (folder / "mine.jsonl").write_bytes(content)
        name = rng.choice(["mine.jsonl", "link"])
        (folder / "link").symlink_to("mine.jsonl")
        _refused(folder, "generate", *_generate_flags(source), f"--output_file={name}", names=("output_file", name))


def _own_output(rng: random.Random, folder: Path) -> None:
    """A file that was cut off anywhere is completed."""
    source, ours = _generated()
    chosen = rng.sample(ours, rng.randint(1, 4))
    whole, following = b"".join(chosen), next(line for line in ours if line not in chosen)
    content = whole + following[: rng.randint(0, len(following))]
    (folder / "part.jsonl").write_bytes(content if rng.random() < 0.8 else whole[:-1])
    with _inside(folder):
        code, error = _call("generate", *_generate_flags(source), "--output_file=part.jsonl")
        assert code == 0, error
    assert sorted((folder / "part.jsonl").read_bytes().splitlines(keepends=True)) == sorted(ours)


def _odd_output(rng: random.Random, folder: Path) -> None:
    source, _ = _generated()
    with _inside(folder):
        _odd_file(rng, folder / "o.jsonl")
        _refused(
            folder, "generate", *_generate_flags(source), "--output_file=o.jsonl", names=("output_file", "o.jsonl")
        )


def _items(rng: random.Random, folder: Path) -> None:
    """An evaluation's file: odd lines are refused, unchanged; cut ones are completed."""
    path, metadata = folder / "items.jsonl", {"model": "m", "samples": 1}
    item = {"task": "t", "doc_id": 1, "scores": [1.0], "responses": ["r"], **metadata}
    whole = "".join(json.dumps({**item, "doc_id": i}) + "\n" for i in range(rng.randint(1, 3)))
    next_line = json.dumps({**item, "doc_id": 7})
    if rng.random() < 0.4:
        path.write_text(whole + next_line[: rng.randint(0, len(next_line) - 1)])
        items = ItemResults(path, metadata)
        items.add([ItemResult("t", 7, [0.0], ["s"])])
        assert path.read_text().startswith(whole) and ("t", 7) in ItemResults(path, metadata).results
        return
    key = rng.choice([*item])
    value = rng.choice(
        [-1, 0.5, 10**400, "0", None, [[]], {"a": 1}, [float("nan")], [2.0], ["x"], [True], [1.0, 1.0], [None]]
    )
    content = rng.choice(["", whole]) + json.dumps({**item, key: value}) + rng.choice(["", "\n"])
    if json.loads(content.splitlines()[-1])[key] == item[key] or (key, value) in [("responses", ["x"]), ("task", "0")]:
        return
    path.write_text(content)
    try:
        ItemResults(path, metadata)
    except OutputDirError as error:
        assert "items.jsonl" in str(error) and len(str(error)) < 1000
        assert path.read_text() == content
    else:
        raise AssertionError(f"accepted: {key} {value!r}")


def _nonfinite_weights(rng: random.Random, folder: Path) -> None:
    source, _ = _generated()
    field = rng.choice([*_MODELS])
    shutil.copytree(resolve_path(_MODELS[field]), folder / "model")
    path = folder / "model/model.safetensors"
    weights = load_file(path)
    name = rng.choice([*weights])
    weights[name].view(-1)[rng.randrange(weights[name].numel())] = rng.choice(
        [float("nan"), float("inf"), -float("inf")]
    )
    save_file(weights, path, metadata={"format": "pt"})
    values = {**_RUN, "dataset_name": source / "rows.jsonl", field: "model"}
    role = "teacher" if "teacher" in field else "student"
    with _inside(folder):
        if rng.random() < 0.5:
            argv = ("train", *_flags({**values, "output_dir": "out"}))
        else:
            argv = ("generate", *_flags(values), "--role", role, "--output_file", "made.jsonl")
        error = _refused(folder, *argv, names=(field, "model"))
        assert "NaN" in error or "infinity" in error, error


def _odd_model(rng: random.Random, folder: Path) -> None:
    """A folder that is no model."""
    source, _ = _generated()
    field = rng.choice([*_MODELS])
    model = folder / "model"
    shutil.copytree(resolve_path(_MODELS[field]), model)
    sizes = [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "max_position_embeddings",
        "num_attention_heads",
        "intermediate_size",
    ]
    with _inside(folder):
        if rng.random() < 0.5:
            values = json.loads((model / "config.json").read_text())
            value = rng.choice(
                [0, -1, -(10**20), 10**12, 10**30, "x", 1.5, True, {"a": 1}, float("nan"), float("inf")]
            )
            (model / "config.json").write_text(json.dumps(values | {rng.choice(sizes): value}))
        else:
            present = [
                p.name
                for p in model.iterdir()
                if p.name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
            ]
            path = model / rng.choice(present)
            path.unlink()
            how = rng.randrange(4)
            if how == 0:
                _odd_file(rng, path)
            elif how == 1:
                path.write_bytes(rng.randbytes(rng.randint(0, 5000)) + b"\xff")
            elif how == 2:
                path.write_text(rng.choice(["[", '{"a":', "1", '"x"', "null"]) * rng.choice([1, 9000]))
            else:
                path.touch()
                os.truncate(path, 2 ** rng.randint(29, 40))
        values = {**_RUN, "dataset_name": source / "rows.jsonl", field: "model", "output_dir": "out"}
        _refused(folder, "train", *_flags(values), names=(field,))


torch.set_num_threads(1)
ATTACKS: dict[str, Callable[[random.Random, Path], None]] = {
    "hostile YAML": _hostile_yaml,
    "a configuration that is no file": _odd_configuration_file,
    "hostile JSON by a flag": _hostile_json_flag,
    "values of a child process": _values_of_a_child,
    "job scripts": _job_scripts,
    "columns with our names": _odd_columns,
    "data that is none": _odd_data,
    "data that is nested deeply": _deep_data,
    "cards that name files elsewhere": _card,
    "columns that open files": _media,
    "thousands of columns": _many_columns,
    "chat templates": _templates,
    "a foreign output file": _foreign_output,
    "an output file that was cut off": _own_output,
    "an output that is no file": _odd_output,
    "items of an evaluation": _items,
    "weights that aren't finite": _nonfinite_weights,
    "a folder that is no model": _odd_model,
}
