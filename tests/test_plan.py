"""`tsdkd plan`: whether a configuration fits, from the models' configurations alone; its figures are checked by
benchmarks/plan.py."""

import itertools
import json
import re
from dataclasses import replace

import pytest
import yaml
from transformers import Qwen3MoeConfig

from conftest import build_model
from model_configs import BILLIONS, CONFIGS, save_config
from tsdkd.cli import main
from tsdkd.errors import ConfigError
from tsdkd.launch.memory import Sharding, estimate_memory
from tsdkd.launch.model_size import ModelSize, compute_model_size
from tsdkd.launch.placement import PLACEMENTS, read_sharding
from tsdkd.launch.split import pipelined_step
from tsdkd.launch.vllm_memory import split_engine_memory
from tsdkd.launch.workload import VllmMemoryConfig, Workload
from tsdkd.run.presets import find_preset, preset_names

STUDENT, TEACHER = "Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-14B-Instruct"
ONE_GPU = {"qwen25_7b_to_1p5b_24gb_lora": 24, "qwen25_7b_to_1p5b_80gb": 80}


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def plan(tmp_path, capsys):
    """`plan(preset, *flags)` -> what `tsdkd plan` prints, with the preset's models as config.json files."""

    def run(preset="qwen25_14b_to_1p5b", *flags, gpus=8, gpu_gib=80):
        values = yaml.safe_load(find_preset(preset).read_text())
        names = [key for key in ("model_name_or_path", "teacher_model_name_or_path") if f"--{key}" not in flags]
        pair = [word for key in names for word in (f"--{key}", save_config(values[key], tmp_path))]
        command = ["plan", "--config", preset, *pair, *flags, "--gpus", str(gpus), "--gpu_gib", str(gpu_gib)]
        assert main(command) == 0
        return capsys.readouterr().out

    return run


def fits(out):
    """Whether the configuration as it is fits, GiB that it takes, and the placement that is proposed."""
    verdict = next(line for line in out.splitlines() if line.startswith("this configuration"))
    taken = re.search(r" fits.*: ([\d.]+) of", verdict)
    proposed = re.search(r"--accelerate_config (\S+) --num_processes \d+ --teacher_placement (\S+)", out)
    return "fits:" in verdict, float(taken[1]) if taken else None, proposed.groups() if proposed else None


@pytest.mark.parametrize("family", ["gemma2", "llama", "qwen2", "qwen3"])
def test_sizes_without_weights(family):
    model = build_model(family)
    assert compute_model_size(model.config).num_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_presets_models_are_the_published_ones(name):
    assert compute_model_size(CONFIGS[name]).num_parameters / 1e9 == pytest.approx(BILLIONS[name], abs=0.006)


def test_a_mixture_of_experts_computes_with_some_of_them():
    """Qwen3-30B-A3B, of 128 experts 8 at a time: 30.5 and 3.3 billion, says its model card."""
    experts = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
    size = compute_model_size(
        Qwen3MoeConfig(hidden_size=2048, num_hidden_layers=48, vocab_size=151936, **heads, **experts)
    )
    assert size.num_parameters / 1e9 == pytest.approx(30.5, abs=0.05)
    assert size.num_active_parameters / 1e9 == pytest.approx(3.3, abs=0.06)
    dense = compute_model_size(CONFIGS[TEACHER])
    assert dense.num_active_parameters == dense.num_parameters


@pytest.mark.parametrize("preset", [name for name in preset_names() if not name.startswith("demo")])
def test_every_preset_fits_as_it_is(preset, plan):
    """With room, in the placement that is the fastest; vLLM's cache holds a whole rollout."""
    gib = ONE_GPU.get(preset)
    out = plan(preset, gpus=1 if gib else 8, gpu_gib=gib or 80)
    values = yaml.safe_load(find_preset(preset).read_text())
    own = values.get("accelerate_config", "single"), values.get("teacher_placement", "replica")
    assert fits(out)[0] and fits(out)[2] == own
    if values.get("use_vllm"):
        held, rollout = re.search(r"for (\d+) sequences of \d+ tokens; a rollout has (\d+)", out).groups()
        assert int(held) >= int(rollout)
    else:
        assert "offpolicy" in preset or preset.endswith("24gb_lora")


