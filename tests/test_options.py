"""Options are declared once, with a default, a help and a rule; some have two names."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml
from trl import ModelConfig

from conftest import QUIET
from tsdkd import ConfigError, EOPDConfig, TSDKDConfig
from tsdkd.cli import main
from tsdkd.compare.config import Comparison
from tsdkd.config.aliases import ALIASES, RENAMED
from tsdkd.config.base import DataArguments, TokenSelectiveConfig
from tsdkd.config.coercion import coerce
from tsdkd.config.inherited import INHERITED_RULES, UNSUPPORTED_OPTIONS
from tsdkd.config.launch import LaunchArguments
from tsdkd.config.options import AT_LEAST_ONE, POSITIVE, Rules, declared_rules, get_default, get_help, option
from tsdkd.config.validation import declared_fields, get_rules
from tsdkd.methods import METHODS
from tsdkd.methods.defaults import TSDKDDefaults
from tsdkd.run.arguments import resolve_run_values

CONFIG_CLASSES = [trainer.config_class for trainer in METHODS.values()]
OTHER_CLASSES = [ModelConfig, DataArguments, LaunchArguments, Comparison]
RUN = {"model_name_or_path": "student", "teacher_model_name_or_path": "teacher", "dataset_name": "rows.jsonl"}


@pytest.mark.parametrize(
    "cls", [*CONFIG_CLASSES, DataArguments, LaunchArguments, Comparison], ids=lambda c: c.__name__
)
def test_every_option_has_a_help_and_every_number_a_rule(cls: Any) -> None:
    hints, rules = get_type_hints(cls), get_rules(cls)
    for name in declared_fields(cls):
        assert get_help(cls, name), name
        if {int, float} & {hints[name], *get_args(hints[name])}:
            assert rules[name].value, name


def test_no_rule_is_for_an_unknown_name() -> None:
    known = {f.name for cls in (*CONFIG_CLASSES, *OTHER_CLASSES) for f in fields(cls)}
    late = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # since transformers 5.24
    assert known >= {*INHERITED_RULES, *UNSUPPORTED_OPTIONS, *ALIASES.values(), *RENAMED.values(), *ALIASES} - late
    assert not known & RENAMED.keys()
    for cls in CONFIG_CLASSES:
        assert cls.unsupported_options.keys() <= {f.name for f in fields(cls)}


def test_a_method_refuses_what_its_facts_leave_no_use_for() -> None:
    for cls in CONFIG_CLASSES:
        refused = cls.unsupported_options.keys()
        assert cls.has_lmbda == ("lmbda" not in refused) and cls.has_jsd == ("beta" not in refused), cls
        assert cls.has_teacher or "teacher_model_name_or_path" in refused, cls
        assert cls.loads_teacher or refused >= {"teacher_placement", "record_steps"}, cls
        assert not cls.teacher_samples or "use_vllm" in refused, cls


def test_an_option_of_tsdkd_has_no_second_rule() -> None:
    for cls in CONFIG_CLASSES:
        assert not [name for name in INHERITED_RULES if any(declared_rules(cls, name))], cls


def test_another_default_keeps_help_and_rules() -> None:
    off = (lambda v: False, "never")

    @dataclass
    class Base:
        size: int = option(1, "How large.", POSITIVE, off)

    @dataclass
    class Child(Base):
        size: int = option(2)

    @dataclass
    class Grandchild(Child):
        size: int = option(3, rule=AT_LEAST_ONE)

    assert get_default(Grandchild, "size") == 3 and get_help(Grandchild, "size") == "How large."
    assert declared_rules(Child, "size") == Rules(POSITIVE, off)
    assert declared_rules(Grandchild, "size") == Rules(AT_LEAST_ONE, off)


def test_a_configuration_of_another_module_has_its_options() -> None:
    @dataclass
    class UncertainKLConfig(TSDKDDefaults):
        method = "uncertain-kl"
        paper = "none"

        teacher_threshold: float = option(0.8, "Teacher's entropy, nats, above which a token counts.", POSITIVE)
        plain_weight: float = 1.0  # no option of tsdkd: declared without `option`
        lmbda: float = 0.5  # still the option that TokenSelectiveConfig declares

    cls: Any = UncertainKLConfig
    assert cls.__module__ == __name__
    assert cls.method_options() == ["teacher_threshold", "lmbda", "warmup_steps"]
    args = cls("out", **QUIET, teacher_threshold="0.5", lmbda="0.25")
    assert (args.teacher_threshold, args.lmbda) == (0.5, 0.25)
    for value, text in (
        ("high", "teacher_threshold: expected a number"),
        (-1.0, "teacher_threshold: must be greater than 0"),
    ):
        with pytest.raises(ConfigError, match=text):
            cls("out", **QUIET, teacher_threshold=value)


def test_both_names_of_the_completion_limit_agree() -> None:
    for values, limit in (({}, 1024), ({"max_new_tokens": 7}, 7), ({"max_completion_length": 7}, 7)):
        args = TSDKDConfig("out", **QUIET, **values)
        assert args.max_new_tokens == args.max_completion_length == limit
    assert EOPDConfig("out", **QUIET, max_completion_length=7, max_new_tokens=7).max_completion_length == 7
    with pytest.raises(ConfigError, match=r"max_completion_length, max_new_tokens: .* 8 and 7"):
        TSDKDConfig("out", **QUIET, max_completion_length=8, max_new_tokens=7)
    with pytest.raises(ConfigError, match="max_completion_length: must be at least 1, found 0"):
        TSDKDConfig("out", **QUIET, max_new_tokens=0)


@pytest.mark.parametrize("name", ["max_new_tokens", "max_completion_length"])
def test_a_flag_overrides_the_file_by_either_name(name: str, tmp_path: Path) -> None:
    for key in ("max_new_tokens", "max_completion_length"):
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({**RUN, "output_dir": "out", key: 5}), encoding="utf-8")
        config = str(tmp_path / "run.yaml")
        assert resolve_run_values(config, []).values["max_completion_length"] == 5
        run = resolve_run_values(config, [f"--{name}", "6"])
        assert run.values["max_completion_length"] == run.explicit_values["max_completion_length"] == 6
        assert "max_new_tokens" not in run.explicit_values


def test_checkpointing_has_either_name(tmp_path: Path) -> None:
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        config = {**RUN, "output_dir": "out", name: False, f"{name}_kwargs": {"use_reentrant": True}}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        values = resolve_run_values(str(tmp_path / "run.yaml"), []).values
        assert values["gradient_checkpointing"] is False
        assert values["gradient_checkpointing_kwargs"] == {"use_reentrant": True}
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        base = {name: value for name, value in QUIET.items() if name != "gradient_checkpointing"}
        args = [TSDKDConfig("out", **base), TSDKDConfig("out", **base, gradient_checkpointing=False)]
        if hasattr(args[0], "activation_checkpointing"):
            args.append(TSDKDConfig("out", **base, activation_checkpointing=False))
    assert [a.gradient_checkpointing for a in args] == [True, False, False][: len(args)]


def test_a_run_of_an_earlier_version_goes_on(
    tmp_path: Path, saved_model: Callable[..., str], rows_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its configuration has the names of its time; the values are the same."""
    flags = ["--model_name_or_path", saved_model("qwen3", 0), "--teacher_model_name_or_path", saved_model("qwen3", 1)]
    flags += ["--dataset_name", rows_file, "--output_dir", str(tmp_path / "out"), "--method", "opd", "--use_cpu"]
    flags += ["--bf16", "false", "--save_steps", "1", "--rollout_batch_size", "2", "--report_to", "none"]
    flags += ["--per_device_train_batch_size", "2", "--max_length", "32", "--epsilon", "0.3", "--log_level", "info"]
    assert main(["train", *flags, "--max_steps", "1", "--max-new-tokens", "4"]) == 0
    path = tmp_path / "out" / "tsdkd_config.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    values["max_new_tokens"], values["clip_epsilon"] = values.pop("max_completion_length"), values.pop("epsilon")
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    flags += ["--max_steps", "2", "--resume"]
    assert main(["train", *flags, "--max_completion_length", "5"]) == 2
    assert "max_completion_length was 4, now 5" in capsys.readouterr().err
    assert main(["train", *flags, "--max_completion_length", "4"]) == 0
    assert "resume: max_steps was 1, now 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (["a", 1], list[str] | None, ["a", "1"]),
        ("a", list[str], ["a"]),
        ({"a": "true"}, dict[str, bool], {"a": True}),
        ({"a": "x", "b": [1]}, dict[str, Any], {"a": "x", "b": [1]}),
        ([1, "x"], list[Any], [1, "x"]),
        ("none", list[str] | None, None),
    ],
)
def test_elements_are_coerced(value: Any, hint: Any, expected: Any) -> None:
    assert coerce(value, hint) == expected


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        ({"a": "x"}, dict[str, bool] | None, "expected true or false, found 'x'"),
        ([["a"]], list[str], r"expected a string, found \['a'\]"),
        ([None], list[str] | None, "expected a string, found nothing"),
        ((1, 2), str, "expected a string"),
        ({1}, str, "expected a string"),
        (b"x", str, "expected a string"),
    ],
)
def test_elements_of_another_type_are_refused(value: Any, hint: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        coerce(value, hint)


def test_the_common_options_are_those_of_the_base_class() -> None:
    assert "max_completion_length" in TokenSelectiveConfig.method_options()
    assert "max_new_tokens" not in TokenSelectiveConfig.method_options()
    assert "max_completion_length" in EOPDConfig.method_options()
