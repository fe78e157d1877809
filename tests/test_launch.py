"""How a run's processes are started: by the YAML's keys, by flags, by itself, and never twice."""

import pytest
import yaml

from conftest import QUIET
from tsdkd.cli import main
from tsdkd.run_dir import RUN_FILE


@pytest.fixture
def config(saved_model, rows_file, tmp_path):
    """`config(**values)` -> the path of a run's YAML; its output is `out` beside it."""

    def write(**values: object) -> str:
        names = {
            "model_name_or_path": saved_model("qwen3", 0),
            "teacher_model_name_or_path": saved_model("qwen3", 1),
            "dataset_name": rows_file,
            "output_dir": str(tmp_path / "out"),
            "max_length": 64,
            "max_new_tokens": 8,
            "max_steps": 2,
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({**names, **QUIET, **values}))
        return str(tmp_path / "run.yaml")

    return write


def test_every_command_takes_a_file_that_says_how_to_launch(config, tmp_path, capsys):
    file = config(accelerate_config="ddp", num_processes=1)
    assert main(["train", "--config", file, "--dry_run"]) == 0
    assert main(["plan", "--config", file]) == 0
    assert main(["slurm", "--config", file, "--time", "01:00:00"]) == 0
    assert main(["generate", "--config", file, "--output_file", str(tmp_path / "rows.jsonl")]) == 0
    comparison = {"config": file, "output_dir": str(tmp_path / "c"), "seeds": [1], "runs": {"a": {}}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(comparison))
    assert main(["compare", "--config", str(tmp_path / "c.yaml"), "--slurm"]) == 0


def test_what_cannot_be_launched_is_told_with_all_else(config, capsys):
    assert main(["train", "--config", config(accelerate_config="zero9", num_processes=0, beta=7), "--dry_run"]) == 2
    error = capsys.readouterr().err
    assert all(key in error for key in ("accelerate_config", "zero9", "num_processes", "beta"))


def test_a_run_goes_on_however_it_is_launched(config, tmp_path):
    assert main(["train", "--config", config(save_strategy="steps", save_steps=1)]) == 0
    changed = config(save_strategy="steps", save_steps=1, max_steps=3, num_processes=1, accelerate_config="single")
    assert main(["train", "--config", changed, "--resume", "true"]) == 0
    assert yaml.safe_load((tmp_path / "out" / RUN_FILE).read_text())["num_processes"] == 1
