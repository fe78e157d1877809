"""Completion tokens per second of our rollout against transformers' `generate`, on the embedded demo student.

    python benchmarks/rollout.py [--repeats 5]

128 prompts at temperature 1, at most 64 tokens, float32, one thread. The two take turns; the ratio is the median of
the turns, above 1 is faster than `generate`.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from importlib import resources

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tsdkd.rollout import prompt_generator
from tsdkd.rollout.hf import sample

DEMO = resources.files("tsdkd").joinpath("demo")


def tokens_per_second(work: Callable[[], int]) -> float:
    start = time.perf_counter()
    return work() / (time.perf_counter() - start)


def rollout_ratio(repeats: int) -> float:
    """Our tokens per second over `generate`'s."""
    folder = str(DEMO.joinpath("student"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = load_dataset("json", data_files=str(DEMO.joinpath("train.jsonl")), split="train").select(range(128))
    chats = [[{"role": "user", "content": p}] for p in rows["prompt"]]
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

    return statistics.median([tokens_per_second(ours) / tokens_per_second(theirs) for _ in range(repeats + 1)][1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"rollout, tokens/s against model.generate: {rollout_ratio(arguments.repeats):.2f} x")


if __name__ == "__main__":
    main()
