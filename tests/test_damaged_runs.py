"""What `report`, `analyze`, `compare --report` and `eval` read may be damaged or absurd: that part is left out."""

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from tsdkd.cli import main
from tsdkd.errors import OutputDirError
from tsdkd.evaluation.items import ItemResults
from tsdkd.report.load import load_run
from tsdkd.trainer.token_records import MASS_TOP_K, RecordedCompletion, write_token_records

STATE, RESULTS, RECORD = "trainer_state.json", "eval/results-demo.json", "records/step-00000000.parquet"
TOO_LONG = 10**400


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder, made by hand."""
    return make_run(tmp_path / "run")


def make_run(folder: Path) -> Path:
    for step in (0, 2):
        ids = torch.arange(6).repeat(2)
        columns: dict[str, Any] = {"token": ids, "candidates": torch.arange(10).repeat(12, 1)}
        for name in ("student_entropy", "teacher_entropy", "divergence", "forward_kl"):
            columns[name] = torch.linspace(0, 2, 12)
        columns |= {name: -torch.linspace(0.1, 2, 12) for name in ("student_logp", "teacher_logp")}
        logps = torch.log_softmax(torch.linspace(0, -3, 10), -1).repeat(12, 1)
        columns |= {"candidate_logps": logps, "candidate_teacher_logps": logps.flip(1)}
        columns["teacher_mass"] = torch.linspace(0.5, 1, len(MASS_TOP_K)).repeat(12, 1)
        samples = [RecordedCompletion(i, [1, 2], list(range(6))) for i in range(2)]
        write_token_records(folder, step, samples, columns, lambda ids: "".join(f" w{i}" for i in ids))
    entries = [{"step": i, "epoch": 0.1, "loss": 2.0 - 0.1 * i, "entropy/student": 1.0} for i in range(9)]
    state = {"global_step": 9, "max_steps": 9, "logging_steps": 1, "log_history": entries}
    (folder / STATE).write_text(json.dumps(state))
    (folder / "tsdkd_config.yaml").write_text("method: tsd-kd\nbeta: 0.9\nseed: 3\n")
    (folder / "eval").mkdir()
    entry = {"model": "after", "benchmark": "demo", "mean": 50.0, "baseline": "before", "difference": 1.0, "p": 0.5}
    entry |= {"difference_low": -1.0, "difference_high": 2.0}
    metrics = [entry | {"metric": metric} for metric in ("avg@8", "pass@2", "pass@8")]
    (folder / RESULTS).write_text(json.dumps({"models": {"after": str(folder)}, "results": metrics}))
    (folder / "eval/results-demo.md").write_text("| | a |\n|---|---:|\n| after | 50 |\n")
    return folder


def change_json(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    sys.set_int_max_str_digits(0)
    try:
        path.write_text(json.dumps(change(content)))
    finally:
        sys.set_int_max_str_digits(4300)


def as_link_to_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def as_huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**33)


NO_FILES: dict[str, Callable[[Path], Any]] = {
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "endless": as_link_to_zeros,
    "empty": lambda path: path.write_text(""),
    "a scalar": lambda path: path.write_text("3"),
    "null": lambda path: path.write_text("null"),
    "a list": lambda path: path.write_text("[1, 2]"),
    "nested": lambda path: path.write_text("[" * 5000 + "]" * 5000),
    "nested mappings": lambda path: path.write_text('{"a":' * 5000 + "1" + "}" * 5000),
    "zeros": lambda path: path.write_bytes(bytes(5000)),
    "UTF-16 of nothing": lambda path: path.write_bytes("\ufeff[".encode("utf-16")),
    "huge": as_huge,
    "a long number": lambda path: path.write_text("9" * 5000),
}


@pytest.mark.parametrize("file", [STATE, RESULTS, RECORD, "eval/results-demo.md"])
@pytest.mark.parametrize("how", NO_FILES)
def test_what_isnt_such_a_file(how: str, file: str, run: Path) -> None:
    """Anything may be at a file's path. Tables are text, whatever it is."""
    (run / file).unlink()
    NO_FILES[how](run / file)
    loaded = load_run("x", run)
    is_text = file.endswith(".md") and how not in ("a folder", "a pipe", "endless", "huge")
    assert [file.split("/")[-1] in reason for reason in loaded.skipped] == ([] if is_text else [True])
    assert "\n" not in "".join(loaded.skipped) and max(map(len, loaded.skipped), default=0) < 500


