"""The command line end to end, on tiny models: invariance, resume, processes, presets, what is printed."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import DDP, flags, launch, make_rows, on_cpus, weights, write_jsonl
from preloaded import python
from tsdkd.cli import main
from tsdkd.cli.logs import log_to_streams
from tsdkd.config.logs import set_log_level
from tsdkd.run.presets import preset_paths

METHODS = ["tsd-kd", "eopd"]
SGD = {"optim": "sgd", "max_grad_norm": 0, "lr_scheduler_type": "constant", "learning_rate": 0.5, "warmup_steps": 0}
COMMON = {"use_cpu": "true", "bf16": "false", "gradient_checkpointing": "false", "disable_tqdm": "true"}
COMMON |= {"max_length": 64, "max_new_tokens": 12, "logging_steps": 1, "seed": 7}


def run_flags(saved_model, rows_file, folder, **values):
    names = {
        "model_name_or_path": saved_model("qwen3", 0),
        "teacher_model_name_or_path": saved_model("qwen3", 1),
        "dataset_name": rows_file,
        "output_dir": folder,
    }
    return ["train", *flags(**{**names, **COMMON, **values})]


def losses(folder) -> list[float]:
    (state,) = Path(folder).glob("checkpoint-*/trainer_state.json")
    return [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]


@pytest.mark.parametrize("method", METHODS)
def test_any_split_of_the_batch_gives_the_same_gradient_and_loss(method, saved_model, rows_file, tmp_path):
    """8 x 1, 4 x 2, 1 x 8, and 2 processes x 4, by SGD: the change of the weights is the gradient."""
    before = weights(saved_model("qwen3", 0))
    extra = {"rollout_batch_size": 8} if method == "eopd" else {}
    gradients, logged = {}, {}
    for name, (batch, accumulation) in {"8x1": (8, 1), "4x2": (4, 2), "1x8": (1, 8), "2p4": (4, 1)}.items():
        folder = tmp_path / name
        split = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 1}
        command = run_flags(saved_model, rows_file, folder, method=method, **SGD, **split, **extra)
        if name == "2p4":
            assert launch(DDP, command).count("saved the student") == 1
        else:
            assert main(command) == 0
        gradients[name], logged[name] = before - weights(folder), losses(folder)
    for name, gradient in gradients.items():
        assert (gradient - gradients["8x1"]).norm() <= 1e-6 * gradients["8x1"].norm(), name
        assert logged[name] == pytest.approx(logged["8x1"], rel=1e-6), name


@pytest.mark.parametrize(
    "method, extra, stop",
    [
        ("tsd-kd", {"adaptive_opener": "true"}, 4),
        ("eopd", {"rollout_batch_size": 12}, 4),  # in the middle of a rollout that serves three steps
        ("eopd", {"rollout_batch_size": 12}, 6),
    ],
)
def test_resume_in_the_middle_of_an_epoch_is_bitwise(method, extra, stop, saved_model, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", make_rows(24))
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.01}
    split |= {"save_steps": stop, "num_train_epochs": 2, "method": method, **extra}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(run_flags(saved_model, data, whole, **split)) == 0
    assert main(run_flags(saved_model, data, parts, **split)) == 0
    for folder in parts.glob("checkpoint-*"):  # as if it had been killed after the first save
        if folder.name != f"checkpoint-{stop}":
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    (parts / "model.safetensors").unlink()
    torch.manual_seed(123)
    assert main([*run_flags(saved_model, data, parts, **split), "--resume_from_checkpoint", "true"]) == 0
    assert torch.equal(weights(parts), weights(whole))


def test_resuming_a_finished_run_trains_no_more(saved_model, rows_file, tmp_path, capsys):
    command = run_flags(saved_model, rows_file, tmp_path / "out", max_steps=2, save_steps=2, learning_rate=0.1)
    assert main(command) == 0
    before = weights(tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").unlink()  # killed between the last checkpoint and the final save
    assert main([*command, "--resume_from_checkpoint", "true"]) == 0
    assert torch.equal(weights(tmp_path / "out"), before)
    assert [p.name for p in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_finished_run_without_checkpoints_is_not_trained_again(saved_model, rows_file, tmp_path, capsys):
    folder = tmp_path / "out"
    command = run_flags(saved_model, rows_file, folder, max_steps=2, learning_rate=0.1)
    command += ["--save_strategy", "no", "--resume", "true"]
    assert main(command) == 0
    before = (folder / "model.safetensors").stat()
    assert main(command) == 2
    assert "output_dir" in capsys.readouterr().err
    assert (folder / "model.safetensors").stat() == before


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"]])
def test_help_answers_without_torch(words):
    code = f"import sys; from tsdkd.cli import main\ntry: main({words})\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'transformers', 'trl'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.rstrip().endswith("[]")
    assert "train" in result.stdout


ABORTS = """
import os

