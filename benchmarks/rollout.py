"""Completion tokens per second: vLLM and the student itself, through our rollout layer, against what lies below.

    python benchmarks/rollout.py [--batches 1 16 64 256] [--repeats 3] [--no_vllm]

Qwen2 with random weights, 60M parameters, V 32768, bfloat16; prompts of 16 tokens. `equal`: every completion has 128
tokens. `varying`: 20 to 200, log-uniform, as a model that stops by itself would give. All are told the same lengths:
`generate` by a stopping criterion, the others by limits. Contestants take turns, the figures are medians of the turns.
`bare vLLM` is the same engine asked directly, without seeds and log-probabilities.
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

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, StoppingCriteria

from tsdkd import TSDKDConfig
from tsdkd.rollout import Sampling
from tsdkd.rollout.hf import HuggingFaceSampler

VOCABULARY, PROMPT, LONGEST = 32768, 16, 200


def save_student(folder: str) -> None:
    """Weights as large as those of a trained model, so that the distributions are not uniform."""
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(resources.files("tsdkd").joinpath("demo/student"))).save_pretrained(folder)


class AtLength(StoppingCriteria):
    """Ends each row at its own length, as a stop token would."""

    def __init__(self, limits: list[int]) -> None:
        self.limits = torch.tensor(limits) + PROMPT

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return input_ids.shape[1] >= self.limits


class Contest:
    """One student, and whoever rolls it out."""

    def __init__(self, folder: str, with_vllm: bool) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        sampling = Sampling(frozenset(), VOCABULARY)
        args = TSDKDConfig(folder, use_cpu=not torch.cuda.is_available(), bf16=False, use_vllm=with_vllm)
        accelerator = Accelerator(cpu=args.use_cpu)
        self.ours = HuggingFaceSampler(accelerator, sampling)
        self.vllm = None
        if with_vllm:
            from tsdkd.rollout.vllm import VLLMSampler

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
        ids = torch.tensor(prompts)
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
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--lengths", nargs="+", choices=["equal", "varying"], default=["equal", "varying"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no_vllm", action="store_true")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads")
    with tempfile.TemporaryDirectory() as folder:
        save_student(folder)
        contest = Contest(folder, with_vllm=not arguments.no_vllm and find_spec("vllm") is not None)
        print("\n| prompts | lengths | | tokens/s | against `generate` |\n|---|---|---|---|---|")
        for batch in arguments.batches:
            for lengths in arguments.lengths:
                rng = random.Random(batch)
                prompts = [[rng.randrange(2, VOCABULARY) for _ in range(PROMPT)] for _ in range(batch)]
                spread = [round(20 * 10 ** (rng.random() if batch > 1 else 0.8)) for _ in range(batch)]
                limits = spread if lengths == "varying" else [128] * batch
                contestants = contest.contestants(prompts, limits)
                turns = [[seconds(work) for work in contestants.values()] for _ in range(arguments.repeats + 1)][1:]
                rates = [sum(limits) / statistics.median(column) for column in zip(*turns, strict=True)]
                for name, rate in zip(contestants, rates, strict=True):
                    print(f"| {batch} | {lengths} | {name} | {rate:.0f} | {rate / rates[1]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
