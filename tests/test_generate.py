"""`tsdkd generate`: rows that an off-policy run can train on, complete however often it is interrupted."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import flags, write_jsonl
from tsdkd.cli import main
from tsdkd.generate import engine_memory_utilization
from tsdkd.rollout.hf import sample_completions
from tsdkd.rollout.seeding import prompt_generator
from tsdkd.run.arguments import parse_args_and_config

COMMON = {"use_cpu": "true", "bf16": "false", "gradient_checkpointing": "false", "disable_tqdm": "true", "seed": 3}
COMMON |= {"max_length": 64, "max_new_tokens": 12, "report_to": "none"}


@pytest.fixture
def command(saved_model, rows_file):
    def make(output: Path, **values: object) -> list[str]:
        names = {
            "model_name_or_path": saved_model("qwen3", 0),
            "teacher_model_name_or_path": saved_model("qwen3", 1, rows=70, hidden=48),
            "dataset_name": rows_file,
        }
        return ["generate", *flags(**{**names, **COMMON, "output_file": output, **values})]

    return make


def read(path: Path) -> dict[tuple[int, int], dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = {(row["index"], row["sample"]): row for row in rows}
    assert len(found) == len(rows), "a row twice"
    return found


def test_rows_are_the_models_samples(command, saved_model, rows_file, tmp_path):
    output = tmp_path / "new" / "rows.jsonl"
    assert main(command(output, samples=2)) == 0
    rows, prompts = read(output), [json.loads(line) for line in Path(rows_file).read_text().splitlines()]
    assert rows.keys() == {(i, j) for i in range(len(prompts)) for j in range(2)}
    teacher = saved_model("qwen3", 1, rows=70, hidden=48)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    for (i, j), row in rows.items():
        assert row["prompt"] == prompts[i]["prompt"] and row["answer"] == prompts[i]["answer"]
        assert (row["model"], row["seed"], row["temperature"]) == (teacher, 3, 1.0) and row["revision"]
        if i < 4:
            ids = build_ids(row["prompt"])
            (drawn,) = sample_completions(
                model, [ids], [12], [prompt_generator(3, j, i)], stop_token_ids={1}, vocab_size=64
            )
            assert row["num_tokens"] == len(drawn.ids)
            assert row["finish_reason"] == ("stop" if drawn.stopped else "length")
            assert build_ids(row["completion"], bare=True) == [t for t in drawn.ids if 2 <= t < 60]
    assert {row["finish_reason"] for row in rows.values()} == {"stop", "length"}
    assert rows[0, 0]["completion"] != rows[0, 1]["completion"]


def test_only_the_first_prompts(command, tmp_path):
    """Are what --limit generates for; a call with a higher limit, or none, adds the others."""
    output, whole = tmp_path / "rows.jsonl", tmp_path / "whole.jsonl"
    assert main(command(output, limit=3, samples=2)) == 0
    assert read(output).keys() == {(i, j) for i in range(3) for j in range(2)}
    first = output.read_bytes()
    assert main(command(output, limit=2)) == 0
    assert output.read_bytes() == first
    assert main(command(output)) == 0 and main(command(whole)) == 0
    assert output.read_bytes().startswith(first)
    assert {key: row for key, row in read(output).items() if key[1] == 0} == read(whole)
    assert main(command(output, limit=10_000)) == 0


def test_answers_keep_the_column_that_the_run_looks_for(command, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "w1 w2", "gold": "7", "answer": "long"}] * 2)
    output = tmp_path / "rows.jsonl"
    assert main(command(output, dataset_name=data, answer_column="gold")) == 0
    assert all(row["gold"] == "7" and "answer" not in row for row in read(output).values())


def test_an_answer_column_must_exist(command, tmp_path, capsys):
    data, output = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "w1 w2", "gold": "7"}]), tmp_path / "rows.jsonl"
    assert main(command(output, dataset_name=data, answer_column="nope")) == 2
    assert "answer_column: the data set has no column 'nope'; it has 'prompt', 'gold'" in capsys.readouterr().err
    assert not output.exists()


def test_a_suffix_is_asked_and_not_written(command, saved_model, tmp_path, capsys):
    """The rows are for a run with the same suffix; a file with another isn't added to."""
    output = tmp_path / "rows.jsonl"
    assert main(command(output, prompt_suffix="w7 w8")) == 0
    row = read(output)[0, 0]
    model = AutoModelForCausalLM.from_pretrained(row["model"], dtype=torch.float32)
    ids = build_ids(f"{row['prompt']} w7 w8")
    (drawn,) = sample_completions(model, [ids], [12], [prompt_generator(3, 0, 0)], stop_token_ids={1}, vocab_size=64)
    assert build_ids(row["completion"], bare=True) == [t for t in drawn.ids if 2 <= t < 60]
    assert "w7 w8" not in row["prompt"]
    assert main(command(output)) == 2
    assert "prompt_suffix was 'w7 w8', now None" in capsys.readouterr().err


def build_ids(text: str, bare: bool = False) -> list[int]:
    from conftest import build_tokenizer

    return build_tokenizer()(text if bare else f"<user> {text} <assistant>")["input_ids"]


def test_an_interrupted_file_is_completed(command, tmp_path):
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    assert main(command(whole)) == 0
    lines = whole.read_text().splitlines(keepends=True)
    broken.write_text("".join(lines[:9]) + lines[9][:40])  # killed in the middle of a line
    assert main(command(broken)) == 0
    assert read(broken) == read(whole)
    before = whole.read_bytes()
    assert main(command(whole)) == 0
    assert whole.read_bytes() == before


