"""`tsdkd compare`: tasks that are done once, tables and tests that follow from them; `tsdkd reproduce`."""

import fcntl
import gc
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib import resources
from itertools import combinations
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedModel

from conftest import build_tokenizer, make_rows, on_cpus, write_jsonl
from reference import token_entropy
from tsdkd.cli import main
from tsdkd.compare import task as tasks
from tsdkd.compare.config import comparison_names, read_comparison
from tsdkd.errors import ConfigError
from tsdkd.evaluation import ProblemSet, evaluate
from tsdkd.evaluation.problem_set import sampled_accuracies
from tsdkd.generate import engine_memory_utilization
from tsdkd.run.arguments import parse_args_and_config

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.usefixtures("preloaded")
PYTHON = sys.executable
"""As it is, for what a signal is sent to."""


def do(name: str, tasks: range) -> None:
    """In this process, as a SLURM array would in others."""
    for task in tasks:
        assert main(["compare", "--config", name, "--task", str(task)]) == 0


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_a_comparison_from_end_to_end(comparison: Any, tmp_path: Path, capfd: Any) -> None:
    """Done once; what is missing afterwards is done again, and only that; the teacher writes its completions once."""
    runs = {"plain": {"method": "gkd"}, "fixed": {"method": "seq-kd"}}
    name, out = comparison(runs=runs, teacher_completions=True), tmp_path / "out"
    do(name, range(6))
    assert main(["compare", "--config", name]) == 0
    first = results(out)
    assert [(r["run"], r["seed"]) for r in first[:2]] == [("student", None), ("teacher", None)]
    assert [(r["run"], r["seed"]) for r in first[2:]] == [("plain", 1), ("fixed", 1), ("plain", 2), ("fixed", 2)]
    assert [r["method"] for r in first[2:4]] == ["gkd", "seq-kd"]
    table = (out / "results.md").read_text()
    assert "| plain |" in table and "| teacher |" in table and "2 seeds" in table and "12 problems" in table
    assert len(re.findall(r"\(p [=<] ", table)) == 1 and "two-sided p" in table
    assert (out / "results.png").stat().st_size > 1000
    assert len((out / "teacher_completions.jsonl").read_text().splitlines()) == 24
    trained_on = yaml.safe_load((out / "fixed/seed-1/tsdkd_config.yaml").read_text())["dataset_name"]
    assert trained_on == str(out / "teacher_completions.jsonl")

    kept = (out / "plain/seed-1/model.safetensors").stat().st_mtime_ns
    shutil.rmtree(out / "fixed/seed-2")
    capfd.readouterr()
    assert main(["compare", "--config", name]) == 0
    assert "5 of 6 tasks are finished, 1 remain" in capfd.readouterr().out
    again = results(out)
    assert (out / "plain/seed-1/model.safetensors").stat().st_mtime_ns == kept
    same = [k for k in first[0] if not k.endswith("seconds")]
    assert [{k: r[k] for k in same} for r in again] == [{k: r[k] for k in same} for r in first]


def test_no_model_is_left_beside_another(comparison: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """The teacher writes its completions in a process that ends, after those that are there; what was trained and
    measured here is gone, without waiting for Python's collector."""
    name = comparison(seeds=[1], runs={"fixed": {"method": "seq-kd"}}, teacher_completions=True)
    file = tmp_path / "out/teacher_completions.jsonl"
    partial = file.with_suffix(".partial.jsonl")
    config = str(tmp_path / "base.yaml")
    assert main(["generate", "--config", config, "--output_file", str(partial)]) == 0
    made = partial.read_text().splitlines(keepends=True)
    partial.write_text("".join(made[:9]) + made[9][:40])  # killed in the middle of a line

    loaded: list[Any] = []
    load, train = PreTrainedModel.from_pretrained.__func__, tasks.train

    def loading(cls: Any, *args: Any, **kwargs: Any) -> Any:
        loaded.append(cls)
        return load(cls, *args, **kwargs)

    def training(arguments: Any) -> Any:
        assert not loaded
        return train(arguments)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(loading))
    monkeypatch.setattr(tasks, "train", training)
    gc.collect()
    before = living_models()
    gc.disable()
    try:
        do(name, range(2, 3))
        assert loaded and living_models() == before
    finally:
        gc.enable()
    assert file.read_text().splitlines(keepends=True)[:9] == made[:9]
    assert len(file.read_text().splitlines()) == 24 and not partial.exists()


