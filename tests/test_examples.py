"""`examples/`, without the weights that a package carries: with tiny models instead."""

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from conftest import build_model, build_tokenizer
from tsdkd.cli import main
from tsdkd.data import load_split
from tsdkd.data.reasoning_gym import is_correct

SMOLLM2 = Path(__file__).parents[1] / "examples" / "smollm2"


@pytest.fixture
def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare", SMOLLM2 / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_worked_solutions(prepare):
    for row in load_split(f"{prepare.TASK}&seed=1&size=200", None, "train"):
        solution = prepare.add_solution(row)["completion"][0]["content"]
        *lines, result = solution.splitlines()
        assert all(eval(left) == int(right) for left, right in (line.split(" = ") for line in lines))
        assert result.startswith("#### ") and is_correct(solution, row["answer"])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")  # its new name is of transformers 5.24
def test_a_pair_is_made(prepare, tmp_path, monkeypatch):
    """As the script does, from a tiny model."""
    monkeypatch.setattr(prepare, "load_smollm2", lambda: (build_model("llama"), build_tokenizer()))
    monkeypatch.setattr(prepare, "MODELS", tmp_path)
    monkeypatch.setattr(prepare, "TEACHER_STEPS", 2)
    monkeypatch.setattr(prepare, "STUDENT_STEPS", 1)
    prepare.main()
    teacher, student = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("teacher", "student"))
    assert not teacher.lm_head.weight.equal(student.lm_head.weight)


def test_the_configuration_is_valid(tmp_path, capsys):
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    LlamaConfig(**sizes, num_hidden_layers=30, vocab_size=49152, tie_word_embeddings=True).save_pretrained(tmp_path)
    pair = ["--model_name_or_path", str(tmp_path), "--teacher_model_name_or_path", str(tmp_path)]
    assert main(["plan", "--config", str(SMOLLM2 / "smollm2.yaml"), *pair, "--gpus", "1", "--gpu_gib", "24"]) == 0
    assert "fits:" in capsys.readouterr().out
    subprocess.run(["bash", "-n", SMOLLM2 / "run.sh"], check=True)
