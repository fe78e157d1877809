"""Attacks: what `report`, `analyze`, `compare --report` and `eval` read back, and what reaches a terminal."""

import atexit
import contextlib
import io
import json
import logging
import random
import shutil
import tempfile
import time
import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import torch
import yaml
from attacks.damage import (
    any_file_name,
    any_text,
    damage_bytes,
    damage_config,
    damage_json,
    damage_record,
    put_no_file,
)
from rich.table import Table

from tsdkd.cli import main
from tsdkd.cli.logs import log_to_streams
from tsdkd.config.console import PlainConsole
from tsdkd.errors import DataError, OutputDirError
from tsdkd.report.findings import find_notable
from tsdkd.report.load import load_run
from tsdkd.report.tokens import pack_records
from tsdkd.trainer.token_records import MASS_TOP_K, RecordedCompletion, write_token_records

_SECONDS = 120  # that no report of a tiny run takes, on however busy a machine
_FILES = ("trainer_state.json", "eval/results-s.json", "eval/results-s.md", "tsdkd_config.yaml", "records/*.parquet")


@cache
def _undamaged() -> Path:
    """A run's folder with everything that a report reads, made once."""
    folder = Path(tempfile.mkdtemp(prefix="attacked-run-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    rng = torch.Generator().manual_seed(0)
    for step in (0, 10):
        names = ("student_entropy", "teacher_entropy", "divergence", "forward_kl")
        columns = {name: 2 * torch.rand(30, generator=rng) for name in names}
        columns |= {name: -torch.rand(30, generator=rng) for name in ("student_logp", "teacher_logp")}
        columns |= {"token": torch.arange(10).repeat(3), "candidates": torch.arange(10).repeat(30, 1)}
        for name in ("candidate_logps", "candidate_teacher_logps"):
            columns[name] = torch.log_softmax(torch.randn(30, 10, generator=rng), -1)
        columns["teacher_mass"] = torch.rand(30, len(MASS_TOP_K), generator=rng)
        samples = [RecordedCompletion(i, [1, 2, 3], list(range(10))) for i in range(3)]
        write_token_records(folder, step, samples, columns, lambda ids: "".join(f" t{i}" for i in ids))
    entries = [{"step": i, "epoch": i / 9, "loss": 1 / (i + 1), "grad_norm": 1.0, "gate": 0.5} for i in range(12)]
    state = {
        "global_step": 12,
        "max_steps": 12,
        "logging_steps": 1,
        "log_history": [*entries, {"step": 12, "train_runtime": 9.5}],
    }
    (folder / "trainer_state.json").write_text(json.dumps(state))
    (folder / "tsdkd_config.yaml").write_text(
        "method: tsd-kd\nbeta: 0.9\nopener_ratio: 0.1\nseed: 1\ndataset_name: /a/b.jsonl\n"
    )
    (folder / "eval").mkdir()
    entry = {"model": "after", "benchmark": "s", "mean": 50.0, "baseline": "before", "difference": 9.0, "p": 0.01}
    entry |= {"difference_low": 1.0, "difference_high": 17.0}
    content = {
        "models": {"after": str(folder)},
        "results": [entry | {"metric": m} for m in ("avg@4", "pass@2", "pass@4")],
    }
    (folder / "eval/results-s.json").write_text(json.dumps(content))
    (folder / "eval/results-s.md").write_text("| | s |\n|---|---:|\n| after | 50.0 |\n")
    return folder


def _assert_plain(text: str) -> None:
    """Nothing that steers a terminal, by Unicode's own tables."""
    bidi = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    for character in set(text) - {"\n", "\t"}:
        steers = (
            unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(character) in bidi
        )
        assert not steers, f"{character!a} in {text[:2000]!a}"


def _run(*argv: str) -> tuple[int, str]:
    """A command, which must end well: exit code 0, or 2 with a line, soon, without a traceback or a warning."""
    out, start = io.StringIO(), time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            code: Any = main(argv)
        except SystemExit as stop:  # argparse's
            code = stop.code
    text = out.getvalue()
    _assert_plain(text)
    assert code in (0, 2) and text.strip(), (code, text)
    assert "Traceback" not in text and "Warning" not in text and "it can't be shown" not in text, text
    assert time.monotonic() - start < _SECONDS, text
    return code, text


def _copy(rng: random.Random, folder: Path) -> Path:
    run = folder / rng.choice(["run", "run", any_file_name(rng)])
    shutil.copytree(_undamaged(), run)
    return run


def _damaged(pattern: str, damage: Callable[[random.Random, Path], None]) -> Callable[[random.Random, Path], None]:
    """One file of a run, in one of the commands that read it; another run beside it must be there."""

    def attack(rng: random.Random, folder: Path) -> None:
        run = _copy(rng, folder)
        for _ in range(rng.choice([1, 1, 3])):
            paths = [
                path
                for path in run.glob(pattern or rng.choice(_FILES))
                if path.is_file() and path.stat().st_size < 10**6
            ]
            if paths and not any(path.is_symlink() for path in paths):
                with contextlib.suppress(
                    ValueError, TypeError, OSError, pa.ArrowException, yaml.YAMLError
                ):  # it is damaged already
                    damage(rng, rng.choice(paths))
        command = rng.choice(["report", "two", "analyze", *["load"] * 9])
        if command == "load":  # all but the figures, which take seconds
            with contextlib.suppress(DataError):
                loaded = load_run(run.name, run)
                assert pack_records("x", loaded.records) and find_notable(loaded) and loaded.format_value("beta")
            return
        if command == "analyze":
            _run("analyze", str(run), "--output_dir", str(folder / "figures"))
            return
        others = [str(_undamaged())] if command == "two" else []
        code, text = _run("report", str(run), *others, "--output_file", str(folder / "page.html"))
        if code == 0:
            page = (folder / "page.html").read_text()
            assert page.rstrip().endswith("</html>") and page.count("<html") == 1
            assert text.count("left out: ") == page.count('<li class="warning">Left out: '), text

    return attack


def _names(rng: random.Random, folder: Path) -> None:
    """Of folders; nothing is left out for them."""
    names = {any_file_name(rng)[:60] for _ in range(rng.randint(1, 4))}
    runs = [str(shutil.copytree(_undamaged(), folder / f"{name}")) for name in names if name not in (".", "..")]
    command = rng.choice(
        [["report", "--output_file", str(folder / "p.html")], ["analyze", "--output_dir", str(folder / "f")]]
    )
    code, text = _run(*command[:1], *(run if not run.startswith("-") else f"./{run}" for run in runs), *command[1:])
    assert code == 0 and "left out" not in text, text
    if command[0] == "report":
        page = (folder / "p.html").read_text()
        assert page.count("<script") == 2 and "<script>alert" not in page


def _many(rng: random.Random, folder: Path) -> None:
    """Metrics, entries, models, benchmarks, records by the hundreds."""
    run = _copy(rng, folder)
    state = json.loads((run / "trainer_state.json").read_text())
    groups = ("loss", "entropy/", "opener/", "gate", "speed/", "completions/", "eval_loss", "grad_norm")
    names = [f"{rng.choice(groups)}{any_text(rng)}{i}" for i in range(rng.randrange(1000))]
    entries = rng.choice([2, 20])
    state["log_history"] = [
        {"step": i, **{name: rng.gauss(0, 10 ** rng.randrange(37)) for name in names}} for i in range(entries)
    ]
    (run / "trainer_state.json").write_text(json.dumps(state))
    content = json.loads((run / "eval/results-s.json").read_text())
    one, count = content["results"][1], rng.randrange(1, 2000)
    content["results"] = [
        one | {"model": f"m{rng.randrange(99)}", "benchmark": f"b{rng.randrange(99)}{any_text(rng)}"}
        for _ in range(count)
    ]
    (run / "eval/results-s.json").write_text(json.dumps(content))
    code, _ = _run("report", str(run), "--output_file", str(folder / "page.html"))
    assert code == 0


def _comparison(rng: random.Random, folder: Path) -> None:
    """Results of tasks, as values, bytes, or no file at all."""
    from tsdkd.compare.config import read_comparison
    from tsdkd.compare.result_file import result_settings

    names = [
        f"{i}{rng.choice(['', any_text(rng)])}".encode("utf-8", "replace").decode() for i in range(rng.randint(1, 3))
    ]
    base = {"model_name_or_path": "a", "teacher_model_name_or_path": "b", "dataset_name": "c"}
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    content: dict[str, Any] = {"config": str(folder / "base.yaml"), "output_dir": str(folder / "out"), "seeds": [1, 2]}
    content |= {"runs": {name: {} for name in names}, "eval_samples": 2}
    (folder / "c.yaml").write_text(yaml.safe_dump(content))
    comparison = read_comparison(str(folder / "c.yaml"))
    paths = []
    for task in comparison.tasks:
        metrics = {"greedy": 50.0, "avg@2": 40.0, "pass@2": 60.0, "length": 9.0, "entropy": 0.5, "train_seconds": 1.0}
        counts = {
            "samples_right": [rng.randrange(3) for _ in range(5)],
            "settings": result_settings(comparison, task),
        }
        task.folder.mkdir(parents=True, exist_ok=True)
        paths.append(task.folder / "result.json")
        paths[-1].write_text(json.dumps({"run": task.run, "seed": task.seed, **metrics, **counts}))
    for path in rng.sample(paths, rng.randint(0, len(paths))):
        rng.choice([damage_json, damage_json, damage_bytes, put_no_file])(rng, path)
    code, text = _run("compare", "--config", str(folder / "c.yaml"), "--report")
    if code == 0 and (folder / "out/results.md").exists():
        rows = [line for line in (folder / "out/results.md").read_text().split("\n") if line.startswith("|")]
        assert len(rows) <= 2 + 2 + len(names), rows
    assert code == 0 or "has other settings" in text, text


def _items(rng: random.Random, folder: Path) -> None:
    """Of an evaluation that goes on: a row that it didn't write is refused, with its line."""
    from tsdkd.evaluation.items import ItemResults

    path = folder / "items.jsonl"
    row = {"task": "t", "doc_id": 0, "scores": [1.0, 0.0], "responses": ["a", "b"], "samples": 2, "model": "m"}
    path.write_text(json.dumps(row))
    rng.choice([damage_json, damage_json, damage_bytes])(rng, path)
    before = path.read_bytes()
    path.write_bytes(before + b"\n")
    with contextlib.suppress(OutputDirError):
        found = ItemResults(path, {"samples": 2, "model": "m"})
        for item in found.results.values():
            assert len(item.scores) == 2 and all(0 <= score <= 1 for score in item.scores)
            found.stack_scores([(item.task, item.doc_id)])


def _terminal(rng: random.Random, folder: Path) -> None:
    """Arguments, errors, logs, tables: quoted, on however poor a terminal."""
    texts = [any_text(rng) for _ in range(4)]
    name = texts[0].replace("\0", "")
    command = rng.choice(
        [
            ["report", str(folder / name)],
            ["analyze", str(folder / name)],
            ["compare", "--config", name or "x"],
            ["plan", "--config", name or "x"],
            ["eval", f"{name}=x", "--suite", "demo"],
            ["methods", f"--{name}"],
            ["train", "--config", "demo.yaml", f"--{name}", texts[1], "--dry_run"],
            ["train", "--config", "demo.yaml", "--method", texts[1], "--dry_run"],
        ]
    )
    code, _ = _run(*command)
    assert code == 2
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, encoding=rng.choice(["ascii", "latin-1", "utf-8", "koi8-r"]), newline="")
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream), log_to_streams():
        logging.getLogger("tsdkd.attack").log(rng.choice([logging.INFO, logging.WARNING]), "%s", texts[1])
        table = Table(texts[0], title=texts[1], caption=texts[2], width=rng.choice([None, 5, 40]))
        table.add_row(texts[3])
        PlainConsole(width=rng.choice([10, 80])).print(table, texts[3])
        stream.flush()
    _assert_plain(buffer.getvalue().decode(stream.encoding))


