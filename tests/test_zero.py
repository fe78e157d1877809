"""DeepSpeed ZeRO over two processes: sharded parameters, the head's weight among them, take the same step."""

import pytest

from conftest import flags, launch, weights, zero_launcher
from tsdkd.cli import main

pytest.importorskip("deepspeed")

RUN = {"use_cpu": "true", "bf16": "false", "disable_tqdm": "true", "max_length": 64, "max_new_tokens": 12, "seed": 7}
RUN |= {"optim": "sgd", "max_grad_norm": 0, "lr_scheduler_type": "constant", "learning_rate": 0.1, "warmup_steps": 0}
RUN |= {"gradient_checkpointing": "true", "max_steps": 2, "save_strategy": "no", "report_to": "none"}


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
    launch(zero_launcher(stage, tmp_path), command("sharded", 2))
    before, plain, sharded = (weights(f) for f in (saved_model(family, 0), tmp_path / "plain", tmp_path / "sharded"))
    assert (sharded - plain).norm() <= 1e-4 * (plain - before).norm()