STATE_CHANGES: dict[str, Callable[[Any], Any]] = {
    **{
        f"step {value!r:.9}": lambda s, v=value: s["log_history"][3].update(step=v)
        for value in (-5, 2**70, TOO_LONG, 0.5, "3", None, True, [], math.nan, math.inf, 1e308)
    },
    **{
        f"loss {value!r:.9}": lambda s, v=value: s["log_history"][3].update(loss=v)
        for value in (TOO_LONG, 1e308, -1e308)
    },
    **{f"entry {value!r:.9}": lambda s, v=value: s["log_history"].insert(3, v) for value in (None, 3, "x", [], {})},
    **{
        f"{name} {value!r:.9}": lambda s, n=name, v=value: s.update({n: v})
        for name in ("global_step", "max_steps", "log_history")
        for value in (None, "7", TOO_LONG, math.nan, -9, {"a": 1}, True)
    },
    **{f"no {name}": lambda s, n=name: s.pop(n) for name in ("global_step", "max_steps", "log_history")},
}


@pytest.mark.parametrize("change", STATE_CHANGES)
def test_values_of_a_log(change: str, run: Path) -> None:
    """One value, or all of the log; a reason names the file, and what is left is finite."""
    change_json(run / STATE, lambda state: (STATE_CHANGES[change](state), state)[1])
    loaded = load_run("x", run)
    assert len(loaded.skipped) == 1 and STATE in loaded.skipped[0]
    assert all(abs(value) < 1e38 for curve in loaded.curves.values() for _, value in curve)


@pytest.mark.parametrize("value", ["text", None, True, [1], {"a": 1}])
def test_metrics_that_are_no_numbers_are_no_curves(value: Any, run: Path) -> None:
    change_json(run / STATE, lambda s: s | {"log_history": [e | {"loss": value} for e in s["log_history"]]})
    loaded = load_run("x", run)
    assert "loss" not in loaded.curves and loaded.skipped == []


RESULT_VALUES = [None, "50", True, [], {}, TOO_LONG, 1e308, math.nan, math.inf]


@pytest.mark.parametrize(
    "field", ["mean", "difference", "difference_low", "p", "model", "benchmark", "metric", "baseline"]
)
@pytest.mark.parametrize("value", [*RESULT_VALUES, "gone"], ids=lambda value: f"{value!r:.9}")
def test_values_of_an_evaluation(field: str, value: Any, run: Path) -> None:
    def change(content: Any) -> Any:
        content["results"][1] |= {field: value}
        content["results"][1] = {k: v for k, v in content["results"][1].items() if v != "gone"}
        return content

    change_json(run / RESULTS, change)
    loaded = load_run("x", run)
    is_name = isinstance(value, str) and value != "gone" and field in ("model", "benchmark", "metric", "baseline")
    is_right = is_name or (field, value) == ("difference", "gone")
    assert len(loaded.skipped) == int(not is_right) and bool(loaded.results) == is_right
    assert all("results-demo.json" in reason for reason in loaded.skipped)


def set_value(name: str, value: float, dtype: Any = None) -> Callable[[pa.Table, dict[str, Any]], pa.Table]:
    def change(table: pa.Table, metadata: dict[str, Any]) -> pa.Table:
        column = table[name].combine_chunks()
        size = getattr(column.type, "list_size", None)
        numbers = (column.flatten() if size else column).to_numpy(zero_copy_only=False).copy()
        numbers = numbers.astype(dtype or numbers.dtype)
        numbers[7] = value
        array = pa.array(numbers)
        array = pa.FixedSizeListArray.from_arrays(array, size) if size else array
        return table.set_column(table.column_names.index(name), name, array)

    return change


