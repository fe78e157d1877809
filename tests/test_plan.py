"""`tsdkd plan`: which placement fits, from configurations alone; its figures are checked by benchmarks/plan.py."""

import pytest
import yaml
from transformers import Qwen2Config

from conftest import build_model
from tsdkd.cli import main
from tsdkd.memory import PLACEMENTS, Workload, estimate, size_of

QWEN = {
    "student": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
    "teacher": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48, "num_attention_heads": 40},
}


@pytest.fixture
def pair(tmp_path):
    """Configurations of Qwen2.5 1.5B and 14B, without weights."""
    for name, sizes in QWEN.items():
        keys, tied = {"student": (2, True), "teacher": (8, False)}[name]
        config = Qwen2Config(vocab_size=151936, num_key_value_heads=keys, tie_word_embeddings=tied, **sizes)
        config.dtype = "bfloat16"
        config.save_pretrained(tmp_path / name)
    names = {"model_name_or_path": "student", "teacher_model_name_or_path": "teacher"}
    return [word for key, name in names.items() for word in (f"--{key}", str(tmp_path / name))]


@pytest.mark.parametrize("family", ["gemma2", "llama", "qwen2", "qwen3"])
def test_sizes_without_weights(family):
    model = build_model(family)
    assert size_of(model.config).parameters == sum(p.numel() for p in model.parameters())


def test_a_plan(pair, capsys, monkeypatch):
    """On 8 x 80 GiB the paper's pair fits as it is; on 2 x 24 the teacher must leave."""
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["plan", "--config", "qwen25_14b_to_1p5b.yaml", *pair, "--gpus", "8", "--gpu_gib", "80"]) == 0
    out = capsys.readouterr().out
    assert "--accelerate_config ddp --num_processes 8 --teacher_placement replica" in out
    assert main(["plan", "--config", "qwen25_14b_to_1p5b.yaml", *pair, "--gpus", "2", "--gpu_gib", "24"]) == 0
    out = capsys.readouterr().out
    assert "teacher_placement replica" not in out and "zero2 + zero3:" in out and "most is teacher" in out
    assert main(["plan", "--config", "qwen25_14b_to_1p5b.yaml", *pair, "--gpus", "1", "--gpu_gib", "4"]) == 0
    assert "nothing fits" in capsys.readouterr().out


def test_a_plan_of_other_methods(pair, capsys, monkeypatch):
    """The teacher that samples must be whole; a method without one isn't estimated."""
    monkeypatch.setenv("COLUMNS", "160")
    command = ["plan", "--config", "qwen25_14b_to_1p5b.yaml", "--method"]
    assert main([*command, "minillm", *pair]) == 0
    assert "teacher_placement replica" in capsys.readouterr().out
    assert main([*command, "grpo", *pair[:2]]) == 2
    assert "grpo" in capsys.readouterr().err


def test_what_shards_less(pair):
    """Every placement takes less than the one before it, for a pair whose teacher is large."""
    config = Qwen2Config(vocab_size=1000, **QWEN["student"])
    size = size_of(config)
    work = Workload(1, 1, 1, 256, 4, 2, 2, checkpointing=True, chunk_gib=1.0, vllm_gib=0.0)
    totals = [sum(estimate(size, size, work, placement, 8).values()) for placement in PLACEMENTS]
    assert totals == sorted(totals, reverse=True)


@pytest.mark.parametrize("flag", ["--gpus=0", "--gpus=two", "--gpu_gib=nan", "--gpu_gib=-5", "--gpu_gib=inf"])
def test_a_plan_for_no_machine(flag, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--config", "demo.yaml", flag])
    assert stopped.value.code == 2 and flag.split("=")[1] in capsys.readouterr().err


def test_a_plan_of_nothing(capsys, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"learning_rat": 1}))
    assert main(["plan", "--config", str(tmp_path / "run.yaml")]) == 2
    assert "learning_rat" in capsys.readouterr().err
    assert main(["plan", "--config", "demo.yaml", "--model_name_or_path", "./none", "--output_dir", "x"]) == 2
    assert "model_name_or_path" in capsys.readouterr().err