def test_a_teacher_on_a_server(plan):
    """Its output layer is here; each of its hidden states crosses the network as 2 x 5120 bytes."""
    out = plan("qwen25_14b_to_1p5b", "--teacher_placement", "server", "--teacher_server_base_url", "http://a:1")
    assert re.search(rf"^ teacher +{152064 * 5120 * 2 / 2**30:.1f} ", out, re.MULTILINE)
    assert f"{8 * 16 * 1024 * 5120 * 2 / 2**30:.2f} GiB of hidden states" in out
    assert "(zero1 + server) fits" in out


def test_a_split_of_the_gpus(plan):
    def split(*flags: str, gpus: int, gpu_gib: int = 80) -> list[int]:
        out = plan("qwen25_14b_to_1p5b", *flags, gpus=gpus, gpu_gib=gpu_gib)
        (line,) = (line for line in out.splitlines() if line.startswith("the fastest split"))
        numbers = [int(n) for n in re.findall(r"(\d+) for (?:the student|the teacher|rollouts)", line)]
        assert sum(numbers) == gpus
        return numbers

    assert split(gpus=2) == [1, 1]
    assert split("--use_vllm", "false", gpus=8, gpu_gib=28)[1] % 2 == 0  # the teacher's weights have 27.5 GiB
    assert "too few" in plan("qwen25_14b_to_1p5b", gpus=2, gpu_gib=24)


def test_a_step_in_which_the_teacher_scores_ahead_of_the_student():
    """Against a loop over the micro-batches."""
    for student, teacher, rollout, count, per_rollout in itertools.product(
        (0.0, 1.0, 5.0), (0.5, 3.0), (0.0, 2.0, 9.0), (1, 2, 7), (1, 4)
    ):
        scored = trained = 0.0
        for _ in range(count):
            scored += teacher / count
            trained = max(trained, scored) + student / count
        parts = {"student": student, "teacher": teacher, "rollout": rollout}
        assert pipelined_step(parts, count, per_rollout, False) == pytest.approx(trained + rollout)
        cycle = (per_rollout - 1) * trained + max(trained, per_rollout * rollout)
        assert pipelined_step(parts, count, per_rollout, True) == pytest.approx(cycle / per_rollout)


def test_what_does_not_fit(plan):
    """On 2 x 24 GiB the teacher must leave; 4 GiB are nothing."""
    flags = ("--use_vllm", "false", "--accelerate_config", "zero2", "--gradient_accumulation_steps", "16")
    out = plan("qwen25_14b_to_1p5b", *flags, gpus=2, gpu_gib=24)
    assert not fits(out)[0] and "largest: teacher" in out and fits(out)[2][1] != "replica"
    out = plan("qwen25_14b_to_1p5b", *flags, gpus=1, gpu_gib=4)
    assert not fits(out)[0] and fits(out)[2] is None and "nothing fits" in out


def test_the_configurations_own_placement_counts(plan):
    own = ("--use_vllm", "false", "--teacher_placement", "null")
    ddp, zero1, zero3 = (
        fits(plan("qwen25_14b_to_1p5b", *own, "--accelerate_config", launch))[1]
        for launch in ("ddp", "zero1", "zero3")
    )
    assert (
        ddp > zero1 + 20 and zero1 > zero3 + 20
    )  # the optimizer of 1.5B, then the teacher, which follows the student


def test_one_process_on_many_gpus(plan):
    """It has the whole step to itself."""
    one, eight = (plan("eopd_qwen3_8b_to_0p6b_base", "--accelerate_config", "single", gpus=gpus) for gpus in (1, 8))
    assert one == eight and "a rollout has 128" in one