def replace(name: str, make: Callable[[int], pa.Array]) -> Callable[[pa.Table, dict[str, Any]], pa.Table]:
    return lambda table, _: table.set_column(table.column_names.index(name), name, make(len(table)))


def lists(width: int) -> Callable[[int], pa.Array]:
    return lambda n: pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(n * width, np.float32)), width)


BAD_NUMBERS: list[tuple[str, float, Any]] = [
    *(("sample", value, np.int64) for value in (-1, 5, 2**40)),
    *(("position", value, np.int64) for value in (-1, 99)),
    *(("token", value, np.int64) for value in (-1, 77, 2**33)),
    *(("candidates", value, None) for value in (-3, 77)),
    *(("student_entropy", value, None) for value in (math.nan, math.inf)),
    ("forward_kl", 1e300, np.float64),
    ("student_logp", 5.0, None),
    *(("candidate_logps", value, np.float32) for value in (88.0, math.nan)),
    ("candidate_teacher_logps", -math.inf, None),
    ("teacher_mass", 2.0, np.float32),
]
NO_SAMPLES: list[Any] = [None, [], {}, "ab", [3, 4], [{"index": 0}]]
NO_PROMPTS: list[Any] = [3, "a", [-1], [0.5], [77], [2**40]]
NO_TEXTS: list[Any] = [None, [], {}, {"a": "b"}, {"1": 3}, "x"]
RECORD_CHANGES: dict[str, Callable[[pa.Table, dict[str, Any]], Any]] = {
    **{f"{name} {value}": set_value(name, value, dtype) for name, value, dtype in BAD_NUMBERS},
    "texts for numbers": replace("token", lambda n: pa.array(["a"] * n)),
    "floats for indices": replace("sample", lambda n: pa.array([0.0] * n)),
    "nulls": replace("divergence", lambda n: pa.nulls(n, pa.float32())),
    "one null": replace("divergence", lambda n: pa.array([None, *[0.0] * (n - 1)], pa.float32())),
    "null lists": replace("candidate_logps", lambda n: pa.nulls(n, pa.list_(pa.float32(), 10))),
    "lists of any size": replace("candidate_logps", lambda n: pa.array([[0.0] * i for i in range(n)])),
    "no candidates": replace("candidate_logps", lists(1)),
    "too many candidates": replace("candidate_logps", lists(300)),
    "fewer masses": replace("teacher_mass", lists(2)),
    "no rows": lambda table, _: table.slice(0, 0),
    "rows in another order": lambda table, _: table.take(list(range(11, -1, -1))),
    "a column is missing": lambda table, _: table.drop_columns(["forward_kl"]),
    "a column is there twice": lambda table, _: table.append_column("token", table["token"]),
    "no metadata": lambda table, _: table.replace_schema_metadata(None),
    "metadata that isn't JSON": lambda table, _: table.replace_schema_metadata({"tsdkd": "{"}),
    "nested metadata": lambda table, _: table.replace_schema_metadata({"tsdkd": "[" * 5000}),
    **{f"step {v!r:.9}": lambda _, m, v=v: m.update(step=v) for v in (None, "1", -1, 2**40, math.nan, [])},
    **{f"samples {v!r:.9}": lambda _, m, v=v: m.update(samples=v) for v in NO_SAMPLES},
    "many samples": lambda _, m: m.update(samples=m["samples"] + [{"index": 0, "prompt": []}] * 400_000),
    **{f"prompt {v!r:.9}": lambda _, m, v=v: m["samples"][0].update(prompt=v) for v in NO_PROMPTS},
    **{f"texts {v!r:.9}": lambda _, m, v=v: m.update(texts=v) for v in NO_TEXTS},
}


