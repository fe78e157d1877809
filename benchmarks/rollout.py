"""Completion tokens per second: vLLM and the student itself, through our rollout layer, against what lies below.

    python benchmarks/rollout.py [--batches 1 16 64 256] [--repeats 3] [--no_vllm]
    python benchmarks/rollout.py --sizes demo --precisions float32 --batches 32 --tokens 48 --no_vllm
    python benchmarks/rollout.py --sizes 1.5b --precisions bfloat16 autocast --batches 64 --lengths equal --tokens 256

Qwen2 with random weights, 60M parameters and V 32768, or as Qwen2.5-1.5B, or the demo's student; prompts of 16 tokens.
`equal`: every completion has 128 tokens. `varying`: 20 to 200 (the demo's 6 to 60), log-uniform, as a model that stops
by itself would give. All are told
the same lengths: `generate` by a stopping criterion, the others by limits. Weights are bfloat16, or float32 under
autocast, as in training. Contestants take turns, the figures are medians of the turns. `bare vLLM` is the same engine
asked directly, without seeds and log-probabilities.
"""

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib import resources
from importlib.util import find_spec
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, StoppingCriteria

from tsdkd import TSDKDConfig
from tsdkd.demo.task import VOCABULARY
from tsdkd.rollout.base import SamplingConfig
from tsdkd.rollout.hf import HuggingFaceSampler

PROMPT, LONGEST = 16, 200
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES: dict[str, dict[str, Any]] = {
    "60m": {"vocab_size": 32768, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8},
    "1.5b": {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28},
    "demo": {"vocab_size": len(VOCABULARY)},
    "tiny": {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
}
HEADS = {"60m": (8, 8), "1.5b": (12, 2), "tiny": (2, 1)}  # of queries, of keys


def make_student(size: str, dtype: torch.dtype) -> Any:
    """On the device, with weights as large as those of a trained model, so that the distributions are not uniform."""
    if size == "demo":
        folder = str(resources.files("tsdkd").joinpath("demo/student"))
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(DEVICE)
    config = Qwen2Config(
        **SIZES[size],
        num_attention_heads=HEADS[size][0],
        num_key_value_heads=HEADS[size][1],
        max_position_embeddings=512,
        tie_word_embeddings=size == "1.5b",
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


class AtLength(StoppingCriteria):
    """Ends each row at its own length, as a stop token would."""

    def __init__(self, limits: list[int]) -> None:
        self.limits = torch.tensor(limits, device=DEVICE) + PROMPT

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return input_ids.shape[1] >= self.limits


class Contest:
    """One student, and whoever rolls it out."""

    def __init__(self, folder: str, size: str, precision: str, with_vllm: bool) -> None:
        autocast = precision == "autocast"
        model = make_student(size, torch.bfloat16 if precision == "bfloat16" else torch.float32)
        self.shortest = 6 if size == "demo" else 20
        if with_vllm:  # its engine reads files
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(str(resources.files("tsdkd").joinpath("demo/student"))).save_pretrained(
                folder
            )
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).eval().to(DEVICE)
        self.vocabulary = SIZES[size]["vocab_size"]
        sampling = SamplingConfig(frozenset(), self.vocabulary)
        args = TSDKDConfig(folder, use_cpu=DEVICE == "cpu", bf16=autocast, use_vllm=with_vllm)
        accelerator = Accelerator(cpu=args.use_cpu, mixed_precision="bf16" if autocast else "no")
        self.model = accelerator.prepare_model(model) if autocast else model
        self.ours = HuggingFaceSampler(accelerator, sampling)
        self.vllm = None
        if with_vllm:
            from tsdkd.rollout.vllm.sampler import VLLMSampler

            start = time.perf_counter()
            tokenizer = AutoTokenizer.from_pretrained(folder)
            self.vllm = VLLMSampler(self.model, accelerator, args, sampling, tokenizer, PROMPT + LONGEST)
            print(f"vLLM's start-up: {time.perf_counter() - start:.0f} s")
            times = [seconds(lambda i=i: self.vllm.update(i)) for i in range(3)]  # type: ignore[misc]
            print(f"weight sync: {statistics.median(times):.2f} s")

    def contestants(self, prompts: list[list[int]], limits: list[int]) -> dict[str, Callable[[], object]]:
        """Name -> one rollout."""
        keys = [(0, 0, i) for i in range(len(prompts))]
        found: dict[str, Callable[[], object]] = {
            "student itself, tsdkd": lambda: self.ours.generate(self.model, prompts, limits, keys),
            "student itself, generate": lambda: self.generate(prompts, limits),
        }
        if self.vllm is not None:
            engine = self.vllm
            found["vLLM, tsdkd"] = lambda: engine.generate(self.model, prompts, limits, keys)
            found["bare vLLM"] = lambda: self.bare(prompts, limits)
        return found

    def generate(self, prompts: list[list[int]], limits: list[int]) -> None:
        ids = torch.tensor(prompts, device=DEVICE)
        self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max(limits),
            do_sample=True,
            top_k=0,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=[AtLength(limits)],
        )

    def bare(self, prompts: list[list[int]], limits: list[int]) -> None:
        from vllm import SamplingParams

        params = [SamplingParams(max_tokens=n, ignore_eos=True, detokenize=False) for n in limits]
        self.vllm.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)


def seconds(work: Callable[[], object]) -> float:
    """Wall time, the device's work included."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def table(contest: Contest, batch: int, lengths: str, tokens: int, repeats: int) -> None:
    """Measure and print one batch."""
    rng = random.Random(batch)
    prompts = [[rng.randrange(2, contest.vocabulary) for _ in range(PROMPT)] for _ in range(batch)]
    spread = [round(contest.shortest * 10 ** (rng.random() if batch > 1 else 0.8)) for _ in range(batch)]
    limits = spread if lengths == "varying" else [tokens] * batch
    contestants = contest.contestants(prompts, limits)
    if DEVICE == "cuda":  # a whole turn to warm up would take as long as what is measured
        for work in contest.contestants(prompts, [min(n, 8) for n in limits]).values():
            work()
    warm_up = 0 if DEVICE == "cuda" else 1
    turns = [[seconds(work) for work in contestants.values()] for _ in range(repeats + warm_up)][warm_up:]
    rates = [sum(limits) / statistics.median(column) for column in zip(*turns, strict=True)]
    for name, rate in zip(contestants, rates, strict=True):
        print(f"| {batch} | {lengths} | {name} | {rate:.0f} | {rate / rates[1]:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["60m"])
    parser.add_argument("--precisions", nargs="+", choices=["bfloat16", "float32", "autocast"], default=["bfloat16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--lengths", nargs="+", choices=["equal", "varying"], default=["equal", "varying"])
    parser.add_argument("--tokens", type=int, default=128, help="of a completion, where they are equal")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no_vllm", action="store_true")
    arguments = parser.parse_args()
    machine = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {machine}")
    with_vllm = not arguments.no_vllm and find_spec("vllm") is not None
    contests = [(size, precision) for size in arguments.sizes for precision in arguments.precisions]
    for size, precision in contests:
        with tempfile.TemporaryDirectory() as folder:
            contest = Contest(folder, size, precision, with_vllm)
            if len(contests) > 1:
                print(f"\n### {size}, {precision}")
            print("\n| prompts | lengths | | tokens/s | against `generate` |\n|---|---|---|---|---|")
            for batch in arguments.batches:
                for lengths in arguments.lengths:
                    table(contest, batch, lengths, arguments.tokens, arguments.repeats)
        del contest  # before the next student is made


if __name__ == "__main__":
    main()
