"""Two TSD-KD steps on a colocated vLLM engine, without and with sleep mode; a run checks each of its weight syncs.

A random pair of Qwen2 with heads of 128, in bfloat16 on disk and float32 in training, as in the presets. The learning
rate is so large that an engine with old weights stops the run. On a CPU there is no sleep mode.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

CUDA = torch.cuda.is_available()
STEPS = 2
COLUMNS = (
    "sampling/sampling_logp_difference/mean",
    "sampling/sampling_logp_difference/max",
    "speed/weight_sync_seconds",
    "speed/rollout_tokens_per_second",
)


def train(folder: Path, sleep: bool) -> None:
    """The steps, and a row for each.

    Raises:
        EngineError: the engine can't start, or its weights aren't the student's.
        RuntimeError: a step rolled out nothing or synced no weights.
    """
    from datasets import Dataset

    from conftest import QUIET, build_model, build_tokenizer, make_rows
    from tsdkd import TSDKDConfig, TSDKDTrainer

    start = time.monotonic()
    for seed, name in enumerate(("student", "teacher")):
        build_model("qwen2", seed, hidden=256, head_dim=128).to(torch.bfloat16).save_pretrained(folder / name)
        build_tokenizer().save_pretrained(folder / name)
    values = {**QUIET, "use_cpu": not CUDA, "bf16": True, "model_init_kwargs": {"dtype": "float32"}}
    values |= {"use_vllm": True, "vllm_check_every": 1, "vllm_enable_sleep_mode": sleep}
    values |= {"max_steps": STEPS, "logging_steps": 1, "per_device_train_batch_size": 16}
    values |= {"max_length": 64, "max_completion_length": 32}
    values |= {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    trainer = TSDKDTrainer(
        str(folder / "student"),
        str(folder / "teacher"),
        TSDKDConfig(str(folder / "run"), **values),
        train_dataset=Dataset.from_list(make_rows(16 * STEPS)),
        processing_class=build_tokenizer(),
        teacher_processing_class=build_tokenizer(),
    )
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if all(name in entry for name in COLUMNS)]
    if len(steps) != STEPS:
        raise RuntimeError(f"{len(steps)} of {STEPS} steps synced weights and rolled out")
    for entry in steps:
        cells = " | ".join(f"{entry[name]:.3g}" for name in COLUMNS)
        took = time.monotonic() - start
        print(f"| {'yes' if sleep else 'no'} | {entry['step']} | {cells} | {took:.0f} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sleep", choices=("no", "yes"), help=argparse.SUPPRESS)  # a run, in a process of its own
    arguments = parser.parse_args()
    if arguments.sleep:
        with tempfile.TemporaryDirectory() as folder:
            train(Path(folder), arguments.sleep == "yes")
        return 0
    if not CUDA:
        os.environ.setdefault("VLLM_CPU_CI_ENV", "1")  # no warm-up
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    print("| sleep mode | step | apart, nats a token | at most | sync, s | tokens/s | s in all |")
    print(f"|{'---|' * 7}", flush=True)
    modes = ("no", "yes") if CUDA else ("no",)
    codes = [subprocess.run([sys.executable, __file__, "--sleep", mode]).returncode for mode in modes]
    return 1 if any(codes) else 0


if __name__ == "__main__":
    sys.exit(main())