def test_a_deepspeed_file(tmp_path):
    for stage, device in ((2, "none"), (3, "cpu")):
        zero = {"stage": stage, "offload_param": {"device": device}}
        (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
        launch = {"deepspeed_config": {"deepspeed_config_file": str(tmp_path / "ds.json")}}
        (tmp_path / "launch.yaml").write_text(yaml.safe_dump(launch))
        assert read_sharding(str(tmp_path / "launch.yaml")) == Sharding(stage, device == "cpu")
    (tmp_path / "ds.json").write_text("{")
    with pytest.raises(ConfigError, match=r"accelerate_config.*launch\.yaml"):
        read_sharding(str(tmp_path / "launch.yaml"))


def test_a_colocated_engine(plan):
    """Its share is there all the time, or not while the student trains; it must hold weights and cache."""
    vllm = ("--use_vllm", "true", "--accelerate_config", "ddp", "--vllm_gpu_memory_utilization")
    assert not fits(plan("qwen25_14b_to_1p5b", *vllm, "0.3"))[0]
    asleep = fits(plan("qwen25_14b_to_1p5b", *vllm, "0.3", "--vllm_enable_sleep_mode", "true"))[1]
    alone = fits(plan("qwen25_14b_to_1p5b", "--use_vllm", "false", "--accelerate_config", "ddp"))[1]
    assert alone < asleep < alone + 0.3 * 80
    out = plan("qwen25_14b_to_1p5b", *vllm, "0.05", "--vllm_enable_sleep_mode", "true")
    assert not fits(out)[0] and "vllm_gpu_memory_utilization" in out
    # a cache for the whole context of Llama 3
    out = plan("eopd_llama31_8b_to_llama32_3b", "--max_length", "null")
    assert not fits(out)[0] and "vllm_gpu_memory_utilization" in out


def test_the_step_is_that_of_the_rollouts_engine(plan):
    def rollout(*flags):
        out = plan("qwen25_14b_to_1p5b", *flags)
        return float(re.search(r"rollout ([\d.]+)", out)[1])

    own, vllm = rollout("--use_vllm", "false"), rollout("--use_vllm", "true")
    assert 7 < own < 12 and vllm < own  # 5.5 ms a token of 28 layers, and what they read
    assert rollout("--use_vllm", "false", "--lmbda", "0") == 0


def test_a_step_whose_rollouts_run_ahead(plan):
    def seconds(*flags):
        out = plan("qwen25_14b_to_1p5b", "--vllm_mode", "server", *flags)
        total, parts = re.search(r"step time: about (\d+) s \(([^);]+)", out).groups()
        return float(total), dict(re.findall(r"(\w+) ([\d.]+)", parts))

    whole, parts = seconds()
    ahead, same = seconds("--rollout_ahead", "1")
    rollout, training = float(parts.pop("rollout")), sum(map(float, parts.values()))
    assert whole == pytest.approx(rollout + training, abs=1) and ahead == pytest.approx(max(rollout, training), abs=1)
    assert same.keys() == {"rollout", *parts} and ahead < whole


def test_precisions(plan):
    def taken(*flags):
        flags = ("--use_vllm", "false", "--accelerate_config", "ddp", "--log_term_gradients", "0", *flags)
        return fits(plan("qwen25_14b_to_1p5b", *flags, gpu_gib=160))[1]

    mixed, pure, full = taken(), taken("--dtype", "bfloat16"), taken("--bf16", "false")
    # weights, two states, gradients and buckets: 20 bytes and autocast's 2 against 10
    assert mixed - pure == pytest.approx(12 * 1.54e9 / 2**30, abs=1.5)
    assert taken("--bf16", "null") == mixed < full + 3.5  # TRL's default
    assert taken("--dtype", "auto") == pure


def test_the_budget_of_a_micro_batch_counts(plan):
    """Not the number of rows, which only the step depends on."""

    def taken(*flags):
        return fits(plan("qwen25_14b_to_1p5b", "--use_vllm", "false", *flags))[1]

    rows = ("--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "2")
    same = ("--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "4")
    small, large = ("--max_tokens_per_micro_batch", "2048"), ("--max_tokens_per_micro_batch", "16384")
    assert taken(*rows, *small) == taken(*same, *small) < taken(*same) < taken(*rows) == taken(*rows, *large)


def test_a_plan_of_other_methods(plan, capsys, tmp_path):
    """The teacher that samples must be whole; the one that isn't loaded takes nothing; none isn't estimated."""
    own = ("--use_vllm", "false", "--accelerate_config", "null", "--gradient_accumulation_steps", "1")
    assert fits(plan("qwen25_14b_to_1p5b", "--method", "minillm", *own))[2][1] == "replica"
    assert "\n teacher  " not in plan(
        "qwen25_14b_to_1p5b_offpolicy", "--method", "seq-kd", "--teacher_placement", "null"
    )
    student = save_config(STUDENT, tmp_path)
    assert (
        main(["plan", "--config", "qwen25_14b_to_1p5b.yaml", "--method", "grpo", "--model_name_or_path", student]) == 2
    )
    assert "grpo" in capsys.readouterr().err


WORK = Workload(
    samples_per_step=1,
    micro_batch_tokens=256,
    micro_batches_per_step=1,
    rollout_size=1,
    steps_per_rollout=1,
    sequence_length=256,
    row_width=256,
    weight_itemsize=4,
    compute_itemsize=2,
    teacher_bytes_per_parameter=2,
    uses_gradient_checkpointing=True,
    uses_eager_attention=False,
    head_gib=1.0,
    needs_teacher_in_rollout=False,
    engine=VllmMemoryConfig(memory_bytes=0.0),
)


def totals(student: ModelSize, work: Workload, launch: str, gpus: int = 8) -> dict[str, float]:
    return estimate_memory(student, None, work, read_sharding(launch), "replica", gpus)


def test_what_shards_less():
    """Every placement takes less than the one before it, for a pair whose teacher is large."""
    student, teacher = compute_model_size(CONFIGS[STUDENT]), compute_model_size(CONFIGS[TEACHER])
    found = [sum(estimate_memory(student, teacher, WORK, read_sharding(p[0]), p[1], 8).values()) for p in PLACEMENTS]
    assert found == sorted(found, reverse=True)


def test_buffers_by_their_definitions():
    """GiB of a student of P = 1.54e9 parameters."""
    student = compute_model_size(CONFIGS[STUDENT])
    size, gib = student.num_parameters, 2**30
    ddp, zero1, zero2, zero3 = (totals(student, WORK, launch) for launch in ("ddp", "zero1", "zero2", "zero3"))
    assert ddp["gradients"] == ddp["buckets"] == pytest.approx(4 * size / gib)
    # DeepSpeed's bucket of 5e8 numbers, and its contents once more
    assert zero1["buckets"] == zero2["buckets"] == zero3["buckets"] == pytest.approx(2 * 1e9 / gib)
    partition = 2 * (size / 8 + 151936 * 1536) / gib
    assert zero1["gradients"] == zero2["gradients"] == pytest.approx(partition)
    zero1, zero2 = (totals(student, replace(WORK, micro_batches_per_step=4), launch) for launch in ("zero1", "zero2"))
    assert zero1["gradients"] == pytest.approx(2 * size / gib) and zero2["gradients"] == pytest.approx(2 * partition)
    assert zero2["optimizer"] == zero3["optimizer"] == pytest.approx(12 * size / 8 / gib)
    assert totals(student, replace(WORK, weight_itemsize=2), "ddp")["optimizer"] == pytest.approx(4 * size / gib)
    alone = totals(student, WORK, "single", gpus=1)
    assert alone["gradients"] == pytest.approx(4 * size / gib) and alone["buckets"] == 0


def test_an_adapters_states_are_small():
    whole, lora = compute_model_size(CONFIGS[STUDENT]), compute_model_size(CONFIGS[STUDENT], lora_r=16)
    found = totals(lora, replace(WORK, weight_itemsize=2), "single", gpus=1)
    assert lora.adapter_parameters < 0.02 * whole.num_parameters
    assert found["student"] == pytest.approx((2 * whole.num_parameters + 4 * lora.adapter_parameters) / 2**30)
    assert found["optimizer"] == pytest.approx(8 * lora.adapter_parameters / 2**30)


def test_an_engine_that_is_shared_holds_a_part_of_the_weights():
    student = compute_model_size(CONFIGS[STUDENT])
    one, two = (
        split_engine_memory(student, VllmMemoryConfig(20 * 2**30, tensor_parallel_size=n, max_model_len=1024), 1024)
        for n in (1, 2)
    )
    assert one.weights == 2 * student.num_parameters == 2 * two.weights
    assert one.kv_cache_per_sequence == two.kv_cache_per_sequence == 1024 * 28 * 2 * 2 * 128 * 2


def test_a_narrow_terminal_leaves_the_command_whole(plan, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    (line,) = (line for line in plan().splitlines() if line.startswith("the fastest placement"))
    assert line.endswith(" --accelerate_config zero1 --num_processes 8 --teacher_placement replica")
    assert main(["plan", "--config", "demo.yaml", "--output_dir", "x", "--gpus", "1", "--gpu_gib", "80"]) == 0
    assert "step time: less than 1 s on A100s\n" in capsys.readouterr().out


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