class Aborts:
    def __del__(self):
        os.abort()

last = Aborts()
"""


@pytest.mark.parametrize(("command", "code"), [(["configs"], 0), (["train", "--config", "none.yaml"], 2), (["no"], 2)])
def test_one_of_several_processes_isnt_torn_down(command, code, tmp_path):
    """What aborts while Python ends (a thread of gloo's may) costs neither the output nor the exit code."""
    (tmp_path / "sitecustomize.py").write_text(ABORTS)
    where = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    program = [sys.executable, "-m", "tsdkd", *command]
    alone, one_of_two = [
        subprocess.run(program, env=where | {"WORLD_SIZE": n}, capture_output=True, text=True) for n in ("1", "2")
    ]
    assert (alone.returncode, one_of_two.returncode) == (-signal.SIGABRT, code)
    assert one_of_two.stdout == alone.stdout
    assert one_of_two.stdout or one_of_two.stderr


def test_an_error_that_the_first_process_does_not_have():
    where = os.environ | {"WORLD_SIZE": "2", "RANK": "1"}
    program = [python(), "-m", "tsdkd", "train", "--config", "nowhere.yaml"]
    result = subprocess.run(program, env=where, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("nowhere.yaml") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="GNU OpenMP")
@pytest.mark.parametrize("name, value, expected", [("", "", "1000"), ("GOMP_SPINCOUNT", "7", "7")])
def test_threads_wait_without_spinning_for_long(name, value, expected):
    """As torch's own OpenMP tells it when it is loaded."""
    where = {key: text for key, text in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    where |= {"OMP_DISPLAY_ENV": "verbose", **({name: value} if name else {})}
    result = subprocess.run([sys.executable, "-m", "tsdkd", "methods"], env=where, capture_output=True, text=True)
    told = [line.split()[-1] for line in result.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    if not told:
        pytest.skip("torch has another OpenMP")
    assert told == len(told) * [f"'{expected}'"]


def test_configs_lists_every_preset(capsys):
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [path.name for path in preset_paths()]


@pytest.mark.parametrize("preset", [path.name for path in preset_paths()])
def test_every_preset_loads(preset, saved_model, rows_file, capsys, tmp_path, monkeypatch):
    """With the tiny pair and local rows in the place of the hub's; everything else as shipped."""
    monkeypatch.chdir(tmp_path)
    local = {"model_name_or_path": saved_model("qwen3", 0), "teacher_model_name_or_path": saved_model("qwen3", 1)}
    local |= {"dataset_name": rows_file, "dataset_train_split": "train", "use_cpu": "true", "bf16": "false"}
    local |= {"prompt_column": "prompt", "completion_column": "completion", "dataset_config": "null"}
    local |= {"num_train_epochs": 1, "gradient_accumulation_steps": 1, "use_vllm": "false"}
    assert main(["train", "--config", preset, "--dry_run", *flags(**local)]) == 0
    assert "optimizer steps" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_method_on_the_command_line_leaves_out_the_other_methods_options(saved_model, rows_file, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("method: tsd-kd\nalpha: 0.5\nbeta: 0.7\n")
    command = [*run_flags(saved_model, rows_file, tmp_path / "out", method="eopd"), "--config", str(config)]
    assert main([*command, "--dry_run"]) == 0
    assert "alpha, beta" in capsys.readouterr().out


WITHOUT = """
import json, sys
from importlib.machinery import PathFinder

class Finder(PathFinder):  # as in an environment without the extras
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        missing = name.split(".")[0] in {"deepspeed", "peft", "vllm"}
        return None if missing else super().find_spec(name, path, target)

sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not PathFinder] + [Finder]
from tsdkd.cli import main
from tsdkd.cli.logs import log_to_streams
from tsdkd.config.logs import set_log_level
for command in json.loads(sys.argv[1]):
    print(f"<exit code {main(command)}>", file=sys.stderr)
"""


def without_extras(program: str, *commands: list[str]) -> list[tuple[str, int]]:
    """What commands write to stderr, and their exit codes: one after the other in one process."""
    arguments = json.dumps([[str(word) for word in command] for command in commands])
    result = subprocess.run([sys.executable, "-c", program, arguments], env=on_cpus(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    ends = re.findall(r"(.*?)<exit code (\d+)>\n", result.stderr, re.DOTALL)
    return [(errors, int(code)) for errors, code in ends]


def test_nothing_needs_an_extra(saved_model, rows_file, tmp_path):
    command = run_flags(saved_model, rows_file, tmp_path / "out", max_steps=2, save_steps=1, save_strategy="steps")
    longer = [*command, "--max_steps", "3", "--resume", "true"]
    ends = without_extras(WITHOUT, command, longer, [*longer, "--teacher_placement", "zero3"])
    assert [code for _, code in ends] == [0, 0, 2], ends
    assert "extra 'deepspeed'" in ends[-1][0]


# what the command line does with words and messages


@pytest.mark.parametrize(
    "argv",
    [
        ("train", "--learning-rate", "1e-6", "--num-processes", "1", "--dry-run"),
        ("plan", "--learning-rate", "1e-6", "--num-processes", "1", "--gpu-gib", "80"),
        ("slurm", "--learning-rate", "1e-6", "--gpus-per-node", "2", "--time", "1:00:00"),
        ("generate", "--learning-rate", "1e-6", "--num-processes", "1", "--output-file", "{}/rows.jsonl"),
        ("analyze", "--config", "demo", "--learning-rate", "1e-6", "--num-processes", "1", "--limit", "1"),
    ],
    ids=lambda argv: argv[0],
)
def test_every_flag_may_be_written_with_dashes(argv, saved_model, rows_file, tmp_path):
    run = run_flags(saved_model, rows_file, tmp_path / "out", max_new_tokens=4)[1:]
    run = [word.replace("_", "-") if word.startswith("--") else word for word in run]
    assert main([argv[0], *(word.format(tmp_path) for word in argv[1:]), *run]) == 0


@pytest.mark.parametrize(
    ("argv", "found"),
    [
        ("report run --output page.html", "--output: is called --output_file"),
        ("analyze run --figures_dir figures", "--figures_dir: is called --output_dir"),
        ("analyze --config demo --num-prompts=5", "--num_prompts: is called --limit"),
        ("slurm --config demo --script job", "--script: is called --output_file"),
        ("generate --config demo --num_completions 4", "--num_completions: is called --samples"),
        ("report run --outptu page.html", "--outptu: unknown flag, did you mean '--output_file'?"),
        ("reproduce eopd-toy --seedz 3", "--seedz: unknown flag, did you mean '--seeds'?"),
        ("compare --lst", "--lst: unknown flag, did you mean '--list'?"),
        ("configs --path demo", "unexpected argument 'demo'"),
        ("plan --config demo --gpuz=3", "--gpuz: unknown flag, did you mean '--gpus'?"),
        ("slurm --config demo --time 1:00:00 --nodez 3", "--nodez: unknown flag, did you mean '--nodes'?"),
        ("generate --config demo --output_file x --sampels 4", "--sampels: unknown flag, did you mean '--samples'?"),
        ("generate --config demo --output_file x --sede 4", "sede: unknown key, did you mean 'seed'?"),
        ("analyze --config demo --limitt 4", "--limitt: unknown flag, did you mean '--limit'?"),
    ],
)
def test_an_unknown_flag_is_told_in_one_line(argv, found, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(argv.split()) == 2
    output = capsys.readouterr()
    assert output.err == f"tsdkd {argv.split()[0]}: {found}\n" and not output.out
    assert not list(tmp_path.iterdir())


def test_analyze_takes_a_method_that_never_generates(saved_model, rows_file, tmp_path):
    run = run_flags(saved_model, rows_file, tmp_path / "out", max_new_tokens=4, method="supervised-kd")[1:]
    (tmp_path / "run.yaml").write_text("method: supervised-kd")
    assert main(["analyze", "--config", str(tmp_path / "run.yaml"), "--limit", "1", *run]) == 0
    assert list((tmp_path / "out").rglob("*.parquet"))


@pytest.mark.parametrize(("rank", "shown"), [("0", "progress\n"), ("1", "")])
def test_what_the_library_logs_is_shown_while_a_command_runs(rank, shown, monkeypatch, capsys):
    logger = logging.getLogger("tsdkd.some.module")
    monkeypatch.setenv("RANK", rank)
    logger.info("before")
    with log_to_streams():
        logger.info("progress")
        logger.warning("a warning")
        logger.debug("a detail")
        set_log_level("passive")
        set_log_level("error")
        logger.warning("not shown")
    logger.info("after")
    output = capsys.readouterr()
    assert (output.out, output.err) == (shown, "a warning\n")
