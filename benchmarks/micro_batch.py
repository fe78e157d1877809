"""One micro-batch of a random pair: where its time goes, and its peak memory against `tsdkd plan`'s estimate.

    python benchmarks/micro_batch.py [--pair qwen2.5] [--batch 4] [--tokens 1024] [--steps 3]

TSD-KD as the presets train it: float32 weights under bfloat16 autocast, AdamW, gradient checkpointing, a bfloat16
teacher; completions are given, so that nothing is rolled out. The weights are made on the device and never written.
The first step isn't counted. `head` is as in step.py. Memory is what the allocator of a GPU had at most given out and
reserved; on a CPU the peak of resident memory over what the process had before the models.
"""

import argparse
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from plan import resident
from step import DEVICE, STUDENT, Clock
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, Qwen2Config

from tsdkd import TSDKDConfig, TSDKDTrainer
from tsdkd.launch.memory import Sharding, estimate_memory
from tsdkd.launch.model_size import compute_model_size
from tsdkd.launch.workload import build_workload

# vocabulary, hidden and intermediate size, layers, heads of queries and of keys, tied: of the student, of the teacher
PAIRS = {
    "qwen2.5": ((151936, 1536, 8960, 28, 12, 2, True), (152064, 5120, 13824, 48, 40, 8, False)),  # 1.5B and 14B
    "tiny": ((2048, 64, 128, 2, 2, 1, True), (2080, 96, 192, 3, 2, 1, False)),  # shows that it runs
}
PARTS = ("teacher", "student", "head", "optimizer")


def config_of(vocabulary: int, hidden: int, inner: int, layers: int, queries: int, keys: int, tied: bool) -> Any:
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=queries,
        num_key_value_heads=keys,
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )


def make(config: PretrainedConfig, dtype: torch.dtype) -> Any:
    """A random model, on the device."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def estimated(args: TSDKDConfig, student: PretrainedConfig, teacher: PretrainedConfig) -> dict[str, float]:
    """GiB, by what takes it."""
    given = {"dtype": "float32", "attn_implementation": None, "teacher_model_init_kwargs": {"dtype": "bfloat16"}}
    workload = build_workload(TSDKDConfig, {**vars(args), **given}, [student, teacher], gpus=1, gpu_gib=80.0)
    return estimate_memory(
        compute_model_size(student), compute_model_size(teacher), workload, Sharding(zero_stage=0), "replica", gpus=1
    )


def rows(tokens: int, count: int) -> Dataset:
    """Completions of at least so many tokens, in the words of the demo; they are cut where a sequence is full."""
    rng = random.Random(0)
    words = ["0,0", "1,2", "27,7", "x+5", "y-2", "x~3", "y~4", "x#0", "y#1", "->"]
    made = [
        {"prompt": "27,7 x+5 y~3 -> y+3", "completion": " ".join(rng.choices(words, k=tokens))} for _ in range(count)
    ]
    return Dataset.from_list(made)


def peaks(before: float) -> dict[str, float]:
    """GiB, each measure of what was taken."""
    if DEVICE == "cpu":
        return {"resident": resident("VmHWM") - before}
    found = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    return {name: size / 2**30 for name, size in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=PAIRS, default="qwen2.5")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024, help="of prompt and completion")
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    machine = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {machine}", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    tokenizer.eos_token = None
    configs = [config_of(*shape) for shape in PAIRS[arguments.pair]]
    with tempfile.TemporaryDirectory() as folder:
        args = TSDKDConfig(
            folder,
            use_cpu=DEVICE == "cpu",
            bf16=True,
            gradient_checkpointing=True,
            per_device_train_batch_size=arguments.batch,
            max_length=arguments.tokens,
            max_new_tokens=arguments.tokens,
            lmbda=0.0,
            max_steps=arguments.steps + 1,
            logging_steps=1,
            log_term_gradients=0,
            head_chunk_gib=1.0,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
        )
        parts = estimated(args, *configs)
        print("\n| tsdkd plan, GiB | " + " | ".join(parts) + f" | in all |\n|{'---|' * (2 + len(parts))}")
        print(
            "| | " + "".join(f"{size:.2f} | " for size in parts.values()) + f"{sum(parts.values()):.2f} |", flush=True
        )
        before = resident("VmRSS")
        if DEVICE == "cpu":
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
        clock = Clock()
        trainer = TSDKDTrainer(
            make(configs[0], torch.float32),
            make(configs[1], torch.bfloat16),
            args,
            train_dataset=rows(arguments.tokens, arguments.batch * (arguments.steps + 1)),
            processing_class=tokenizer,
            teacher_processing_class=tokenizer,
            callbacks=[clock],
        )
        clock.watch(trainer.model, trainer.teacher_model, trainer.accelerator)
        trainer.train()
    print("\n| GiB | measured | estimate / measured |\n|---|---|---|")
    for name, size in peaks(before).items():
        print(f"| {name} | {size:.2f} | {sum(parts.values()) / size:.2f} |")
    result = clock.result()
    print(f"\n| ms a step of {arguments.batch} x {arguments.tokens} tokens | {' | '.join(PARTS)} |\n|{'---|' * 5}")
    print(f"| {1000 * result['step']:.1f} |" + "".join(f" {1000 * result[part]:.1f} |" for part in PARTS), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