@pytest.mark.parametrize("change", RECORD_CHANGES)
def test_values_of_a_record(change: str, run: Path) -> None:
    """The other record is there."""
    path = run / RECORD
    table = pq.read_table(path)
    metadata = json.loads(table.schema.metadata[b"tsdkd"])
    changed = RECORD_CHANGES[change](table, metadata)
    if changed is None:
        changed = table.replace_schema_metadata({"tsdkd": json.dumps(metadata)})
    pq.write_table(changed, path)
    loaded = load_run("x", run)
    assert [record.step for record in loaded.records] == [2]
    assert len(loaded.skipped) == 1 and path.name in loaded.skipped[0]


def test_a_small_file_of_many_rows(run: Path) -> None:
    """Refused by its footer, before memory is taken."""
    table = pq.read_table(run / RECORD)
    pq.write_table(pa.concat_tables([table] * 90_000), run / RECORD, compression="zstd")
    loaded = load_run("x", run)
    assert len(loaded.records) == 1 and "1,080,000" in loaded.skipped[0]


@pytest.mark.parametrize(
    "value", ["1e999", "[1, [2]]", "{a: {b: c}}", "0x" + "f" * 5000, ".nan", "null", "2020-01-01", '"\\x1b"']
)
def test_any_configuration_is_shown(value: str, run: Path) -> None:
    (run / "tsdkd_config.yaml").write_text(f"method: tsd-kd\nbeta: {value}\n3: 4\n")
    for key in ("beta", "method", "nothing"):
        assert len(load_run("x", run).format_value(key)) < 300


@pytest.mark.parametrize("key", ["opener_ratio", "entropy_ratio", "gate_temperature", "entropy_threshold"])
@pytest.mark.parametrize("value", ["many", ".nan", ".inf", "-1e300", "[1]", "true", "1e300"])
def test_options_that_select_nothing(key: str, value: str, run: Path, capsys: Any) -> None:
    (run / "tsdkd_config.yaml").write_text(f"{key}: {value}\n")
    loaded = load_run("x", run)
    assert loaded.records == [] and f"tsdkd_config.yaml: {key}: must be" in loaded.skipped[0]
    (run / RESULTS).unlink()
    assert main(["analyze", str(run)]) == 2
    assert f"{key}: must be" in capsys.readouterr().err


NAMES = [
    "$\\frac{$",
    "_hidden",
    "[red]a[/]",
    "<script>alert(1)</script>".replace("/", ""),
    "a\x1b[31m\nb",
    "\udcff",
    "漢字",
]


@pytest.fixture
def others(tmp_path: Path) -> list[str]:
    return [str(make_run(tmp_path / name)) for name in NAMES]


