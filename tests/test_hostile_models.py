"""Models that strangers made: weights that aren't finite, folders with anything in them."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from conftest import QUIET, flags, make_rows, write_jsonl
from tsdkd import ModelError, TSDKDConfig, TSDKDTrainer
from tsdkd.cli import main
from tsdkd.models.finite_weights import require_finite, require_finite_files

FIELDS = {"model_name_or_path": "student", "teacher_model_name_or_path": "teacher"}
Run = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def run(saved_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """A command with copies of two models, `student` and `teacher`: exit code and its lines on stderr."""
    monkeypatch.chdir(tmp_path)
    for seed, role in enumerate(FIELDS.values()):
        shutil.copytree(saved_model("qwen3", seed), role)
    data = write_jsonl(tmp_path / "rows.jsonl", make_rows(4))
    common = {**FIELDS, "dataset_name": data, "max_completion_length": 4, "max_steps": 1, **QUIET}

    def call(command: str, *others: str, **values: object) -> tuple[int, list[str]]:
        capsys.readouterr()
        out = {} if command == "generate" else {"output_dir": "out"}
        code = main([command, *flags(**{**common, **out, **values}), *others])
        lines = capsys.readouterr().err.splitlines()
        return code, [line for line in lines if line.startswith(f"tsdkd {command}: ")]

    return call


def spoil(folder: str, value: float, name: str = "model.layers.1.mlp.up_proj.weight", file: str = "model") -> None:
    """Put a value into a tensor of a saved model."""
    path = f"{folder}/{file}.safetensors"
    weights = load_file(path)
    weights[name].view(-1)[-1] = value
    save_file(weights, path, metadata={"format": "pt"})


# Weights


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("field", FIELDS)
def test_weights_that_are_not_finite(field: str, value: str, run: Run, tmp_path: Path) -> None:
    """Training, generation and analysis: one line that names the model and the tensor, and nothing is written."""
    spoil(FIELDS[field], float(value))
    before = sorted(tmp_path.rglob("*"))
    role = FIELDS[field]
    for command in (
        ["train"],
        ["generate", "--output_file", "made/rows.jsonl", "--role", role],
        ["analyze", "--config", "run.yaml"],
    ):
        if command[0] == "analyze":
            (tmp_path / "run.yaml").write_text(f"model_name_or_path: {FIELDS['model_name_or_path']}\n")
        code, (line,) = run(*command) if command[0] != "analyze" else run("analyze", "--config", "run.yaml")
        assert code == 2 and line.startswith(f"tsdkd {command[0]}: {field}: ")
        assert f" {role} " in line and "model.layers.1.mlp.up_proj.weight" in line
        assert ("NaN" if value == "nan" else "infinity") in line
        (tmp_path / "run.yaml").unlink(missing_ok=True)
        assert [path for path in sorted(tmp_path.rglob("*")) if path.name != "made"] == before


@pytest.mark.parametrize("shard", ["sub/part.safetensors", "/dev/zero", "../student/model.safetensors", 5, None])
def test_an_index_names_files_beside_it(shard: Any, run: Run) -> None:
    """A pipe or an endless device elsewhere would be read."""
    Path("student/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))
    code, (line,) = run("train")
    assert code == 2 and "model_name_or_path" in line and "model.safetensors.index.json: " in line


def test_a_model_that_is_not_needed_may_be_anything(run: Run) -> None:
    spoil("student", float("nan"))
    assert run("generate", "--output_file", "rows.jsonl2", "--role", "teacher") == (0, [])


def test_the_engine_s_files_are_looked_at(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM reads them itself: before it starts."""
    spoil("teacher", float("nan"))
    with pytest.raises(ModelError, match=r"teacher_model_name_or_path: .*teacher.*up_proj\.weight contains NaN"):
        require_finite_files("teacher", "teacher_model_name_or_path", None)
    require_finite_files("student", "model_name_or_path", None)
    monkeypatch.setattr("tsdkd.generate.require_vllm", lambda: None)
    code, (line,) = run("generate", "--output_file", "rows2.jsonl", "--use_vllm", "true")
    assert code == 2 and "teacher_model_name_or_path: " in line and "NaN" in line
    assert not Path("rows2.jsonl").exists()


