"""What training records of tokens, against the models' own logits, and the papers' figures from it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

import reference as ref
from conftest import QUIET, flags, weights
from tsdkd.analysis.load import read_records
from tsdkd.cli import main
from tsdkd.evaluation.results import BenchmarkResult, write_results
from tsdkd.evaluation.suites import select_benchmarks


@pytest.fixture(scope="module")
def run(saved_model: Any, rows_file: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Four steps, recorded every second one."""
    folder = tmp_path_factory.mktemp("recorded") / "run"
    values = {
        **QUIET,
        "model_name_or_path": saved_model("qwen3", 0),
        "teacher_model_name_or_path": saved_model("llama", 1),
    }
    values |= {"dataset_name": rows_file, "max_steps": 4, "max_new_tokens": 10, "per_device_train_batch_size": 4}
    values |= {"record_steps": 2, "record_completions": 3, "beta": 0.7, "opener_ratio": 0.3}
    assert main(["train", *flags(**values, output_dir=folder)]) == 0
    models = {"student": values["model_name_or_path"], "teacher": values["teacher_model_name_or_path"]}
    return {"folder": folder, "values": values, **models}


def logits(model: str, prompt: list[int], completion: list[int], size: int) -> list[list[float]]:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    with torch.no_grad():
        found = loaded(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1, :size]
    return found.double().tolist()


def test_columns_are_what_the_models_say(run: dict[str, Any]) -> None:
    """The first record is of the student before any update."""
    first = read_records(run["folder"])[0]
    assert first.step == 0 and len(first.samples) == 3
    columns = first.columns
    for i, sample in enumerate(first.samples):
        own = columns["sample"] == i
        completion = columns["token"][own].tolist()
        assert columns["position"][own].tolist() == list(range(len(completion)))
        students, teachers = (logits(run[who], sample["prompt"], completion, 64) for who in ("student", "teacher"))
        for t, (q, p) in enumerate(zip(students, teachers, strict=True)):
            row = {name: values[own][t] for name, values in columns.items()}
            ours, theirs = ref.log_softmax(q), ref.log_softmax(p)
            assert row["student_entropy"] == pytest.approx(ref.token_entropy(q), rel=1e-4)
            assert row["teacher_entropy"] == pytest.approx(ref.token_entropy(p), rel=1e-4)
            assert row["student_logp"] == pytest.approx(ours[completion[t]], rel=1e-4)
            assert row["teacher_logp"] == pytest.approx(theirs[completion[t]], rel=1e-4)
            assert row["divergence"] == pytest.approx(ref.generalized_jsd(q, p, beta=0.7), rel=1e-3)
            assert row["forward_kl"] == pytest.approx(ref.topk_forward_kl(q, p, 16), rel=1e-3, abs=1e-6)
            best = sorted(range(64), key=lambda v: -q[v])[:10]
            assert row["candidates"].tolist() == best
            assert row["candidate_logps"] == pytest.approx([ours[v] for v in best], abs=5e-3)
            assert row["candidate_teacher_logps"] == pytest.approx([theirs[v] for v in best], abs=5e-3)
            probabilities = sorted(np.exp(theirs), reverse=True)
            assert row["teacher_mass"] == pytest.approx([sum(probabilities[: 2**i]) for i in range(7)], abs=1e-3)


def test_what_the_method_makes_of_them(run: dict[str, Any]) -> None:
    """With the run's own options."""
    record = read_records(run["folder"])[0]
    for i in range(3):
        own = record.columns["sample"] == i
        ours, theirs = (record.columns[f"{who}_entropy"][own].tolist() for who in ("student", "teacher"))
        count = ref.opener_length(ours, 0.3)
        assert record.is_opener[own].tolist() == [t < count for t in range(len(ours))]
        assert np.flatnonzero(record.is_high_entropy[own]).tolist() == sorted(ref.top_entropy_positions(ours, 0.1))
        assert record.gate[own] == pytest.approx(
            [ref.sigmoid(a - b) for a, b in zip(ours, theirs, strict=True)], rel=1e-5
        )
        assert record.is_triggered[own].tolist() == [b > 0.8 for b in theirs]
        for t, logps in enumerate(record.columns["candidate_teacher_logps"][own]):
            pairs = [np.sign(logps[a] - logps[b]) for a in range(10) for b in range(a + 1, 10)]
            assert record.kendall_tau[own][t] == pytest.approx(np.mean(pairs))


def test_recording_changes_nothing(run: dict[str, Any], tmp_path: Path) -> None:
    """Bit by bit, the student is that of a run without records."""
    values = {name: value for name, value in run["values"].items() if not name.startswith("record_")}
    assert main(["train", *flags(**values, output_dir=tmp_path)]) == 0
    assert not (tmp_path / "records").exists()
    assert torch.equal(weights(tmp_path), weights(run["folder"]))


