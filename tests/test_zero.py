"""DeepSpeed ZeRO over two processes: sharded parameters, the head's weight among them, take the same step."""

import json
from pathlib import Path

import pytest

from conftest import flags, launch, weights
from tsdkd.cli import main

pytest.importorskip("deepspeed")

RUN = {"use_cpu": "true", "bf16": "false", "disable_tqdm": "true", "max_length": 64, "max_new_tokens": 12, "seed": 7}
RUN |= {"optim": "sgd", "max_grad_norm": 0, "lr_scheduler_type": "constant", "learning_rate": 0.1, "warmup_steps": 0}
RUN |= {"gradient_checkpointing": "true", "max_steps": 2, "save_strategy": "no", "report_to": "none"}


def launch_zero(command: list[str], stage: int, folder: Path) -> None:
    folder.mkdir()
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    sizes = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")
    deepspeed = {"zero_optimization": zero, "zero_allow_untested_optimizer": True, **dict.fromkeys(sizes, "auto")}
    (folder / "deepspeed.json").write_text(json.dumps(deepspeed))
    accelerate = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {
            "deepspeed_config_file": str(folder / "deepspeed.json"),
            "deepspeed_multinode_launcher": "standard",
            "zero3_init_flag": stage == 3,
        },
        "num_machines": 1,
        "num_processes": 2,
        "machine_rank": 0,
        "main_process_port": 0,
    }
    (folder / "accelerate.json").write_text(json.dumps(accelerate))
    launch(["--config_file", str(folder / "accelerate.json")], command)


@pytest.mark.parametrize(
    "method, family, stage", [("tsd-kd", "gemma2", 3), ("eopd", "llama", 3), ("tsd-kd", "llama", 2)]
)
def test_a_sharded_step_is_the_plain_one(method, family, stage, saved_model, rows_file, tmp_path):
    """Gemma 2's head is tied and soft-capped, Llama's is a weight of its own."""
    names = {
        "model_name_or_path": saved_model(family, 0),
        "teacher_model_name_or_path": saved_model("qwen3", 1, rows=70, hidden=48),
        "dataset_name": rows_file,
        "method": method,
    }
    extra = {"rollout_batch_size": 8} if method == "eopd" else {}

    def command(folder: str, batch: int) -> list[str]:
        values = {**names, **RUN, **extra, "output_dir": tmp_path / folder, "per_device_train_batch_size": batch}
        return ["train", *flags(**values)]

    assert main(command("plain", 4)) == 0
    launch_zero(command("sharded", 2), stage, tmp_path / "launch")
    before, plain, sharded = (weights(f) for f in (saved_model(family, 0), tmp_path / "plain", tmp_path / "sharded"))
    assert (sharded - plain).norm() <= 1e-4 * (plain - before).norm()
