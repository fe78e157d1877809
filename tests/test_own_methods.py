"""A method of a user's: named by its module and class, registered in Python, or by an installed package."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import QUIET, flags, write_jsonl
from tsdkd import ConfigError, register_method
from tsdkd.cli import main
from tsdkd.methods import EOPDTrainer, find_method

METHOD = '''
from dataclasses import dataclass

from tsdkd import Objective, StatisticsRequest, TokenSelectiveConfig, TokenSelectiveTrainer, option
from tsdkd.config.options import NON_NEGATIVE
from tsdkd.losses import FORWARD_KL


@dataclass
class OwnConfig(TokenSelectiveConfig):
    """Forward KL, a number of times."""

    method = "NAME"
    own_weight: float = option(1.0, "Factor of the forward KL.", NON_NEGATIVE)


@dataclass
class OwnObjective(Objective):
    own_weight: float

    @property
    def term_weights(self):
        return {"forward_kl": self.own_weight}

    def request(self, completions):
        return StatisticsRequest(divergence=FORWARD_KL)

    def per_token_terms(self, completions, statistics, rows):
        return {"forward_kl": statistics.divergence}


class OwnTrainer(TokenSelectiveTrainer):
    config_class = OwnConfig
    objective_class = OwnObjective
'''


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current directory is the test's."""
    monkeypatch.chdir(tmp_path)


def write_method(module: str, name: str, *changes: tuple[str, str]) -> str:
    """A module with a method in the current directory; returns the path of its trainer."""
    text = METHOD.replace("NAME", name)
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    Path(f"{module}.py").write_text(text, encoding="utf-8")
    return f"{module}:OwnTrainer"


@pytest.fixture
def base(saved_model: Any, rows_file: str) -> dict[str, Any]:
    """A run of one step."""
    values = {"model_name_or_path": saved_model("qwen3", 0), "teacher_model_name_or_path": saved_model("qwen3", 1)}
    values |= {**QUIET, "dataset_name": rows_file, "output_dir": "out", "max_steps": 1, "max_new_tokens": 4}
    return values | {"logging_steps": 1, "per_device_train_batch_size": 2}