def test_an_adapter_s_weights(run: Run) -> None:
    code, _ = run("train", use_peft=True, lora_r=2, output_dir="adapter")
    assert code == 0
    spoil("adapter", float("inf"), next(iter(load_file("adapter/adapter_model.safetensors"))), "adapter_model")
    with pytest.raises(ModelError, match=r"models: .*lora_A.* contains infinity"):
        require_finite(AutoModelForCausalLM.from_pretrained("adapter"), "models")
    with pytest.raises(ModelError, match="infinity"):
        require_finite_files("adapter", "model_name_or_path", None)


@pytest.mark.parametrize("role", ["model", "teacher_model"])
def test_models_in_memory(role: str, saved_model: Any, tmp_path: Path) -> None:
    models = {
        name: AutoModelForCausalLM.from_pretrained(saved_model("qwen3", i)) for i, name in enumerate(FIELDS.values())
    }
    chosen = models["student" if role == "model" else "teacher"]
    with torch.no_grad():
        chosen.lm_head.weight[3, 4] = float("nan")
    from datasets import Dataset

    with pytest.raises(ModelError, match=rf"^{role}: .*lm_head\.weight contains NaN"):
        TSDKDTrainer(
            *models.values(),
            TSDKDConfig(str(tmp_path / "out"), **QUIET),
            train_dataset=Dataset.from_list(make_rows(4)),
        )
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_of_number(dtype: torch.dtype) -> None:
    class Model(nn.Module):
        def __init__(self, numbers: torch.Tensor) -> None:
            super().__init__()
            self.empty = nn.Parameter(torch.zeros(0, 3))
            self.weight = nn.Parameter(numbers, requires_grad=False)
            self.tied = self.weight
            self.register_buffer("mask", torch.full((2, 2), float("-inf")))
            self.register_buffer("ids", torch.arange(3))
            self.register_buffer("flag", torch.tensor(True))

    largest = torch.full((300, 5), torch.finfo(dtype).max, dtype=dtype)
    require_finite(Model(largest), "model")
    require_finite(Model(largest.T), "model")
    require_finite(Model(torch.empty(4, 4, device="meta", dtype=dtype)), "model")
    for value in ("nan", "inf", "-inf"):
        numbers = largest.clone()
        numbers[-1, -1] = torch.tensor(float(value)).to(dtype)
        if not numbers[-1, -1].float().isfinite():  # e4m3fn has no infinity
            with pytest.raises(ModelError, match=r"weight contains (NaN|infinity)"):
                require_finite(Model(numbers), "model")
    model = Model(largest)
    model.mask[0, 0] = float("nan")
    with pytest.raises(ModelError, match="mask contains NaN"):
        require_finite(model, "model")