def living_models() -> int:
    return sum(issubclass(type(x), PreTrainedModel) for x in gc.get_objects())


def test_a_signal_ends_the_teacher_s_process_too(comparison: Any, tmp_path: Path) -> None:
    """Or it would write, and hold a GPU, beside the one that comes after."""
    rows = write_jsonl(tmp_path / "many.jsonl", make_rows(4000))
    settings = {"dataset_name": rows, "per_device_eval_batch_size": 1}
    name = comparison(seeds=[1], runs={"fixed": {"method": "seq-kd"}}, settings=settings, teacher_completions=True)
    command = [PYTHON, "-m", "tsdkd", "compare", "--config", name, "--task", "2"]
    process = subprocess.Popen(command, env=on_cpus(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end, partial = time.monotonic() + 120, tmp_path / "out/teacher_completions.partial.jsonl"
    while not (partial.exists() and partial.stat().st_size):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    with partial.with_name("teacher_completions.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # all that had it have ended


def test_a_teacher_s_engine_has_the_gpu_alone(comparison: Any) -> None:
    """Whatever share of it the runs leave theirs."""
    settings = {"use_vllm": True, "vllm_gpu_memory_utilization": 0.2}
    made = read_comparison(comparison(settings=settings, runs={"a": {}}, teacher_completions=True))
    for device, share in (("cuda", 0.9), ("cpu", 0.2)):
        arguments = parse_args_and_config(made.config, made.generate_flags(device == "cuda"))
        assert arguments.training_args.use_vllm and engine_memory_utilization(arguments, torch.device(device)) == share


def test_finished_runs_of_other_settings_are_not_mixed_in(comparison: Any, capsys: Any) -> None:
    name = comparison(seeds=[1], runs={"plain": {"method": "gkd"}})
    assert main(["compare", "--config", name, "--task", "2"]) == 0
    comparison(seeds=[1], runs={"plain": {"method": "gkd", "beta": 0.1}})
    assert main(["compare", "--config", name]) == 2
    assert "beta was None, now 0.1" in capsys.readouterr().err


def test_a_finished_student_of_other_settings_is_not_evaluated(comparison: Any, tmp_path: Path, capsys: Any) -> None:
    """Killed between training and evaluation; a change of length counts, too."""
    name, folder = comparison(seeds=[1], runs={"plain": {"method": "gkd"}}), tmp_path / "out/plain/seed-1"
    do(name, range(2, 3))
    (folder / "result.json").unlink()
    for key, value, was in (("beta", 0.1, 0.9), ("max_steps", 5, 3)):
        comparison(seeds=[1], runs={"plain": {"method": "gkd", key: value}})
        capsys.readouterr()
        assert main(["compare", "--config", name, "--task", "2"]) == 2
        error = capsys.readouterr().err
        assert f"{folder} contains a different run: {key} was {was}, now {value}; choose another directory" in error
        assert not (folder / "result.json").exists()
    comparison(seeds=[1], runs={"plain": {"method": "gkd", "logging_steps": 1}})
    kept = (folder / "model.safetensors").stat().st_mtime_ns
    do(name, range(2, 3))
    assert (folder / "model.safetensors").stat().st_mtime_ns == kept


def test_the_models_themselves_are_of_these_settings_too(comparison: Any, capsys: Any) -> None:
    name = comparison()
    do(name, range(1))
    comparison(settings={"max_new_tokens": 4})
    assert main(["compare", "--config", name, "--report"]) == 2
    assert "max_completion_length was 8, now 4" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "null", "{}", '{"run": "pl'])
def test_a_damaged_result_is_named(text: str, comparison: Any, tmp_path: Path, capsys: Any) -> None:
    name, file = comparison(), tmp_path / "out/plain/seed-1/result.json"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert main(["compare", "--config", name, "--report"]) == 0
    error = capsys.readouterr().err
    assert f"left out: {file} is damaged" in error and "delete it to evaluate the task again" in error
    assert main(["compare", "--config", name, "--task", "2"]) == 2
    assert f"{file} is damaged" in capsys.readouterr().err


def test_nothing_is_reported_of_nothing(comparison: Any, tmp_path: Path, capsys: Any) -> None:
    assert main(["compare", "--config", comparison(), "--report"]) == 0
    assert "no task is finished" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_problems_and_folder_are_looked_at_first(comparison: Any, tmp_path: Path, capsys: Any) -> None:
    rows = write_jsonl(tmp_path / "no_answers.jsonl", [{"prompt": "1 + 1"}])
    for changes, found in (
        ({"eval_dataset_name": rows}, "no column 'answer'"),
        ({"eval_dataset_name": str(tmp_path / "nowhere.jsonl")}, "nowhere.jsonl"),
        ({"output_dir": f"{rows}/out"}, "can't be made"),
    ):
        assert main(["compare", "--config", comparison(**changes)]) == 2
        assert found in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.log"))


def test_two_processes_do_a_task_once(comparison: Any, tmp_path: Path) -> None:
    """As after a kill of the one that started them: the second waits, and finds it done."""
    name = comparison(seeds=[1], runs={"plain": {"method": "gkd", "max_steps": 30}})
    command = [sys.executable, "-m", "tsdkd", "compare", "--config", name, "--task", "2"]
    pipes: dict[str, Any] = {"env": on_cpus(), "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    said = [process.communicate()[0] for process in [subprocess.Popen(command, **pipes) for _ in range(2)]]
    assert sum("saved the student" in text for text in said) == 1
    assert sum("waiting for another process" in text for text in said) == 1
    assert (tmp_path / "out/plain/seed-1/result.json").exists()


def test_a_failed_task_is_named_and_the_others_are_kept(comparison: Any, tmp_path: Path, capfd: Any) -> None:
    rows = write_jsonl(tmp_path / "empty.jsonl", [{"prompt": ""}])
    name = comparison(seeds=[1], runs={"bad": {"dataset_name": rows}, "plain": {"method": "gkd"}})
    do(name, range(2))
    assert main(["compare", "--config", name, "--jobs", "2"]) == 1
    error = capfd.readouterr().err
    assert "bad, seed 1: failed" in error and "seed-1.log" in error
    assert "row 0" in (tmp_path / "out/bad/seed-1.log").read_text()
    assert main(["compare", "--config", name, "--report"]) == 0
    assert [r["run"] for r in results(tmp_path / "out")] == ["student", "teacher", "plain"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_stops_the_running_tasks_and_they_continue(number: int, comparison: Any, tmp_path: Path) -> None:
    run = {"method": "gkd", "max_steps": 400, "save_strategy": "steps"}
    name = comparison(seeds=[1], runs={"plain": run, "never begun": run})
    do(name, range(2))
    command = [PYTHON, "-m", "tsdkd", "compare", "--config", name]
    process = subprocess.Popen(command, env=on_cpus(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    end, folder = time.monotonic() + 120, tmp_path / "out/plain/seed-1"
    while not (folder / "tsdkd_config.yaml").exists():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.1)
    (child,) = psutil.Process(process.pid).children()
    process.send_signal(number)
    assert process.wait(60) == (75 if number == signal.SIGTERM else -number)
    assert not psutil.wait_procs([child], 60)[1]
    assert (folder / ".preempted").exists() and list(folder.glob("checkpoint-*"))
    assert ("run the same command again" in process.communicate()[1]) == (number == signal.SIGTERM)
    assert not (tmp_path / "out/never_begun").exists()


def test_what_a_model_solves(saved_model: Any) -> None:
    """Against completions made one by one, without a batch."""
    tokenizer = build_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(saved_model("qwen3", 0), dtype=torch.float32)
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in make_rows(6)]
    said: list[list[int]] = []

    def decode(ids: list[int]) -> str:
        said.append(ids)
        return str(len(ids))

    problems = ProblemSet(prompts, ["7"] * 6, [7] * 6, {1}, 64, decode)
    found = evaluate(model, problems, num_samples=2, batch_size=4)
    greedy, samples = said[:6], (said[6:12], said[12:])
    for prompt, completion in zip(prompts, greedy, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == completion
    assert found.is_greedy_correct == [len(ids) == 7 for ids in greedy]
    assert found.num_correct == [sum(len(part[i]) == 7 for part in samples) for i in range(6)]
    metrics = found.metrics
    assert metrics["avg@2"] == pytest.approx(100 * sum(found.num_correct) / 12)
    assert metrics["pass@2"] == pytest.approx(100 * sum(n > 0 for n in found.num_correct) / 6)
    assert metrics["length"] == pytest.approx(sum(map(len, said[6:])) / 12)
    entropies = []
    for prompt, completion in zip(prompts, samples[0], strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        entropies += [token_entropy(row) for row in logits.double().tolist()]
    assert metrics["entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)


def test_a_temperature_divides_the_logits(saved_model: Any) -> None:
    """Against a model whose logits are twice as large, which is exact."""
    model, sharper = (
        AutoModelForCausalLM.from_pretrained(saved_model("qwen3", 0), dtype=torch.float32) for _ in range(2)
    )
    sharper.model.norm.weight.data *= 2
    prompts = [build_tokenizer()(row["prompt"])["input_ids"] for row in make_rows(12)]
    problems = ProblemSet(prompts, ["7"] * 12, [9] * 12, set(range(1, 20)), 64, lambda ids: str(len(ids)))
    found = evaluate(model, problems, num_samples=4, temperatures=(0.5, 1.0))
    alone, expected = evaluate(model, problems, num_samples=4), evaluate(sharper, problems, num_samples=4)
    assert found.num_correct == alone.num_correct != expected.num_correct
    assert found.by_temperature[0.5].num_correct == expected.num_correct
    metrics = found.metrics
    for name in ("avg@4", "pass@1", "pass@2", "pass@4", "length"):
        assert metrics[f"{name} T=0.5"] == expected.metrics[name] and metrics[name] == alone.metrics[name], name
    assert "entropy T=0.5" not in metrics and metrics["entropy"] == alone.metrics["entropy"]


def test_top_p_keeps_the_nucleus(saved_model: Any) -> None:
    """Of each temperature's distribution: the fewest tokens whose probabilities reach top-p. One token is greedy."""
    model = AutoModelForCausalLM.from_pretrained(saved_model("qwen3", 0), dtype=torch.float32)
    prompts = [build_tokenizer()(row["prompt"])["input_ids"] for row in make_rows(6)]
    said: list[list[int]] = []

    def decode(ids: list[int]) -> str:
        said.append(ids)
        return "7"

    def num_outside(top_p: float, temperatures: tuple[float, ...]) -> int:
        """The sampled tokens that aren't in the nucleus of 0.5."""
        said.clear()
        problems = ProblemSet(prompts, ["7"] * 6, [7] * 6, {1}, 64, decode)
        evaluate(model, problems, num_samples=4, temperatures=temperatures, top_p=top_p)
        found = 0
        for index, completion in enumerate(said[6:]):
            prompt, temperature = prompts[index % 6], temperatures[index // 24]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].double()
            for token, probabilities in zip(completion, (logits / temperature).softmax(-1).tolist(), strict=True):
                before = sum(p for p in probabilities if p > probabilities[token])
                found += before >= 0.5
        return found

    assert num_outside(0.5, (1.0, 0.4)) == 0 < num_outside(1.0, (1.0,))
    assert num_outside(0.5, (1.0,)) == 0 and said[6:12] != said[:6]
    num_outside(1e-6, (1.0,))
    assert said == said[:6] * 5


def test_pass_at_k_of_a_result_counts_subsets() -> None:
    """For the powers of two and the number of samples, over all subsets of k samples."""
    counts, n = [0, 1, 3, 6, 2], 6
    found = sampled_accuracies(counts, n)
    assert list(found) == ["avg@6", "pass@1", "pass@2", "pass@4", "pass@6"]
    assert found["avg@6"] == pytest.approx(100 * 12 / 30) and found["pass@1"] == pytest.approx(found["avg@6"])
    for k in (1, 2, 4, 6):
        solved = [any(i < count for i in subset) for count in counts for subset in combinations(range(n), k)]
        assert found[f"pass@{k}"] == pytest.approx(100 * sum(solved) / len(solved))


def test_intervals_are_student_s() -> None:
    """Five seeds: 2.776 standard errors."""
    from tsdkd.compare.summary import summarize

    values = [1.0, 2.0, 3.0, 4.0, 6.0]
    rows = [
        {"seed": seed, "greedy": v, "samples_right": [1], "settings": {"eval_samples": 2}}
        for seed, v in enumerate(values)
    ]
    summary = summarize("a", rows, ["greedy"])
    spread = (sum((v - 3.2) ** 2 for v in values) / 4) ** 0.5
    assert summary.means["greedy"] == pytest.approx(3.2)
    assert summary.half_widths["greedy"] == pytest.approx(2.7764451 * spread / 5**0.5)


def test_one_seed_has_no_interval(comparison: Any) -> None:
    from tsdkd.compare.summary import summarize
    from tsdkd.compare.tables import all_metrics, format_tables

    read = read_comparison(comparison(runs={"plain": {"method": "gkd"}, "other": {"method": "gkd"}}))
    row = dict.fromkeys(all_metrics(read), 50.0) | {"samples_right": [1], "settings": {"eval_samples": 2}}
    rows = [row | {"seed": seed} for seed in read.seeds]
    one, two = (
        format_tables(read, [summarize(name, rows[:count], all_metrics(read)) for name in read.runs])
        for count in (1, 2)
    )
    assert "\n1 problem. One seed: no interval. Bold: the highest accuracy" in one and "±" not in one
    assert "Mean ± half the width of the 95 % interval over 2 seeds." in two


def test_only_close_names_are_suggested(capsys: Any) -> None:
    for name, hint in [("nope.yaml", ""), ("demo_tabel3.yaml", ", did you mean 'demo_table3'?")]:
        assert main(["compare", "--config", name]) == 2
        assert f"no shipped comparison is called {name!r}{hint}; `tsdkd" in capsys.readouterr().err


@pytest.mark.parametrize("name", comparison_names())
def test_shipped_comparisons_are_sound(name: str, capsys: Any) -> None:
    """Every run's keys, too."""
    assert len(read_comparison(name).tasks) > 2


@pytest.mark.parametrize("name", ["demo_table1.yaml", "demo_eopd_table2.yaml"])
def test_every_run_of_a_table_trains(name: str, demo_rows: str, tmp_path: Path) -> None:
    """One step on a few of the demo's rows, measured on a few problems."""
    pytest.importorskip("math_verify")
    package = Path(str(resources.files("tsdkd")))
    values = yaml.safe_load((package / "configs/compare" / name).read_text())
    values["settings"] |= {
        "dataset_name": demo_rows,
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "max_new_tokens": 16,
    }
    values |= {"output_dir": str(tmp_path / "out"), "seeds": [1], "eval_samples": 1, "eval_limit": 4}
    (tmp_path / name).write_text(yaml.safe_dump(values, sort_keys=False))
    do(str(tmp_path / name), range(2, 2 + len(values["runs"])))
    assert main(["compare", "--config", str(tmp_path / name), "--report"]) == 0
    assert {r["run"] for r in results(tmp_path / "out")} == set(values["runs"])


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"run": {}}, ["run", "did you mean 'runs'"]),
        ({"runs": {"a": {"bet": 1}}}, ["runs: a: bet", "beta"]),
        ({"runs": {"a": {"method": "opd", "gate": True}}}, ["runs: a: gate", "tsd-kd"]),
        ({"runs": {"a": {"seed": 3}}}, ["runs: a: seed", "the comparison sets it"]),
        ({"runs": {"a": 3}}, ["runs: a", "mapping", "3"]),
        ({"runs": {}}, ["runs"]),
        ({"runs": {"a b": {}, "a + b": {}}}, ["runs", "the same folder"]),
        ({"baseline": "b"}, ["baseline", "'b'"]),
        ({"x": "beta"}, ["plain", "beta", "nothing"]),
        (
            {"x": "indirect_reduction", "runs": {"a": {"indirect_reduction": "sum"}}},
            ["a", "must be a number", "'sum'"],
        ),
        ({"seeds": []}, ["seeds"]),
        ({"seeds": 5}, ["seeds", "list", "5"]),
        ({"seeds": [1, "two"]}, ["seeds", "'two'"]),
        ({"seeds": [1, -3]}, ["seeds", "-3"]),
        ({"seeds": [1, 1]}, ["seeds", "twice"]),
        ({"runs": {"student": {}}}, ["student", "choose another name"]),
        ({"runs": "qwen3_table5.yaml"}, ["qwen3_table5.yaml", "must list runs itself"]),
        ({"eval_samples": 0}, ["eval_samples", "at least 1"]),
        ({"eval_top_p": 0.0}, ["eval_top_p", "(0, 1]", "0.0"]),
        ({"eval_problems": 4}, ["eval_problems: is called eval_limit"]),
        ({"config": "none.yaml"}, ["none.yaml"]),
        ({"output_dir": None}, ["output_dir", "missing"]),
    ],
    ids=str,
)
def test_a_comparison_that_could_not_run(changes: dict[str, Any], found: list[str], comparison: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        read_comparison(comparison(**changes))
    assert all(text in str(caught.value) for text in found), str(caught.value)


def test_names_stay_in_the_folder(comparison: Any, tmp_path: Path) -> None:
    """Whatever they are called; numbers are names, too."""
    tasks = read_comparison(comparison(runs={"..": {}, 0.5: {"gate": False}, "/tmp/x": {"beta": 0.5}})).tasks
    assert [task.run for task in tasks[2:5]] == ["..", "0.5", "/tmp/x"]
    assert all(task.folder.resolve().is_relative_to(tmp_path / "out") for task in tasks)
    assert len({task.folder.parent for task in tasks[2:5]}) == 3


def test_what_all_runs_share_may_be_off_policy(comparison: Any) -> None:
    runs = {"slow": {"learning_rate": 0.001}, "fast": {}}
    shared = read_comparison(comparison(settings={"method": "supervised-kd"}, runs=runs)).parse_shared_arguments()
    assert shared.method == "supervised-kd"


def test_a_slurm_array(comparison: Any, tmp_path: Path, capsys: Any) -> None:
    name = comparison()
    assert main(["compare", "--config", name, "--slurm", "--time", "02:00:00", "--gpus_per_node", "0"]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --array=0-5" in script and f"tsdkd compare --config {name} --task" in script
    file = tmp_path / "job.sbatch"
    command = ["compare", "--config", name, "--slurm", "--time", "02:00:00", "--gpus_per_node", "0"]
    assert main([*command, "--output_file", str(file)]) == 0
    assert file.read_text() == script and f"sbatch {file}" in capsys.readouterr().out
    assert main([*command, "--output_file", str(file)]) == 2
    assert "--output_file" in capsys.readouterr().err and file.read_text() == script
    assert main(["compare", "--config", name, "--output_file", str(file)]) == 2
    assert "--output_file: only with --slurm" in capsys.readouterr().err
    assert main(["compare", "--config", name, "--slurm", "--time", "soon"]) == 2
    assert main(["compare", "--config", name, "--task", "99"]) == 2
    capsys.readouterr()
    assert main(["compare", "--config", name, "--task", "0", "--report"]) == 2
    assert "--report: not with --task" in capsys.readouterr().err


# The papers' small experiments ---------------------------------------------------------------------------------------


def test_the_toy_gives_the_papers_table(tmp_path: Path, capsys: Any) -> None:
    """Means over 30 seeds are as far from the paper's as three seeds may be; the two scenarios differ as there."""
    from tsdkd.reproduce.eopd_toy import SCENARIO_TEMPERATURES, simulate_toy

    changes = {
        name: [simulate_toy(temperature, seed).top1_changes for seed in range(30)]
        for name, temperature in SCENARIO_TEMPERATURES.items()
    }
    low, high = (sum(values) / len(values) for values in changes.values())
    assert abs(low - 7.3) < 1.6 * 1.5 and abs(high - 84.0) < 16.7
    assert main(["reproduce", "eopd-toy", "--output_dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "7.3 ± 1.6" in printed and "84.0 ± 16.7" in printed
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_a_toy_step_is_the_papers(monkeypatch: Any) -> None:
    """One update, by hand: only the sampled logit moves, by the reward times the learning rate."""
    import numpy as np

    from tsdkd.reproduce import eopd_toy

    seen = eopd_toy.simulate_toy(0.3, 4, learning_rate=0.2, steps=1)
    before = eopd_toy.simulate_toy(0.3, 4, learning_rate=0.0, steps=1)
    ratio = np.log(seen.student) - np.log(before.student)
    (moved,) = np.flatnonzero(np.abs(ratio - np.median(ratio)) > 1e-12)
    top = np.argsort(-before.student)[:10]
    assert moved in top
    inside = before.student[top] / before.student[top].sum()
    reward = np.log(seen.teacher[moved]) - np.log(inside[list(top).index(moved)])
    assert ratio[moved] - np.median(ratio) == pytest.approx(0.2 * reward, rel=1e-9)


def test_the_gates_gradients(capsys: Any) -> None:
    from tsdkd.reproduce.tsdkd_gradient import build_cases

    stronger, weaker = build_cases()
    for case in (stronger, weaker):
        for name, (formula, found) in case.values.items():
            assert formula == pytest.approx(found, rel=1e-10), name
    assert stronger.values["Eq. 23, C"][0] > 1 > weaker.values["Eq. 23, C"][0]
    assert main(["reproduce", "tsdkd-gradient", "--seeds", "4"]) == 2
    assert main(["reproduce", "tsdkd-gradient"]) == 0
    assert "Eq. 22" in capsys.readouterr().out