def test_every_command_knows_it(base: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """`train`, its dry run and keys, `plan`, `generate`, `slurm`, and a run that goes on."""
    path = write_method("own_everywhere", "own-everywhere")
    Path("run.yaml").write_text(yaml.safe_dump({**base, "method": path, "own_weight": 2.0}), encoding="utf-8")
    assert main(["train", "--help_keys", "--method", path]) == 0
    assert "own_weight" in capsys.readouterr().out
    for command in (
        "plan",
        "slurm --time 1:00:00",
        "train --dry_run",
        "train",
        "generate --output_file o.jsonl",
    ):
        assert main([*command.split(), "--config", "run.yaml"]) == 0, command
    state = json.loads(Path("out/trainer_state.json").read_text())
    (log,) = (row for row in state["log_history"] if "loss" in row)
    assert log["loss"] == pytest.approx(2 * log["loss/forward_kl"]) and log["loss"] > 0
    saved = yaml.safe_load(Path("out/tsdkd_config.yaml").read_text())
    assert (saved["method"], saved["own_weight"]) == (path, 2.0)
    assert "own-everywhere" in Path("out/README.md").read_text()
    assert main(["train", "--config", "out/tsdkd_config.yaml", "--output_dir", "again"]) == 0
    capsys.readouterr()
    assert main(["methods"]) == 0
    assert "own-everywhere  Forward KL, a number of times." in capsys.readouterr().out


def test_its_options_are_checked(base: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    path = write_method("own_checked", "own-checked")
    for options, line in (
        ({"own_weight": -1}, "own_weight: must be at least 0, found -1.0"),
        ({"own_wieght": 1}, "own_wieght: unknown key, did you mean 'own_weight'?"),
        ({"beta": 0.3}, "beta: not an option of own-checked: the method has no generalized JSD; remove it"),
        ({"opener_ratio": 0.3}, f"opener_ratio: belongs to method tsd-kd, this run's method is {path}"),
    ):
        assert main(["train", *flags(**base, method=path, **options)]) == 2
        assert line in capsys.readouterr().err
    Path("run.yaml").write_text(yaml.safe_dump({**base, "method": path, "own_weight": 2.0}), encoding="utf-8")
    assert main(["train", "--config", "run.yaml", "--method", "gkd", "--dry_run"]) == 0
    assert "note: own_weight of the file, written for " in capsys.readouterr().out


def test_a_comparison_has_it(base: dict[str, Any], rows_file: str) -> None:
    """Its runs are processes, which import it again."""
    path = write_method("own_compared", "own-compared")
    Path("base.yaml").write_text(yaml.safe_dump(base), encoding="utf-8")
    runs = {"mine": {"method": path, "own_weight": 0.5}}
    values = {"config": "base.yaml", "output_dir": "out", "seeds": [1], "runs": runs, "eval_samples": 1}
    problems = write_jsonl(Path("problems.jsonl"), [{"prompt": "w1 w2", "answer": "3"}])
    Path("compare.yaml").write_text(yaml.safe_dump(values | {"eval_dataset_name": problems}), encoding="utf-8")
    assert main(["compare", "--config", "compare.yaml", "--task", "2"]) == 0
    assert json.loads(Path("out/mine/seed-1/result.json").read_text())["method"] == path


NO_METHODS: dict[str, tuple[tuple[tuple[str, str], ...], str]] = {
    # name -> (changes of the module, what the line says)
    "a built-in's name": ((('method = "', 'method = "gkd"  # '),), "are both called 'gkd'; rename the first"),
    "an odd name": (
        (('method = "', 'method = "Own KD"  # '),),
        "OwnConfig.method must be a name of its own: at most 60",
    ),
    "no name": ((('    method = "', '    other = "'),), "OwnConfig.method must be a name of its own"),
    "not a trainer": ((("OwnTrainer(TokenSelectiveTrainer)", "OwnTrainer"),), "must be a subclass of tsdkd.Token"),
    "no configuration": ((("config_class = ", "config_klass = "),), "has no config_class; set it to a subclass of"),
    "no objective": ((("objective_class = ", "x = "),), "has no objective_class; set it to a subclass of"),
    "another objective": (
        (("(Objective)", ""),),
        "objective_class must be a subclass of tsdkd.Objective, found <class",
    ),
    "no dataclass": ((("@dataclass\nclass OwnConfig", "class OwnConfig"),), "is no dataclass; put @dataclass before"),
    "an objective that is none": ((("@dataclass\nclass OwnObj", "class OwnObj"),), "OwnObjective is no dataclass"),
    "another field": ((("    own_weight: float\n", "    weight: float\n"),), "fields that OwnConfig lacks: weight"),
    "no annotation": ((("own_weight: float = option", "own_weight = option"),), "can't be imported: TypeError: 'own"),
}


@pytest.mark.parametrize("name", NO_METHODS)
def test_a_class_that_is_no_method_is_told(
    name: str, base: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    changes, found = NO_METHODS[name]
    module = "own_" + "".join(c if c.isalpha() else "_" for c in name)
    path = write_method(module, module.replace("_", "-"), *changes)
    assert main(["train", *flags(**base, method=path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tsdkd train: method: ") and module in line and found in line
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("method", "found"),
    [
        ("nowhere_to_be_found:Trainer", "there is no module 'nowhere_to_be_found'"),
        ("json:Trainer", "has no 'Trainer'"),
        ("json.dumps:Trainer", "there is no module 'json.dumps'"),
        ("own:", "must be package.module:name"),
        (":Trainer", "must be package.module:name"),
        ("./own.py:Trainer", "must be package.module:name, without a folder and without .py"),
        ("gkdd", "or package.module:Trainer, found 'gkdd', did you mean 'gkd'?"),
    ],
)
def test_a_method_that_is_not_there(
    method: str, found: str, base: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("train", "plan", "slurm --time 1:00:00", "generate --output_file o.jsonl"):
        assert main([*command.split(), *flags(**base, method=method)]) == 2
        error = capsys.readouterr().err
        assert found in error and "Traceback" not in error and len(error.splitlines()) == 1


def test_in_python(base: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_method("own_in_python", "own-in-python")
    monkeypatch.syspath_prepend(str(tmp_path))
    from own_in_python import OwnTrainer  # type: ignore[import-not-found]

    assert register_method(OwnTrainer) is OwnTrainer is find_method("own-in-python")
    assert register_method(OwnTrainer) is OwnTrainer is find_method("own_in_python:OwnTrainer")
    assert main(["train", *flags(**base, method="own-in-python")]) == 0

    class Impostor(EOPDTrainer):
        pass

    with pytest.raises(ConfigError, match=r"Impostor and tsdkd\.methods\.eopd:EOPDTrainer are both called 'eopd'"):
        register_method(Impostor)


def install(folder: Path, **points: str) -> None:
    """What `pip install` leaves of a package's entry points."""
    info = folder / "own_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-package\nVersion: 1.0\n", encoding="utf-8")
    lines = [f"{name} = {value}\n" for name, value in points.items()]
    (info / "entry_points.txt").write_text(f"[tsdkd.methods]\n{''.join(lines)}", encoding="utf-8")


def test_an_installed_package_has_some(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Broken ones are told when they are asked for; they hinder nothing else."""
    write_method("own_installed", "own-installed")
    Path("own_broken.py").write_text("raise ImportError('no libown.so')", encoding="utf-8")
    points = {"own-installed": "own_installed:OwnTrainer", "own-other-name": "own_installed:OwnTrainer"}
    points |= {"own-broken": "own_broken:OwnTrainer", "gkd": "own_broken:OwnTrainer"}
    install(tmp_path, **points)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["train", *flags(**base, method="own-installed", own_weight=3.0)]) == 0
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert main(["plan", *flags(**base, method="gkd")]) == 0
    capsys.readouterr()
    for listing in (["methods"], ["train", "--help_keys"]):
        assert main(listing) == 0
        assert ("own-installed" if listing == ["methods"] else "own_weight") in capsys.readouterr().out
    for name, found in (
        (
            "own-broken",
            "own-broken of own-package (own_broken:OwnTrainer) can't be imported: ImportError: no libown.so",
        ),
        ("own-other-name", "the entry point must be called 'own-installed', as the method"),
    ):
        assert main(["train", *flags(**base, method=name)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert found in line


def test_a_broken_package_is_warned_of_in_a_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path, **{"own-missing": "own_missing_module:OwnTrainer"})
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["methods"]) == 0
    out, error = capsys.readouterr()
    assert "tsd-kd" in out and "own-missing" not in out
    assert error.count("method: own-missing of own-package") == 1