@pytest.mark.parametrize(("numel", "bad"), [(10, 9), (10, 5), (10, 0), (11, 10), (1, 0), (7, None)])
def test_a_shard_s_padding_is_not_looked_at(numel: int, bad: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over three processes, as DeepSpeed lays parameters out: the last parts' padding is never written. All of them
    raise, whoever has the number."""
    size = -(-numel // 3)
    whole = torch.full((3 * size,), float("nan"))
    whole[:numel] = 1.0
    if bad is not None:
        whole[bad] = float("nan")
    seen: list[str | None] = []
    for known in (None, "all"):
        for rank in range(3):
            model = nn.Linear(1, 1, bias=False)
            model.weight.ds_tensor = whole[rank * size : (rank + 1) * size]
            model.weight.ds_numel, model.weight.ds_process_group = numel, None
            monkeypatch.setattr("torch.distributed.get_rank", lambda group, rank=rank: rank)

            def gather(found: list[str | None], known: str | None = known) -> list[str | None]:
                seen.extend(found if known is None else [])
                return found if known is None else seen

            monkeypatch.setattr("tsdkd.models.finite_weights.gather_object", gather)
            if known is None:
                with contextlib.suppress(ModelError):
                    require_finite(model, "model")
            elif bad is None:
                require_finite(model, "model")
            else:
                with pytest.raises(ModelError, match="weight contains NaN"):
                    require_finite(model, "model")
    assert sum(found is not None for found in seen) == (bad is not None)


# Folders


def edit(folder: str, file: str = "config.json", **values: Any) -> None:
    path = Path(folder, file)
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


SIZES = [("vocab_size", 10**12), ("vocab_size", 0), ("vocab_size", "many"), ("vocab_size", 1.5), ("vocab_size", True)]
SIZES += [("max_position_embeddings", -1), ("max_position_embeddings", "long"), ("max_position_embeddings", 10**400)]
SIZES += [("num_hidden_layers", 10**9), ("num_hidden_layers", -2), ("hidden_size", 10**12), ("hidden_size", {})]
SIZES += [("head_dim", 10**9), ("num_attention_heads", 0), ("intermediate_size", -1), ("num_key_value_heads", "2")]


@pytest.mark.parametrize(("key", "value"), SIZES, ids=str)
def test_sizes_that_no_model_has(key: str, value: Any, run: Run, tmp_path: Path) -> None:
    edit("student", **{key: value})
    for argv in (["train"], ["train", "--dry_run"], ["plan"], ["generate", "--output_file", "rows2.jsonl"]):
        code, (line,) = run(*argv)
        assert code == 2 and "model_name_or_path: " in line and key in line and "student" in line and len(line) < 600
    assert not Path("out").exists() and not Path("rows2.jsonl").exists()


BROKEN: dict[str, Callable[[], Any]] = {
    "config.json is deep": lambda: Path("student/config.json").write_text('{"a":' * 9000 + "1" + "}" * 9000),
    "config.json is a list": lambda: Path("student/config.json").write_text("[]"),
    "config.json is binary": lambda: Path("student/config.json").write_bytes(b"\0\xff\xfe" * 99),
    "config.json has a long number": lambda: Path("student/config.json").write_text('{"a": ' + "9" * 9000 + "}"),
    "an unknown type": lambda: edit("student", model_type="stranger"),
    "a type that is a list": lambda: edit("student", model_type=[1]),
    "an unknown activation": lambda: edit("student", hidden_act="stranger"),
    "code of its own": lambda: edit("student", auto_map={"AutoConfig": "evil.Config"}, model_type="stranger"),
    "heads that don't divide": lambda: edit("student", num_attention_heads=3, num_key_value_heads=2),
    "end tokens are words": lambda: edit("student", "generation_config.json", eos_token_id="end"),
    "end tokens are mappings": lambda: edit("student", "generation_config.json", eos_token_id=[{}]),
    "generation_config.json is deep": lambda: Path("student/generation_config.json").write_text("[" * 9000),
    "tokenizer_config.json is deep": lambda: Path("student/tokenizer_config.json").write_text("[" * 9000),
    "tokenizer_config.json is a word": lambda: Path("student/tokenizer_config.json").write_text('"word"'),
    "tokenizer.json is deep": lambda: Path("student/tokenizer.json").write_text("[" * 90_000),
    "an adapter of nothing": lambda: Path("student/adapter_config.json").write_text("{"),
}
for _name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors"):
    BROKEN[f"{_name} is a pipe"] = lambda name=_name: (Path("student", name).unlink(), os.mkfifo(f"student/{name}"))
    BROKEN[f"{_name} is a device"] = lambda name=_name: (
        Path("student", name).unlink(),
        Path("student", name).symlink_to("/dev/zero"),
    )
BROKEN["chat_template.jinja is a pipe"] = lambda: (
    Path("student/chat_template.jinja").unlink(missing_ok=True),
    os.mkfifo("student/chat_template.jinja"),
)
BROKEN["config.json is huge"] = lambda: os.truncate("student/config.json", 2**40)  # sparse


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_is_no_model(name: str, run: Run) -> None:
    BROKEN[name]()
    code, (line,) = run("train")
    assert code == 2 and "model_name_or_path: " in line and "student" in line and len(line) < 600
    assert not Path("out").exists()
    code, lines = run("plan")
    assert code == 0 or (
        code == 2 and len(lines) == 1 and "student" in lines[0]
    )  # it reads no tokenizer and no weights


def test_a_negative_end_token_is_none(run: Run) -> None:
    edit("student", "generation_config.json", eos_token_id=[-1, 1])
    assert run("train")[0] == 0
    assert AutoModelForCausalLM.from_pretrained("out").generation_config.eos_token_id in (1, [1])