def _completions(rng: random.Random, folder: Path) -> None:
    """TRL's table of prompts and completions while training."""
    from tsdkd.trainer.rollouts import RolloutMixin

    completion = SimpleNamespace(ids=[1, 2], stopped=rng.random() < 0.5)
    logged = [(any_text(rng), any_text(rng), completion) for _ in range(rng.randint(1, 4))]
    trainer: Any = SimpleNamespace(_logged_completions=logged, state=SimpleNamespace(global_step=rng.randrange(9)))
    trainer.accelerator = SimpleNamespace(is_main_process=True)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        RolloutMixin._print_completions(trainer)
    _assert_plain(out.getvalue())
    assert "Completion" in out.getvalue()


ATTACKS = {
    "values of a log": _damaged("trainer_state.json", damage_json),
    "values of an evaluation": _damaged("eval/*.json", damage_json),
    "values of records": _damaged("records/*.parquet", damage_record),
    "values of a configuration": _damaged("tsdkd_config.yaml", damage_config),
    "bytes of a run's files": _damaged("", damage_bytes),
    "what isn't a file": _damaged("", put_no_file),
    "names of runs": _names,
    "hundreds of everything": _many,
    "results of a comparison": _comparison,
    "items of an evaluation": _items,
    "text on a terminal": _terminal,
    "completions on a terminal": _completions,
}
