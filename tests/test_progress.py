"""What a run shows: one live line on a terminal, lines in a log, and where its time goes."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.utils.logging import enable_progress_bar, is_progress_bar_enabled

from conftest import QUIET, flags, make_rows
from preloaded import python
from tsdkd import EOPDConfig, EOPDTrainer, TSDKDConfig, TSDKDTrainer
from tsdkd.cli import main
from tsdkd.cli.arguments import say_how_to_continue
from tsdkd.errors import PreemptedError
from tsdkd.trainer.progress import ProgressLineCallback

STEP = re.compile(
    r"step (\d+)/4, loss [\d.e-]+ \(direct [\d.e-]+, entropy [\d.e-]+, indirect [\d.e-]+\), [\d,]+ tokens/s, "
    r"[\d.]+ s/step \(rollout [\d.e-]+, teacher [\d.e-]+, student [\d.e-]+\)(, [\d:]+ left)?"
)


@pytest.fixture
def command(saved_model, rows_file, tmp_path):
    def build(**values):
        names = {"model_name_or_path": saved_model("qwen3", 0), "teacher_model_name_or_path": saved_model("qwen3", 1)}
        values = {"max_steps": 4, "logging_steps": 2, "per_device_train_batch_size": 2, "max_length": 32, **values}
        names |= {"dataset_name": rows_file, "output_dir": tmp_path / "out"}
        return ["train", *flags(**{**names, **QUIET, **values})]

    return build


def test_a_log_has_lines_for_people(command, rows_file, tmp_path):
    evaluation = {"eval_strategy": "steps", "eval_steps": 4, "eval_on_start": True, "eval_dataset_name": rows_file}
    program = [sys.executable, "-m", "tsdkd", *command(**evaluation)]
    result = subprocess.run(program, capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    assert [match[1] for line in lines if (match := STEP.fullmatch(line))] == ["2", "4"]
    evaluated = [line.partition(", evaluation: accuracy ")[0] for line in lines if "evaluation: accuracy " in line]
    assert evaluated == ["step 0", "step 4"]
    start, end = lines.index(f"output:   {tmp_path / 'out'}"), lines.index(f"saved the student to {tmp_path / 'out'}")
    assert any(line.startswith("loading the teacher ") for line in lines[:start])
    assert "training: 4 steps of 2 prompts on 1 process (cpu)" in lines[:start]
    assert lines[end - 1].startswith("trained 4 steps in ") and lines[end + 1].startswith("next: tsdkd report ")
    assert result.stderr == "" and not re.search(r"[{}]|it/s|WARNING", result.stdout)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"eval_strategy": "epoch"}, "on 24 prompts, every epoch"),
        ({"eval_on_start": True}, "on 24 prompts, before training"),
        ({"eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True}, "every 3 steps and before training"),
        ({}, "not during training: eval_strategy is no"),
    ],
)
def test_when_it_evaluates(options, shown, command, rows_file, capsys):
    assert main(command(max_steps=1, eval_dataset_name=rows_file, **options)) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("evaluate: "))
    assert line.endswith(shown)


@pytest.mark.parametrize(("level", "is_quiet"), [("info", False), ("warning", True), ("error", True)])
def test_log_level(level, is_quiet, command, capsys):
    assert main(command(log_level=level, method="eopd", top_p=0.9, rollout_batch_size=2)) == 0
    shown = capsys.readouterr().out
    assert (shown == "") == is_quiet and ("note: top_p" in shown) == (not is_quiet)


def run_on_terminal(argv: list[str], stdout: Path | None = None) -> tuple[int, str]:
    """Run tsdkd on a terminal of its own, and return its exit code and what the terminal got."""
    program = [python(), "-m", "tsdkd", *argv]
    process, terminal = pty.fork()
    if process == 0:
        if stdout is not None:
            os.dup2(os.open(stdout, os.O_WRONLY | os.O_CREAT), 1)
        os.execv(program[0], program)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    shown = b""
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError:  # the end
            break
        if not data:
            break
        shown += data
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), shown.decode()


@pytest.mark.parametrize("redirected", [False, True])
def test_a_terminal_has_one_live_line(redirected, command, tmp_path):
    """Where only stderr is a terminal, as with `| tee log`, stdout gets the lines of a log too."""
    log = tmp_path / "log"
    log.touch()
    argv = command(disable_tqdm=False, save_strategy="steps", save_steps=2)
    code, shown = run_on_terminal(argv, log if redirected else None)
    assert code == 0
    (live,) = [line for line in shown.split("\n") if "step 1/4" in line]
    assert all(f"step {step}/4" in live for step in range(5)) and "left, " in live and "tokens/s, loss " in live
    assert "Writing model shards" not in live.partition("step 4/4")[0]
    lines = (log.read_text() if redirected else shown).splitlines()
    assert len([line for line in lines if STEP.fullmatch(line.strip())]) == (2 if redirected else 0)
    assert any("trained 4 steps" in line for line in lines)


def test_transformers_own_callbacks_are_replaced(saved_model, tmp_path):
    rows = Dataset.from_list(make_rows(4))
    for disable_tqdm in (True, False):
        args = TSDKDConfig(str(tmp_path / str(disable_tqdm)), **{**QUIET, "disable_tqdm": disable_tqdm})
        trainer = TSDKDTrainer(saved_model("qwen3", 0), saved_model("qwen3", 1), args, train_dataset=rows)
        found = [type(callback) for callback in trainer.callback_handler.callbacks]
        assert ProgressLineCallback in found and not {ProgressCallback, PrinterCallback} & {*found}


@pytest.mark.parametrize(("config", "trainer_class"), [(TSDKDConfig, TSDKDTrainer), (EOPDConfig, EOPDTrainer)])
def test_the_parts_of_a_step(config, trainer_class, saved_model, tmp_path):
    """Seconds a step, whatever the logging interval and however many steps a rollout serves."""
    more = {"rollout_batch_size": 4} if config is EOPDConfig else {}
    args = config(
        str(tmp_path), max_steps=6, logging_steps=3, per_device_train_batch_size=2, max_length=32, **more, **QUIET
    )
    trainer = trainer_class(
        saved_model("qwen3", 0), saved_model("qwen3", 1), args, train_dataset=Dataset.from_list(make_rows(8))
    )
    trainer.train()
    *logs, end = trainer.state.log_history
    assert len(logs) == 2
    for log in logs:
        parts = [log[f"time/{name}_seconds"] for name in ("rollout", "teacher", "student")]
        assert min(parts) > 0 and sum(parts) <= log["time/step_seconds"] * (1 + 1e-6)
    assert 3 * sum(log["time/step_seconds"] for log in logs) <= end["train_runtime"] + 0.01


@pytest.mark.parametrize(
    ("given", "printed"),
    [
        (["--max_steps", "4"], "tsdkd train --max_steps 4 --resume true"),
        (["--resume", "false", "--max_steps", "4"], "tsdkd train --max_steps 4 --resume true"),
        (["--resume_from_checkpoint=a b/checkpoint-2"], "tsdkd train --resume_from_checkpoint true"),
    ],
)
def test_the_command_that_continues(given, printed):
    with (
        pytest.raises(PreemptedError, match=f"stopped; continue with: {printed}$"),
        say_how_to_continue("train", *given, from_checkpoint="checkpoint" in given[0]),
    ):
        raise PreemptedError("stopped")


def test_a_failure_ends_the_live_line(saved_model, tmp_path, monkeypatch):
    """And shows transformers' own bars again."""

    class Fails(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise RuntimeError("stop here")

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    args = TSDKDConfig(str(tmp_path), max_steps=2, **{**QUIET, "disable_tqdm": False})
    rows = Dataset.from_list(make_rows(4))
    models = saved_model("qwen3", 0), saved_model("qwen3", 1)
    trainer = TSDKDTrainer(*models, args, train_dataset=rows, callbacks=[Fails()])
    enable_progress_bar()
    with pytest.raises(RuntimeError, match="stop here"):
        trainer.train()
    assert is_progress_bar_enabled()
    (line,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, ProgressLineCallback))
    assert line._bar is None
