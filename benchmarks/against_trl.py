"""Speed as a ratio against TRL and transformers, measured in one run on the embedded demo pair.

    python benchmarks/against_trl.py [--repeats 5] [--steps 10]

Two ratios, the median of alternating repeats: completion tokens per second of our rollout against `model.generate`;
seconds per on-policy step of TSD-KD and of plain GKD (its three terms off) against TRL's `GKDTrainer`, same batch,
float32, one thread. Above 1 is faster than the peer.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib import resources
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from tsdkd import TSDKDConfig, TSDKDTrainer
from tsdkd.rollout import prompt_generator
from tsdkd.rollout.hf import sample

DEMO = resources.files("tsdkd").joinpath("demo")
STUDENT, TEACHER = str(DEMO.joinpath("student")), str(DEMO.joinpath("teacher"))
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 32,
    "max_length": 128,
    "max_new_tokens": 64,
    "lmbda": 1.0,
    "temperature": 1.0,
    "beta": 0.9,
    "learning_rate": 1e-6,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "report_to": "none",
    "save_strategy": "no",
    "logging_strategy": "no",
}


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Wall time and result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def rollout_ratio(rows: Dataset, repeats: int) -> float:
    """Our tokens per second over `generate`'s, 128 prompts at temperature 1."""
    model = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    chats = [[{"role": "user", "content": p}] for p in rows["prompt"][:128]]
    prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")

    def ours() -> int:
        generators = [prompt_generator(0, 0, i) for i in range(len(prompts))]
        limits = [64] * len(prompts)
        done = sample(model, prompts, limits, generators, stop_ids={tokenizer.eos_token_id}, vocab_size=64)
        return sum(len(c.ids) for c in done)

    def theirs() -> int:
        output = model.generate(**batch, max_new_tokens=64, do_sample=True, top_k=0)
        return int((output[:, batch["input_ids"].shape[1] :] != tokenizer.pad_token_id).sum())

    ratios = []
    for _ in range(repeats + 1):
        (our_time, our_tokens), (their_time, their_tokens) = seconds(ours), seconds(theirs)
        ratios.append((our_tokens / our_time) / (their_tokens / their_time))
    return statistics.median(ratios[1:])


def step_seconds(trainer_class: Any, args: Any, rows: Dataset, **kwargs: Any) -> float:
    """Seconds per optimizer step, without construction."""
    student, teacher = (AutoModelForCausalLM.from_pretrained(n, dtype=torch.float32) for n in (STUDENT, TEACHER))
    trainer = trainer_class(model=student, teacher_model=teacher, args=args, train_dataset=rows, **kwargs)
    return seconds(trainer.train)[0] / args.max_steps


def step_ratios(rows: Dataset, repeats: int, steps: int) -> dict[str, float]:
    """TRL's seconds per step over ours."""
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    chats = rows.map(
        lambda r: {
            "messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]
        },
        remove_columns=rows.column_names,
    )
    plain = {"alpha": 0.0, "gate": False, "entropy_weight": 0.0}
    ratios: dict[str, list[float]] = {"TSD-KD": [], "plain GKD": []}
    with tempfile.TemporaryDirectory() as folder:
        common = {**COMMON, "output_dir": folder, "max_steps": steps}
        for _ in range(repeats):
            peer = step_seconds(GKDTrainer, GKDConfig(**common), chats, processing_class=tokenizer)
            for name, options in (("TSD-KD", {}), ("plain GKD", plain)):
                config = TSDKDConfig(**common, **options, log_term_gradients=0)
                ratios[name].append(peer / step_seconds(TSDKDTrainer, config, rows))
    return {name: statistics.median(values) for name, values in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = load_dataset("json", data_files=str(DEMO.joinpath("train.jsonl")), split="train").select(range(512))
    rollout = rollout_ratio(rows, arguments.repeats)
    steps = step_ratios(rows, arguments.repeats, arguments.steps)
    print(f"rollout, tokens/s against model.generate: {rollout:.2f} x")
    for name, ratio in steps.items():
        print(f"{name} step against TRL's GKDTrainer: {ratio:.2f} x")


if __name__ == "__main__":
    main()
