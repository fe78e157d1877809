"""`tsdkd compare` with a grid that is chosen on validation problems, with several temperatures, and its statistics."""

import csv
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import tsdkd
from conftest import make_rows, on_cpus, write_jsonl
from tsdkd.cli import main
from tsdkd.compare.config import read_comparison
from tsdkd.errors import ConfigError

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.usefixtures("preloaded")

T_QUANTILES = {2: 12.706204736, 3: 4.302652730, 5: 2.776445105}  # 0.975, by number of seeds


@pytest.fixture
def grid_comparison(comparison: Callable[..., str], tmp_path: Path) -> Callable[..., str]:
    """Writes a comparison whose learning rate is chosen on problems of its own; returns its path."""
    problems = write_jsonl(tmp_path / "validation.jsonl", make_rows(12, seed=4))

    def write(**changes: object) -> str:
        grid = {"learning_rate": ["1e-3", 0.01, 0.02]}
        values: dict[str, Any] = {"grid": grid, "validation_dataset_name": problems}
        values |= {"seeds": [1], "runs": {"plain": {"method": "gkd"}}}
        return comparison(**{**values, **changes})

    return write


def by_hand(name: str, values: dict[tuple[str, int], float] | None = None, **others: Any) -> dict[str, Path]:
    """Write the results of all tasks that need no choice, as their runs would, with an avg@4 of `values` (else 40).

    Returns title -> file.
    """
    from tsdkd.compare.result_file import result_settings

    comparison = read_comparison(name)
    files = {}
    for task in [task for task in comparison.tasks if task.is_validation or task.seed is None or not comparison.grid]:
        accuracy = (values or {}).get((task.run, task.seed), 40.0) if not task.is_validation else 40.0
        result = {"run": task.run, "seed": task.seed, "greedy": 50.0, **measured(accuracy)}
        result |= {"length": 9.0, "entropy": 0.5, "train_seconds": 1.0, **others}
        task.folder.mkdir(parents=True)
        files[task.title] = task.folder / "result.json"
        files[task.title].write_text(json.dumps(result | {"settings": result_settings(comparison, task)}))
    return files