@pytest.mark.parametrize(("method", "beta"), [("gkd", 0.7), ("opd", 0.9), ("distillm", 0.9)])
def test_the_recorded_divergence_is_the_method_s(
    method: str, beta: float, run: dict[str, Any], rows_file: str, tmp_path: Path
) -> None:
    """TSD-KD's where the method has none, whatever TRL's configuration has; in training and of any two models."""
    values = {**run["values"], "method": method, "record_steps": 1, "max_steps": 1, "record_completions": 1}
    values = {name: value for name, value in values.items() if name not in ("beta", "opener_ratio")}
    values |= {"beta": beta} if method == "gkd" else {}
    values |= {"rollout_batch_size": 4} if method == "opd" else {}
    assert main(["train", *flags(**values, output_dir=tmp_path / "run")]) == 0
    names = ("model_name_or_path", "teacher_model_name_or_path", "dataset_name", "max_new_tokens", "use_cpu", "bf16")
    (tmp_path / "pair.yaml").write_text(json.dumps({n: values[n] for n in (*names, "method", "beta") if n in values}))
    command = ["analyze", "--config", str(tmp_path / "pair.yaml"), "--output_dir", str(tmp_path / "look")]
    assert main([*command, "--limit", "1"]) == 0
    for folder in ("run", "look"):
        record = read_records(tmp_path / folder)[0]
        prompt, completion = record.samples[0]["prompt"], record.columns["token"].tolist()
        students, teachers = (logits(run[who], prompt, completion, 64) for who in ("student", "teacher"))
        expected = [ref.generalized_jsd(q, p, beta=beta) for q, p in zip(students, teachers, strict=True)]
        assert record.columns["divergence"] == pytest.approx(expected, rel=1e-3)


def test_records_are_of_every_second_step_and_small(run: dict[str, Any]) -> None:
    steps = [record.step for record in read_records(run["folder"])]
    assert steps == [0, 2]
    sizes = [path.stat().st_size for path in (run["folder"] / "records").glob("*.parquet")]
    tokens = [len(record.columns["token"]) for record in read_records(run["folder"])]
    assert all(size < 30_000 + 200 * n for size, n in zip(sizes, tokens, strict=True))


def test_texts_are_there(run: dict[str, Any]) -> None:
    """Nobody needs the tokenizer to read a record."""
    record = read_records(run["folder"])[0]
    ids = {*record.columns["token"].tolist(), *record.columns["candidates"].flatten().tolist()}
    assert ids <= record.texts.keys()
    metadata = pq.read_schema(min((run["folder"] / "records").glob("*.parquet"))).metadata
    assert json.loads(metadata[b"tsdkd"])["step"] == 0