def test_names_on_a_page_and_in_figures(others: list[str], tmp_path: Path, capsys: Any) -> None:
    """Nothing is left out for a name, whatever it has."""
    assert main(["report", *others, "--output_file", str(tmp_path / "page.html")]) == 0
    assert main(["analyze", *others, "--output_dir", str(tmp_path / "figures")]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "\x1b" not in out
    page = (tmp_path / "page.html").read_text()
    assert page.count("<figure>") == 11 and "<script>alert" not in page
    assert page.count("&lt;script&gt;alert") > 10 and page.count("_hidden") > 10 and "frac{$" in page
    assert len(list((tmp_path / "figures").glob("*.png"))) == 9


def test_everything_is_damaged(run: Path, capsys: Any) -> None:
    """A page and a line for each; without anything to show, `analyze` has nothing to do."""
    for path in [run / STATE, run / RESULTS, *(run / "records").iterdir()]:
        path.write_bytes(path.read_bytes()[:-50])
    assert main(["report", str(run)]) == 0
    err, page = capsys.readouterr().err.splitlines(), (run / "report.html").read_text()
    assert len(err) == 4 and all(line.startswith("left out: ") for line in err)
    assert page.count('<li class="warning">Left out') == 4
    assert main(["analyze", str(run)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_analyze_goes_on_without_a_damaged_record(run: Path, capsys: Any) -> None:
    (run / RECORD).write_text("no")
    assert main(["analyze", str(run)]) == 0
    assert "step-00000000.parquet" in capsys.readouterr().err
    assert json.loads((run / "figures/analysis.json").read_text())["policy_entropy"]["run"]["step"] == [2]


def test_hundreds_of_metrics_and_models(run: Path, capsys: Any, monkeypatch: Any) -> None:
    """The first ones are drawn, and it is said."""
    monkeypatch.setattr("tsdkd.report.charts._MAX_CHARTS", 5)
    monkeypatch.setattr("tsdkd.analysis.pass_at_k._MAX_PLOTS", 4)

    def entries(content: Any) -> Any:
        one = content["results"][0]
        many = [one | {"benchmark": f"b{i}", "model": f"m{i % 40}", "metric": "pass@2"} for i in range(300)]
        return content | {"results": many}

    change_json(run / RESULTS, entries)
    change_json(
        run / STATE,
        lambda s: s | {"log_history": [e | {f"entropy/{i}": 1e37 for i in range(700)} for e in s["log_history"]]},
    )
    assert main(["report", str(run)]) == 0
    err = capsys.readouterr().err
    assert "697 of 702 curves" in err and "300 benchmarks and 40 models" in err


@pytest.mark.parametrize("what", ["a pipe", "endless", "a folder"])
def test_a_report_is_written_to_a_file(what: str, run: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "page"
    NO_FILES[what](output)
    assert main(["report", str(run), "--output_file", str(output)]) == 2
    assert "--output_file" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a" * 300, "\0"])
def test_paths_that_cant_be(name: str, capsys: Any) -> None:
    for command in ("report", "analyze"):
        assert main([command, name]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


ROW = {"task": "t", "doc_id": 0, "scores": [1.0, 0.0], "responses": ["a", "b"], "samples": 2}


NO_ITEMS: dict[str, list[Any]] = {
    "doc_id": [[1], None, 1.5],
    "task": [{}, 3],
    "scores": [[TOO_LONG, 0], ["a", "b"], [math.nan, 1], 3, {"0": 1, "1": 1}],
    "responses": [3, [1]],
    "samples": ["2"],
}


@pytest.mark.parametrize(
    "change", [{name: v} for name, values in NO_ITEMS.items() for v in values], ids=lambda change: f"{change!r:.30}"
)
def test_items_of_an_evaluation(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    for line in (json.dumps(ROW | change), "[" * 5000, "3", "null"):
        path.write_text(json.dumps(ROW) + "\n" + line + "\n")
        with pytest.raises(OutputDirError, match=r"line 2 of .*items\.jsonl wasn't written"):
            ItemResults(path, {"samples": 2})


def write_comparison(folder: Path, runs: list[str]) -> tuple[str, dict[str, Path]]:
    """A comparison whose tasks are done, by hand."""
    from tsdkd.compare.config import read_comparison
    from tsdkd.compare.result_file import result_settings

    (folder / "base.yaml").write_text(
        yaml.safe_dump({"model_name_or_path": "a", "teacher_model_name_or_path": "b", "dataset_name": "c"})
    )
    content = {
        "config": str(folder / "base.yaml"),
        "output_dir": str(folder / "out"),
        "seeds": [1, 2],
        "eval_samples": 2,
    }
    content["runs"] = {name: {"beta": 0.1 * i} for i, name in enumerate(runs)}
    (folder / "comparison.yaml").write_text(yaml.safe_dump(content))
    comparison = read_comparison(str(folder / "comparison.yaml"))
    paths = {}
    for task in comparison.tasks:
        metrics = {"greedy": 50.0, "avg@2": 50.0, "pass@2": 75.0, "length": 9.0, "entropy": 0.5, "train_seconds": 1.0}
        result = {"run": task.run, "seed": task.seed, **metrics, "samples_right": [0, 1, 2, 1]}
        task.folder.mkdir(parents=True)
        paths[task.title] = task.folder / "result.json"
        paths[task.title].write_text(json.dumps(result | {"settings": result_settings(comparison, task)}))
    return str(folder / "comparison.yaml"), paths


NO_RESULTS: dict[str, list[Any]] = {
    "greedy": [None, "50", math.nan, TOO_LONG, -1],
    "avg@2": [1e308, 50.5],
    "pass@2": [74.9],
    "greedy_right": [[1, 0, 0, 0], [2, 0, 0, 0], "1010"],
    "length": [True],
    "entropy": [math.inf],
    "train_seconds": [[]],
    "samples_right": [None, [], [1, 2], [0, 1, 2, 3], [0, 1, 2, TOO_LONG], ["a"] * 4, [[1]] * 4],
    "run": ["teacher"],
    "seed": [5],
    "settings": [[], None],
}
RESULT_CHANGES = [{name: value} for name, values in NO_RESULTS.items() for value in values]


def test_thousands_of_results(run: Path) -> None:
    """The first ones of a sane size are shown, and how many more there are."""
    for number in range(300):
        (run / f"results-a{number:03}.json").write_text((run / RESULTS).read_text())
        (run / f"results-a{number:03}.md").write_text("|x|\n" * (100_000 if number == 0 else 5))
    loaded = load_run("x", run)
    assert len(loaded.result_tables) == 23 and "results-a000.md" in " ".join(loaded.skipped)
    assert any("277 results of evaluations" in reason for reason in loaded.skipped)


@pytest.mark.parametrize("name", ["figures/gate.png", "figures/.gate.png.new", "figures/analysis.json", "report.html"])
def test_links_in_a_run_are_not_followed(name: str, run: Path, tmp_path: Path) -> None:
    """A stranger's run doesn't choose what is overwritten."""
    precious = tmp_path / "precious.txt"
    precious.write_text("mine <footer>Written by tsdkd ")
    (run / "figures").mkdir()
    (run / name).symlink_to(precious)
    assert main(["report", str(run)]) == 0 and main(["analyze", str(run)]) == 0
    assert precious.read_text() == "mine <footer>Written by tsdkd " and not (run / name).is_symlink()


def test_results_of_a_comparison(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """Each damaged one is left out of the table; names are text."""
    name, paths = write_comparison(tmp_path, ["plain", "a|b\n| forged |", "$x$_[red]\x1b[31m"])
    assert main(["compare", "--config", name, "--report"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "\x1b" not in out and not any(line.startswith("| forged") for line in out.splitlines())
    assert r"| a\|b\n\| forged \| |" in out and len((tmp_path / "out/results.jsonl").read_text().splitlines()) == 8
    path = paths["plain, seed 2"]
    text = path.read_text()
    for change in RESULT_CHANGES:
        path.write_text(text)
        change_json(path, lambda result, change=change: result | change)
        with monkeypatch.context() as patch:  # a table and a plot of each take seconds
            patch.setattr("tsdkd.compare.results.plot_accuracy", lambda *_: None)
            assert main(["compare", "--config", name, "--report"]) == 0, change
        err = capsys.readouterr().err
        assert err.count("left out: ") == len(err.splitlines()) == 1 and ("seed-2" in err or "seed 2" in err), change
        assert len((tmp_path / "out/results.jsonl").read_text().splitlines()) == 7


@pytest.mark.parametrize("how", NO_FILES)
def test_result_files_of_a_comparison(how: str, tmp_path: Path, capsys: Any) -> None:
    name, paths = write_comparison(tmp_path, ["plain"])
    for path in paths.values():
        path.unlink()
        NO_FILES[how](path)
    assert main(["compare", "--config", name, "--report"]) == 0
    assert capsys.readouterr().err.count("left out: ") == len(paths)