def measured(accuracy: float) -> dict[str, Any]:
    """Right samples of four for each of 50 problems, and their avg@4 (in steps of half a point) and pass@4."""
    counts = [(round(2 * accuracy) + i) // 50 for i in range(50)]
    assert sum(counts) == 2 * accuracy
    return {"avg@4": accuracy, "pass@4": 2.0 * sum(count > 0 for count in counts), "samples_right": counts}


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_the_best_on_the_validation_problems_is_trained(
    grid_comparison: Callable[..., str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With other seeds; of the grid's runs, only the results are kept; what is finished isn't done again."""
    name, out = grid_comparison(eval_temperatures=[1.0, 0.5], eval_top_p=0.9), tmp_path / "out"
    for task in range(5):
        assert main(["compare", "--config", name, "--task", str(task)]) == 0
    folders = [out / f"plain/grid/learning_rate={value}/seed-101" for value in (0.001, 0.01, 0.02)]
    for folder in folders:
        assert os.listdir(folder) == ["result.json"]
        assert json.loads((folder / "result.json").read_text())["grid_values"].keys() == {"learning_rate"}
    assert not (out / "plain/seed-1").exists()
    perfect = dict.fromkeys(("avg@2", "pass@1", "pass@2"), 100.0)
    change(folders[1] / "result.json", **perfect, samples_right=[2] * 12)
    before = [(folder / "result.json").stat().st_mtime_ns for folder in folders]
    capfd.readouterr()
    assert main(["compare", "--config", name]) == 0
    printed = capfd.readouterr()
    assert "5 of 6 tasks are finished, 1 remain" in printed.out and "edge" not in printed.out + printed.err
    assert "plain: the grid chooses learning_rate=0.01 (avg@2 100.0)" in printed.out
    assert [(folder / "result.json").stat().st_mtime_ns for folder in folders] == before
    trained = yaml.safe_load((out / "plain/seed-1/tsdkd_config.yaml").read_text())
    assert (trained["learning_rate"], trained["seed"]) == (0.01, 1)
    (result,) = (r for r in results(out) if r["run"] == "plain")
    assert result["grid_values"] == {"learning_rate": 0.01} and len(result["samples_right T=0.5"]) == 12
    table = (out / "results.md").read_text()
    assert "| learning_rate=0.01 | **100.0** |" in table and "avg@2 T=0.5" in table


def test_two_processes_share_a_grid(grid_comparison: Callable[..., str], tmp_path: Path) -> None:
    """Each final run needs the whole grid; each point is trained once."""
    name = grid_comparison(seeds=[1, 2], grid={"learning_rate": [0.001, 0.01]})
    pipes: dict[str, Any] = {"env": on_cpus(), "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [sys.executable, "-m", "tsdkd", "compare", "--config", name, "--task"]
    processes = [subprocess.Popen([*command, task], **pipes) for task in ("4", "5")]
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert sum(text.count("saved the student") for text in said) == 4
    assert all("the grid chooses learning_rate" in text for text in said)
    assert all((tmp_path / f"out/plain/seed-{seed}/result.json").exists() for seed in (1, 2))


def test_a_failed_point_leaves_the_run_out(
    grid_comparison: Callable[..., str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It isn't chosen from the others; other runs go on."""
    rows = write_jsonl(tmp_path / "empty.jsonl", [{"prompt": ""}])
    runs = {"bad": {"dataset_name": rows}, "plain": {"method": "gkd"}}
    name = grid_comparison(runs=runs, eval_samples=4)
    files = by_hand(name)
    files["bad, learning_rate=0.02, seed 101"].unlink()
    assert main(["compare", "--config", name]) == 1
    printed = capfd.readouterr()
    assert "bad, learning_rate=0.02, seed 101: failed, see " in printed.err and "bad, seed 1" not in printed.err
    assert "bad: the grid chooses" not in printed.out and (tmp_path / "out/plain/seed-1/result.json").exists()


def test_a_choice_at_the_edge_is_told(
    grid_comparison: Callable[..., str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Only of numbers, and of more than two; the mean over seeds decides, and the first of equals."""
    from tsdkd.compare.grid import describe_edge, search_grid

    grid = {"learning_rate": [0.01, 0.001, 0.02], "beta": [0.1, 0.9], "lr_scheduler_type": ["constant", "linear"]}
    name = grid_comparison(grid=grid, validation_seeds=[101, 102], eval_samples=4)
    files = by_hand(name)
    comparison = read_comparison(name)
    assert search_grid(comparison, "plain").best == 0 and describe_edge(search_grid(comparison, "plain")) is None
    point = "plain, learning_rate=0.02, beta=0.9, lr_scheduler_type=linear"
    change(files[f"{point}, seed 101"], **measured(60.0))
    change(files["plain, learning_rate=0.001, beta=0.1, lr_scheduler_type=linear, seed 102"], **measured(59.0))
    search = search_grid(comparison, "plain")
    assert search.best == 11 and search.means[11] == 50.0 and search.edges == ["learning_rate=0.02"]
    files[f"{point}, seed 102"].unlink()
    assert search_grid(comparison, "plain").best is None
    assert main(["compare", "--config", name, "--report"]) == 0
    assert "**" not in (tmp_path / "out/results.md").read_text()


def write_final(files: dict[str, Path], folder: Path) -> Path:
    """The result that the run with seed 1 would have with a learning rate of 0.001."""
    final = folder / "out/plain/seed-1/result.json"
    final.parent.mkdir()
    final.write_text(files["plain, learning_rate=0.001, seed 101"].read_text())
    settings = json.loads(final.read_text())["settings"] | {"seed": 1, "eval_limit": None}
    settings["eval_dataset_name"] = None
    del settings["validation_dataset_name"], settings["validation_limit"]
    change(final, seed=1, settings=settings)
    return final


def test_a_grid_may_grow(
    grid_comparison: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its finished points are kept, and the runs until it has chosen again. A run of another choice isn't: the message
    says what to delete."""
    name = grid_comparison(eval_samples=4)
    files = by_hand(name)
    final = write_final(files, tmp_path)
    assert main(["compare", "--config", name, "--report"]) == 0
    assert [r["run"] for r in results(tmp_path / "out")] == ["student", "teacher", "plain"]
    before = (tmp_path / "out/results.jsonl").read_text()
    name = grid_comparison(eval_samples=4, grid={"learning_rate": [0.001, 0.01, 0.02, 0.0005]})
    capsys.readouterr()
    assert main(["compare", "--config", name, "--report"]) == 0
    assert (tmp_path / "out/results.jsonl").read_text() == before
    (line,) = capsys.readouterr().err.splitlines()
    assert "plain: its grid isn't finished" in line and line.endswith("those with learning_rate=0.001")
    name = grid_comparison(eval_samples=4, grid={"learning_rate": [0.01, 0.02, 0.0005]})
    assert main(["compare", "--config", name, "--report"]) == 0
    assert f"left out: {final}: {{'learning_rate': 0.001}} is none of the grid's points" in capsys.readouterr().err
    name = grid_comparison(eval_samples=4)
    change(files["plain, learning_rate=0.02, seed 101"], **measured(70.0))
    capsys.readouterr()
    assert main(["compare", "--config", name, "--report"]) == 2
    error = capsys.readouterr().err
    assert "learning_rate was 0.001, now 0.02" in error and f"delete {final.parent.parent}/seed-*" in error


@pytest.mark.parametrize("is_json", [False, True])
def test_a_damaged_point_leaves_the_runs_in_the_table(
    is_json: bool, grid_comparison: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = grid_comparison(eval_samples=4)
    files = by_hand(name)
    write_final(files, tmp_path)
    assert main(["compare", "--config", name, "--report"]) == 0
    before = (tmp_path / "out/results.jsonl").read_text()
    point = files["plain, learning_rate=0.01, seed 101"]
    text = point.read_text()
    point.write_text(text.replace('"avg@4": 40.0', '"avg@4": 41.0') if is_json else text[:20])
    capsys.readouterr()
    assert main(["compare", "--config", name, "--report"]) == 0
    assert (tmp_path / "out/results.jsonl").read_text() == before
    error = capsys.readouterr().err
    assert error.count(f"left out: {point} is damaged") == 1 and "delete it to evaluate the task again" in error


def test_a_result_that_is_gone_is_named(
    grid_comparison: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tables had it."""
    name = grid_comparison(eval_samples=4)
    final = write_final(by_hand(name), tmp_path)
    assert main(["compare", "--config", name, "--report"]) == 0
    assert capsys.readouterr().err == ""
    final.unlink()
    assert main(["compare", "--config", name, "--report"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "left out: plain, seed 1: the earlier results.jsonl has it" in line


def test_points_with_other_problems_are_not_compared(
    grid_comparison: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As when the file of the validation problems has grown."""
    name = grid_comparison(eval_samples=4)
    files = by_hand(name)
    point = files["plain, learning_rate=0.02, seed 101"]
    change(point, **{"avg@4": 50.0, "pass@4": 50.0}, samples_right=[4, 0])
    assert main(["compare", "--config", name, "--task", "5"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "problems" in line]
    assert "plain: the grid's points have different numbers of validation problems: 50 in " in line
    assert f"2 in {point}" in line and not (tmp_path / "out/plain/seed-1").exists()


def test_a_finished_student_of_another_choice_is_not_evaluated(
    grid_comparison: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed between training and evaluation, then another point is better."""
    name = grid_comparison(eval_samples=4)
    files = by_hand(name)
    command, final = ["compare", "--config", name, "--task", "5"], tmp_path / "out/plain/seed-1/result.json"
    assert main(command) == 0
    final.unlink()
    change(files["plain, learning_rate=0.02, seed 101"], **measured(70.0))
    capsys.readouterr()
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "learning_rate was 0.001, now 0.02" in error and f"delete {final.parent.parent}/seed-*" in error
    assert not final.exists()
    (final.parent / "trainer_state.json").unlink()  # an unfinished run
    assert main(command) == 2
    assert f"delete {final.parent.parent}/seed-*" in capsys.readouterr().err


def test_the_form_of_a_prompt_does_not_matter(
    grid_comparison: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A string, or a list with one user message."""
    tested = make_rows(12, seed=3)[5]
    messages = [{"role": "user", "content": f"{tested['prompt']} "}]
    shared = write_jsonl(tmp_path / "shared.jsonl", [{"prompt": messages, "answer": "1"}])
    assert main(["compare", "--config", grid_comparison(validation_dataset_name=shared)]) == 2
    assert "validation_dataset_name: 1 of its 1 prompts" in capsys.readouterr().err


def test_answers_are_tried_before_the_training(
    grid_comparison: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By the grader, which would refuse them only in the evaluation."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "grader_of_whole_numbers.py").write_text(
        "def grade(completion, answer):\n    return completion == str(int(answer))\n"
    )
    rows = [{"prompt": "1 + 1", "answer": "2"}, {"prompt": "1 + 2", "answer": "three"}]
    problems = write_jsonl(tmp_path / "wrong.jsonl", rows)
    settings = {"grader": "grader_of_whole_numbers:grade"}
    name = grid_comparison(validation_dataset_name=problems, settings=settings)
    assert main(["compare", "--config", name, "--task", "2"]) == 2
    error = capsys.readouterr().err
    assert f"validation_dataset_name {problems}: grader" in error and "row 1" in error
    assert not (tmp_path / "out/plain/grid/learning_rate=0.001/seed-101").exists()


def test_problems_that_choose_are_not_those_that_test(
    grid_comparison: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the prompt; only the problems that are used count."""
    rows = [*make_rows(6, seed=4), make_rows(12, seed=3)[5] | {"answer": "77"}]
    shared = write_jsonl(tmp_path / "shared.jsonl", rows)
    name = grid_comparison(validation_dataset_name=shared)
    for command in ([], ["--task", "2"]):
        assert main(["compare", "--config", name, *command]) == 2
        error = capsys.readouterr().err
        assert "validation_dataset_name: 1 of its 7 prompts" in error and "row 6" in error
    assert not list(tmp_path.rglob("*.log")) and not list(tmp_path.rglob("model*.safetensors"))
    from tsdkd.compare.task import load_problems

    for limits in ({"validation_limit": 6}, {"eval_limit": 5}):
        problems = load_problems(read_comparison(grid_comparison(validation_dataset_name=shared, **limits)))
        assert len(problems["validation"]) == limits.get("validation_limit", 7)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"grid": {"learning_rate": []}}, ["grid: learning_rate", "list of values", "[]"]),
        ({"grid": {"learning_rate": 0.1}}, ["grid: learning_rate", "list of values", "0.1"]),
        ({"grid": {"learning_rate": [0.1]}}, ["grid", "single point"]),
        ({"grid": {"learning_rate": ["1e-3", 0.001]}}, ["grid: learning_rate: 0.001 is listed twice"]),
        ({"grid": {"learning_rate": ["high", 0.1]}}, ["grid: learning_rate", "number", "'high'"]),
        ({"grid": {"lerning_rate": [1, 2]}}, ["grid: lerning_rate", "did you mean 'learning_rate'"]),
        ({"grid": {"beta": [0.1, 7]}}, ["grid: beta", "7"]),
        ({"grid": {"gate": [True, False]}}, ["grid: gate", "belongs to method tsd-kd"]),
        ({"grid": {"seed": [1, 2]}}, ["grid: seed", "the comparison sets it"]),
        ({"grid": {"learning_rate": [i / 1e6 for i in range(1, 1002)]}}, ["grid", "1000", "1001"]),
        ({"runs": {"a": {"learning_rate": 0.1}, "b": {}}}, ["runs: a: learning_rate", "the grid sets it"]),
        ({"settings": {"learning_rate": 0.1}}, ["settings: learning_rate", "the grid sets it"]),
        (
            {"grid": {"max_completion_length": [4, 8]}, "settings": {"max_new_tokens": 8}},
            ["settings: max_completion_length", "the grid sets it"],
        ),
        ({"validation_dataset_name": None}, ["validation_dataset_name: missing"]),
        ({"validation_seeds": []}, ["validation_seeds", "at least one"]),
        ({"validation_seeds": 7}, ["validation_seeds", "list", "7"]),
        ({"validation_seeds": [1]}, ["validation_seeds: 1 is also one of seeds"]),
        ({"validation_seeds": [5, 5]}, ["validation_seeds", "twice"]),
        ({"validation_metric": "avg@8"}, ["validation_metric", "avg@2", "'avg@8'"]),
        ({"validation_metric": "entropy"}, ["validation_metric", "greedy", "'entropy'"]),
        ({"validation_limit": 0}, ["validation_limit", "at least 1"]),
        ({"grid": None}, ["validation_dataset_name: has no effect without a grid"]),
        ({"eval_temperatures": [0.6]}, ["eval_temperatures", "one of them 1.0", "0.6"]),
        ({"eval_temperatures": [1.0, 0.6, 0.6]}, ["eval_temperatures", "different"]),
        ({"eval_temperatures": [1.0, 0.0]}, ["eval_temperatures", "0.01"]),
    ],
    ids=str,
)
def test_a_grid_that_could_not_run(
    changes: dict[str, Any], found: list[str], grid_comparison: Callable[..., str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_comparison(grid_comparison(**changes))
    assert len(caught.value.problems) == 1
    assert all(text in caught.value.problems[0] for text in found), str(caught.value)


def test_a_validation_seed_is_found(grid_comparison: Callable[..., str]) -> None:
    assert read_comparison(grid_comparison()).validation_seeds == [101]
    comparison = read_comparison(grid_comparison(seeds=[101, 102, 7]))
    assert comparison.validation_seeds == [103] and comparison.validation_metric == "avg@2"


def test_a_grid_as_an_array(
    grid_comparison: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`bash` submits it in two parts, with a stand-in for sbatch; as a job, it runs its task."""
    script, name = tmp_path / "job.sbatch", grid_comparison(seeds=[1, 2])
    command = ["compare", "--config", name, "--slurm", "--gpus_per_node", "0", "--output_file", str(script)]
    assert main(command) == 0
    assert f"submit it with: bash {script}" in capsys.readouterr().out
    assert "#SBATCH --array=0-6\n" in script.read_text()
    (tmp_path / "bin").mkdir()
    for stand_in in ("sbatch", "srun"):
        (tmp_path / "bin" / stand_in).write_text('#!/bin/bash\necho "$@" >> "$LOG"; echo "17;cluster"\n')
        (tmp_path / "bin" / stand_in).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    subprocess.run(["bash", script], check=True)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "6")
    subprocess.run(["bash", script], check=True)
    assert (tmp_path / "log").read_text().splitlines() == [
        f"--parsable --array=0-4 {script}",
        f"--array=5-6 --dependency=afterany:17 {script}",
        f"tsdkd compare --config {name} --task 6",
    ]


# Statistics ----------------------------------------------------------------------------------------------------------


def test_results_of_an_earlier_version_go_on(
    comparison: Callable[..., str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """They have neither the other k of pass@k, which follow from their counts, nor the new settings."""
    name = comparison(eval_samples=4)
    files = by_hand(name)
    for path in files.values():
        result = json.loads(path.read_text())
        assert not result.keys() & {"pass@1", "pass@2", "greedy_right"}
        assert not result["settings"].keys() & {"eval_temperatures", "grid", "validation_limit", "validation_seeds"}
    assert main(["compare", "--config", name]) == 0
    assert "6 of 6 tasks are finished" in capfd.readouterr().out
    by_pairs = [1 - math.comb(4 - c, 2) / math.comb(4, 2) for c in measured(40.0)["samples_right"]]
    for result in results(tmp_path / "out"):
        assert result["pass@2"] == pytest.approx(2 * sum(by_pairs)) and result["pass@1"] == pytest.approx(40.0)
        assert (result["avg@4"], result["pass@4"]) == (40.0, 100.0)
    comparison(eval_samples=4, eval_temperatures=[0.6, 1.0])
    assert main(["compare", "--config", name, "--report"]) == 2
    assert "eval_temperatures was None, now [1.0, 0.6]" in capfd.readouterr().err
    comparison(eval_samples=4, eval_top_p=0.8)
    assert main(["compare", "--config", name, "--report"]) == 2
    assert "eval_top_p was None, now 0.8" in capfd.readouterr().err
    for path in files.values():
        change(path, settings=json.loads(path.read_text())["settings"] | {"eval_top_p": 0.8})
    assert main(["compare", "--config", name, "--report"]) == 0
    assert "at temperature 1, top-p 0.8 | pass@1" in (tmp_path / "out/results.md").read_text()


def test_the_order_of_temperatures_does_not_matter(comparison: Callable[..., str], tmp_path: Path) -> None:
    """Nor that in a result of an earlier version."""
    orders = ([1.0, 0.3, 0.6], [0.6, 1.0, 0.3])
    others = {f"{name} T={t}": value for t in (0.3, 0.6) for name, value in measured(45.0).items()}
    others |= {"length T=0.3": 8.0, "length T=0.6": 8.0}
    files = by_hand(comparison(eval_samples=4, eval_temperatures=orders[0]), **others)
    for written in orders:
        for path in files.values():
            change(path, settings=json.loads(path.read_text())["settings"] | {"eval_temperatures": written})
        for now in orders:
            assert main(["compare", "--config", comparison(eval_samples=4, eval_temperatures=now), "--report"]) == 0
            assert len(results(tmp_path / "out")) == 6


def test_equal_differences_have_no_interval(comparison: Callable[..., str], tmp_path: Path) -> None:
    """They say nothing about the scatter of other seeds."""
    name = comparison(eval_samples=4, seeds=[1, 2, 3], runs={"base": {"beta": 0.1}, "ours": {"beta": 0.2}})
    values = {("base", s): 30.0 + 0.5 * s for s in (1, 2, 3)} | {("ours", s): 32.5 + 0.5 * s for s in (1, 2, 3)}
    by_hand(name, values)
    assert main(["compare", "--config", name, "--report"]) == 0
    with (tmp_path / "out/results.csv").open() as file:
        (row,) = (r for r in csv.DictReader(file) if (r["run"], r["metric"]) == ("ours", "avg@4"))
    assert (row["paired_seeds"], row["difference"]) == ("3", "2.5")
    assert row["difference_low"] == row["difference_high"] == row["detectable_difference"] == ""
    table = (tmp_path / "out/results.md").read_text()
    assert "| ours | +0.0 | +2.5 |" in table and "/ 0.0" not in table and "nan" not in table


@pytest.mark.parametrize("num_seeds", T_QUANTILES)
def test_differences_are_paired_by_seed(num_seeds: int, comparison: Callable[..., str], tmp_path: Path) -> None:
    """Against loops in float64: Student's interval, and a difference that is found four times in five."""
    seeds = list(range(1, num_seeds + 1))
    base = dict(zip(seeds, [30.0, 37.5, 41.0, 28.0, 33.0], strict=False))
    ours = dict(zip(seeds, [33.0, 38.0, 45.5, 30.0, 33.5], strict=False))
    name = comparison(eval_samples=4, seeds=seeds, runs={"base": {"beta": 0.1}, "ours": {"beta": 0.2}})
    values = {("base", s): v for s, v in base.items()} | {("ours", s): v for s, v in ours.items()}
    by_hand(name, values)
    assert main(["compare", "--config", name, "--report"]) == 0
    with (tmp_path / "out/results.csv").open() as file:
        rows = {(row["run"], row["metric"]): row for row in csv.DictReader(file)}
    row = {key: float(value) for key, value in rows["ours", "avg@4"].items() if key not in ("run", "metric")}
    mean = math.fsum(ours.values()) / num_seeds
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in ours.values()) / (num_seeds - 1))
    assert (row["seeds"], row["mean"], row["std"]) == (num_seeds, pytest.approx(mean), pytest.approx(spread))
    differences = [ours[s] - base[s] for s in seeds]
    mean = math.fsum(differences) / num_seeds
    spread = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (num_seeds - 1))
    error = spread / math.sqrt(num_seeds)
    assert row["paired_seeds"] == num_seeds and row["difference"] == pytest.approx(mean)
    assert row["difference_low"] == pytest.approx(mean - T_QUANTILES[num_seeds] * error)
    assert row["difference_high"] == pytest.approx(mean + T_QUANTILES[num_seeds] * error)
    found = power(row["detectable_difference"] / error, num_seeds - 1, T_QUANTILES[num_seeds])
    assert found == pytest.approx(0.8, abs=1e-3)
    assert rows["base", "avg@4"]["difference"] == "" and rows["student", "avg@4"]["std"] == ""
    cell = f"{mean:+.1f} [{row['difference_low']:+.1f}, {row['difference_high']:+.1f}]"
    assert f"{cell} / {row['detectable_difference']:.1f}" in (tmp_path / "out/results.md").read_text()


def power(effect: float, df: int, critical: float) -> float:
    """How often a t-test exceeds its critical value if the true difference has `effect` standard errors: the chance
    that Z > critical * S - effect, over the density of S = sqrt(chi-squared / df), by the midpoint rule."""
    steps, end = 40_000, 8.0
    total = 0.0
    for i in range(steps):
        s = (i + 0.5) * end / steps
        log_density = math.log(2) + df / 2 * math.log(df / 2) - math.lgamma(df / 2)
        log_density += (df - 1) * math.log(s) - df * s * s / 2
        total += math.exp(log_density) * 0.5 * math.erfc((critical * s - effect) / math.sqrt(2)) * end / steps
    return total


def test_seeds_that_one_run_lacks_are_left_out(comparison: Callable[..., str], tmp_path: Path) -> None:
    runs = {"base": {"beta": 0.1}, "ours": {"beta": 0.2}}
    name = comparison(eval_samples=4, seeds=[1, 2, 3], runs=runs)
    files = by_hand(name, {("base", 1): 10.0, ("base", 2): 20.0, ("ours", 2): 21.0, ("ours", 3): 35.0})
    for title in ("base, seed 3", "ours, seed 1"):
        files[title].unlink()
    assert main(["compare", "--config", name, "--report"]) == 0
    with (tmp_path / "out/results.csv").open() as file:
        (row,) = (r for r in csv.DictReader(file) if (r["run"], r["metric"]) == ("ours", "avg@4"))
    assert (row["seeds"], row["paired_seeds"], row["difference"], row["difference_low"]) == ("2", "1", "1.0", "")


def test_results_do_not_depend_on_where_the_package_is() -> None:
    """A comparison that was run in one checkout goes on in another."""
    from tsdkd.compare.result_file import result_settings
    from tsdkd.compare.task import load_problems

    comparison = read_comparison("lab/tsdkd")
    for task in (comparison.grid_tasks[0], comparison.tasks[-1]):
        assert str(Path(tsdkd.__file__).parent) not in json.dumps(result_settings(comparison, task))
    assert {name: len(rows) for name, rows in load_problems(comparison).items()} == {"eval": 1024, "validation": 256}