@pytest.mark.parametrize(
    "change, named",
    [({"seed": 4}, "seed"), ({"role": "student"}, "model"), ({"temperature": 0.5}, "temperature")],
)
def test_rows_of_another_run_are_not_mixed(change, named, command, tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    assert main(command(output)) == 0
    before = output.read_bytes()
    assert main(command(output, **change)) == 2
    assert named in capsys.readouterr().err
    assert output.read_bytes() == before


def test_other_prompts_and_other_files_are_refused(command, rows_file, tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    assert main(command(output)) == 0
    reversed_rows = tmp_path / "reversed.jsonl"
    reversed_rows.write_text("".join(reversed(Path(rows_file).read_text().splitlines(keepends=True))))
    assert main(command(output, dataset_name=reversed_rows)) == 2
    assert "prompt" in capsys.readouterr().err
    one_line = tmp_path / "one_line.json"
    one_line.write_text('{"mine": 1}')  # no end of line either
    for path in (Path(rows_file), one_line):
        before = path.read_bytes()
        assert main(command(path)) == 2
        assert "wasn't written by tsdkd generate" in capsys.readouterr().err
        assert path.read_bytes() == before
    for path in (tmp_path, one_line / "rows.jsonl"):
        assert main(command(path)) == 2
        assert "output_file" in capsys.readouterr().err


@pytest.mark.parametrize("columns", [("prompt", "completion"), ("problem", "response")])
def test_an_off_policy_run_trains_on_them(columns, command, saved_model, rows_file, tmp_path):
    """With the same configuration: rows have the columns that it names."""
    output, data = tmp_path / "rows.jsonl", tmp_path / "data.jsonl"
    data.write_text(Path(rows_file).read_text().replace('"prompt"', f'"{columns[0]}"'))
    named = {"prompt_column": columns[0], "completion_column": columns[1]}
    data.write_text(data.read_text().replace('"completion"', f'"{columns[1]}"'))
    assert main(command(output, dataset_name=data, **named)) == 0
    run = {"output_dir": tmp_path / "run", "lmbda": 0, "max_steps": 2, "dataset_name": output, "save_strategy": "no"}
    names = {
        "model_name_or_path": saved_model("qwen3", 0),
        "teacher_model_name_or_path": saved_model("qwen3", 1, rows=70, hidden=48),
    }
    assert main(["train", *flags(**{**names, **COMMON, **run, **named})]) == 0


def test_a_cut_completion_is_not_taught_as_an_end(command, tmp_path, saved_model):
    from datasets import Dataset, load_dataset

    from conftest import build_tokenizer
    from tsdkd import TSDKDConfig
    from tsdkd.data import prepare_dataset

    output = tmp_path / "rows.jsonl"
    assert main(command(output)) == 0
    rows: Dataset = load_dataset("json", data_files=str(output), split="train")
    args = TSDKDConfig(str(tmp_path / "run"), use_cpu=True, bf16=False, max_length=64, lmbda=0.0)
    prepared = prepare_dataset(rows, build_tokenizer(), args, 128, needs_completion=True)
    ends = [ids[-1] == 1 for ids in prepared["completion_ids"]]
    assert ends == [reason == "stop" for reason in rows["finish_reason"]]


@pytest.mark.parametrize("method", ["seq-kd", "distillm"])
def test_a_method_that_trains_on_them_is_asked_too(method, command, tmp_path):
    """With the run's own configuration: the rows are those that any method gets."""
    rows, same = tmp_path / "rows.jsonl", tmp_path / "same.jsonl"
    assert main(command(rows)) == 0
    assert main(command(same, method=method)) == 0
    assert same.read_bytes() == rows.read_bytes()


@pytest.mark.parametrize(
    ("device", "flags", "share"),
    [
        ("cuda", [], 0.9),
        ("cuda", ["--vllm_gpu_memory_utilization", "0.5"], 0.5),
        ("cpu", [], 0.2),
        ("cpu", ["--vllm_gpu_memory_utilization", "0.5"], 0.5),
    ],
)
def test_an_engine_alone_has_the_gpu(device, flags, share):
    """A preset's share is what training leaves an engine; the teacher's 14B don't fit there."""
    arguments = parse_args_and_config("qwen25_14b_to_1p5b.yaml", flags, do_train=False)
    assert engine_memory_utilization(arguments, torch.device(device)) == share


OFF_POLICY = "qwen25_14b_to_1p5b_offpolicy.yaml"


@pytest.mark.parametrize(
    ("preset", "flags", "told"),
    [
        (OFF_POLICY, ["--dataset_name", "openbmb/UltraInteract_sft"], True),
        ("qwen25_14b_to_1p5b.yaml", ["--method", "distillm", "--dataset_name", "a/b"], True),
        (OFF_POLICY, [], False),
        (OFF_POLICY, ["--dataset_name", "Minsang/TSD-KD-Qwen2.5-14B-Instruct-Gen"], False),
        (OFF_POLICY, ["--dataset_name", "teacher.jsonl"], False),
        (OFF_POLICY, ["--dataset_name", "a/b", "--lmbda", "1"], False),
        ("qwen25_14b_to_1p5b.yaml", ["--dataset_name", "a/b"], False),
    ],
)
def test_whose_completions_a_run_trains_on_is_told(preset, flags, told):
    """Where a flag brings completions that the configuration wasn't written for."""
    notes = [note for note in parse_args_and_config(preset, flags, do_train=False).notes if "tsdkd generate" in note]
    assert len(notes) == told
    assert all(flags[flags.index("--dataset_name") + 1] in note for note in notes)