def test_figures_of_two_runs(run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(run["folder"])
    assert main(["analyze", folder, folder + "/", "--output_dir", str(tmp_path)]) == 0
    numbers = json.loads((tmp_path / "analysis.json").read_text())
    assert len(list(tmp_path.glob("*.png"))) == len(numbers) == 8
    record = read_records(run["folder"])[-1]
    (found,) = {json.dumps(value) for value in numbers["entropy_histogram"].values()}
    above = json.loads(found)["student"]["above"]
    assert above == pytest.approx((record.columns["student_entropy"] >= 1.0).mean())
    assert "entropy_by_position.png" in capsys.readouterr().out


def test_numbers_of_the_figures(run: dict[str, Any], tmp_path: Path) -> None:
    """By loops over the records' rows."""
    assert main(["analyze", str(run["folder"]), "--output_dir", str(tmp_path)]) == 0
    numbers = {name: of.get("run", of) for name, of in json.loads((tmp_path / "analysis.json").read_text()).items()}
    records = read_records(run["folder"])

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    for i, record in enumerate(records):
        ours, theirs, fkl = (record.columns[n].tolist() for n in ("student_entropy", "teacher_entropy", "forward_kl"))
        assert numbers["policy_entropy"]["value"][i] == pytest.approx(mean(ours))
        assert numbers["uncertain_share"]["value"][i] == pytest.approx(mean([float(h > 0.8) for h in theirs]))
        uncertain = [kl for kl, h in zip(fkl, theirs, strict=True) if h > 0.8]
        assert numbers["uncertain_forward_kl"]["value"][i] == pytest.approx(mean(uncertain))
    assert numbers["policy_entropy"]["step"] == [record.step for record in records] == [0, 2]
    last = records[-1]
    places: list[list[float]] = [[] for _ in range(20)]
    for sample, t, h in zip(
        *(last.columns[n].tolist() for n in ("sample", "position", "student_entropy")), strict=True
    ):
        places[20 * t // int(last.lengths[sample])].append(h)
    assert numbers["entropy_by_position"]["student"] == [mean(p) if p else None for p in places]
    masses = [mean([mean(r.columns["teacher_mass"][:, j].tolist()) for r in records]) for j in range(7)]
    assert numbers["top_k_mass"]["mass"]["run"] == pytest.approx(masses, rel=1e-4)
    assert numbers["top_k_mass"]["bytes"] == [12 * 2**j for j in range(7)]
    flags_of = [last.is_opener[last.columns["sample"] == i].tolist() for i in range(3)]
    assert numbers["opener_length"] == {"length": [sum(f) for f in flags_of], "of": [len(f) for f in flags_of]}
    share = mean([float(0.475 <= g < 0.5) for g in last.gate.tolist()])
    assert numbers["gate"][19] == pytest.approx(share)


def test_pass_at_k_of_evaluations(run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a directory of `tsdkd eval`, and of one inside a run."""
    (benchmark,) = select_benchmarks("demo", ["demo"])
    right = np.arange(4) < np.array([0, 1, 4])[:, None]
    write_results([BenchmarkResult("a", benchmark, right * 1.0)], {"a": "a"}, "a", tmp_path / "eval-1", "demo")
    chances = {1: (0 + 1 / 4 + 1) / 3, 2: (0 + 1 / 2 + 1) / 3, 4: (0 + 1 + 1) / 3}
    for folder in (tmp_path / "eval-1", tmp_path):
        assert main(["analyze", str(folder), "--output_dir", str(tmp_path / "figures")]) == 0
        found = json.loads((tmp_path / "figures/analysis.json").read_text())
        assert found["pass_at_k"]["demo"]["a"]["k"] == [1, 2, 4]
        assert found["pass_at_k"]["demo"]["a"]["percent"] == pytest.approx([100 * x for x in chances.values()])
    assert [path.name for path in (tmp_path / "figures").glob("*.png")] == ["pass_at_k.png"]
    (tmp_path / "results-demo.json").write_text('{"results": [{}]}')
    assert main(["analyze", str(tmp_path)]) == 0
    assert "left out: " in capsys.readouterr().err
    shutil.rmtree(tmp_path / "eval-1")
    assert main(["analyze", str(tmp_path)]) == 2
    assert "results-demo.json wasn't written by tsdkd eval" in capsys.readouterr().err


def test_any_two_models(
    run: dict[str, Any], rows_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"model_name_or_path": run["student"], "teacher_model_name_or_path": run["teacher"], "use_cpu": True}
    values |= {"dataset_name": rows_file, "max_new_tokens": 10, "bf16": False}
    config = tmp_path / "pair.yaml"
    config.write_text(json.dumps(values))
    command = ["analyze", "--config", str(config), "--output_dir", str(tmp_path / "look"), "--limit", "5"]
    assert main(command) == 0
    (record,) = read_records(tmp_path / "look")
    assert len(record.samples) == 5 and record.step == 0
    before = {path: path.stat().st_mtime_ns for path in run["folder"].rglob("*")}
    for folder in (tmp_path / "look", run["folder"]):  # whose records are another's
        assert main(["analyze", "--config", str(config), "--output_dir", str(folder)]) == 2
        assert "output_dir" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in run["folder"].rglob("*")}
    assert len(list((tmp_path / "look/figures").glob("*.png"))) == 8


def test_bad_input(run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, found in (
        (["analyze"], "name folders of runs"),
        (["analyze", str(tmp_path / "nowhere")], "no such directory"),
        (["analyze", str(tmp_path)], "has no records"),
        (["analyze", "--gate", "false", str(run["folder"])], "--gate: only with --config"),
        (["analyze", str(run["folder"]), "--gate"], "--gate: only with --config"),
        (["analyze", str(run["folder"]), "--limit", "5"], "--limit: only with --config"),
    ):
        assert main(command) == 2
        assert found in capsys.readouterr().err
    (tmp_path / "records").mkdir()
    (tmp_path / "records/step-00000000.parquet").write_text("no")
    assert main(["analyze", str(tmp_path)]) == 2
    assert "isn't a record" in capsys.readouterr().err
    for text in ("", "a: [", "opener_ratio: many"):
        (tmp_path / "tsdkd_config.yaml").write_text(text)
        assert main(["analyze", str(tmp_path)]) == 2
        assert "tsdkd_config.yaml" in capsys.readouterr().err
