"""The fused head against its peers: one loss and its backward pass, time and extra peak memory, side by side.

    python benchmarks/head.py [--sizes qwen2.5 gemma2 small tiny] [--tokens 512 1024] [--dtypes float32 bfloat16]
        [--without WORD ...]

Inputs are random hidden states and heads of two models, completions of 512 tokens. `TSD-KD` is the complete loss, its
three terms on; the peers compute only a JSD with beta 0.9. The floor is four bare matrix products: both projections
and the two gradients of the student's. Contestants take turns in one process, the time is the median of the turns; on
a GPU one follows the other, and the time is milliseconds between its events. Extra peak memory (gradients included,
inputs not) is measured in a process of its own, on a GPU by its allocator in the same one. `nan`: it failed.
On a GPU with Triton, `fused head in torch` is the fused head without its kernels.
`checkpointed N` is the plain alternative to the fused head (`checkpointed.py`), in chunks of N tokens. Before
anything is measured, the heads' TSD-KD must have the loss and the gradients of whole logits.
"""

import argparse
import gc
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from checkpointed import CheckpointedHead

from tsdkd.lm_head.dense import DenseHead
from tsdkd.lm_head.fused import FusedHead
from tsdkd.lm_head.projection import Projection
from tsdkd.lm_head.statistics import Head
from tsdkd.methods.tsd_kd import TSDKDObjective
from tsdkd.objective import CompletionBatch

SIZES = {  # vocabulary, student's and teacher's hidden size
    "qwen2.5": (151936, 1536, 5120),  # 1.5B and 14B
    "gemma2": (256000, 2304, 3584),  # 2B and 9B
    "small": (32768, 512, 1024),
    "tiny": (2048, 64, 96),  # shows that it runs
}
COMPLETION = 512
BETA = 0.9
CHUNKS = (64, 256)  # tokens, of the checkpointed head
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Contest:
    """The inputs of one size (a name, or e.g. 32768x128x256), and each contestant as a function of nothing."""

    def __init__(self, size: str, tokens: int, dtype: str, top_k: int = 10) -> None:
        vocabulary, hidden, teacher_hidden = SIZES.get(size) or map(int, size.split("x"))
        self.top_k = top_k
        make = torch.Generator(DEVICE).manual_seed(0)

        def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
            empty = torch.empty(*shape, dtype=getattr(torch, dtype), device=DEVICE)
            return empty.normal_(std=std, generator=make)

        self.hidden, self.teacher_hidden = normal(tokens, hidden), normal(tokens, teacher_hidden)
        self.weight, self.teacher_weight = (normal(vocabulary, h, std=1.5 * h**-0.5) for h in (hidden, teacher_hidden))
        self.hidden.requires_grad_()
        self.weight.requires_grad_()
        mask = torch.ones(max(1, tokens // COMPLETION), min(tokens, COMPLETION), dtype=torch.bool, device=DEVICE)
        self.completions = CompletionBatch(mask, torch.zeros(mask.numel(), dtype=torch.long, device=DEVICE))

    def contestants(self) -> dict[str, Callable[[], None]]:
        """Name -> one loss with its backward pass."""
        found = {
            "TSD-KD, fused head": self.fused,  # in Triton where that is
            **({"TSD-KD, fused head in torch": partial(self.fused, "torch")} if DEVICE == "cuda" else {}),
            **{f"TSD-KD, checkpointed {c}": partial(self.checkpointed, c) for c in CHUNKS},
            "TSD-KD, whole logits": self.whole,
            "JSD, TRL's chunked": self.trl_chunked,  # in Triton where that is
            "JSD, TRL's GKDTrainer": self.trl_gkd,
            "four matrix products": self.floor,
        }
        if importlib.util.find_spec("liger_kernel"):
            found["JSD, Liger's fused"] = self.liger
        return found

    def fused(self, backend: Literal["torch"] | None = None) -> None:
        heads = Projection(self.weight), Projection(self.teacher_weight)
        self.tsd_kd(FusedHead(self.hidden, heads[0], self.teacher_hidden, heads[1], backend=backend))

    def checkpointed(self, chunk: int) -> None:
        heads = [lambda h, weight=w: h @ weight.t() for w in (self.weight, self.teacher_weight)]
        head = CheckpointedHead(self.hidden, heads[0], self.teacher_hidden, heads[1], chunk)
        self.tsd_kd(head)

    def tsd_kd(self, head: Head) -> None:
        """The complete loss and its backward pass."""
        self.loss = TSDKDObjective(indirect_top_k=self.top_k)(head, self.completions).loss
        self.loss.backward()

    def logits(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.hidden @ self.weight.t(), self.teacher_hidden @ self.teacher_weight.t()

    def whole(self) -> None:
        self.tsd_kd(DenseHead(*self.logits()))

    def trl_chunked(self) -> None:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        divergence, _ = ChunkedDivergenceFunction.apply(
            self.hidden, self.weight, None, self.teacher_hidden, self.teacher_weight, None, BETA
        )
        divergence.mean().backward()

    def trl_gkd(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from trl.experimental.gkd import GKDTrainer
        student, teacher = self.logits()
        GKDTrainer.generalized_jsd_loss(student.unsqueeze(0), teacher.unsqueeze(0), beta=BETA).backward()

    def liger(self) -> None:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA, compiled=False)
        labels = torch.zeros(len(self.hidden), dtype=torch.long, device=DEVICE)
        loss(self.hidden, self.weight, self.teacher_hidden, self.teacher_weight, labels).backward()

    @torch.no_grad()
    def floor(self) -> None:
        gradient, _ = self.logits()
        self.hidden.grad, self.weight.grad = gradient @ self.weight, gradient.t() @ self.hidden

    def forget(self) -> None:
        """Drop the gradients."""
        self.hidden.grad = self.weight.grad = None
        gc.collect()


def check_same() -> None:
    """Raises `AssertionError` where a head's TSD-KD isn't that of whole logits (float64, a short last chunk)."""
    found = {}
    contest = Contest("tiny", 300, "float64")
    for name, work in contest.contestants().items():
        if name.startswith("TSD-KD"):
            work()
            found[name] = contest.loss.detach(), contest.hidden.grad, contest.weight.grad
            contest.forget()
    for name, values in found.items():
        torch.testing.assert_close(
            values, found["TSD-KD, whole logits"], rtol=1e-9, atol=1e-12, msg=partial("{}: {}".format, name)
        )


def seconds(work: Callable[[], None]) -> float:
    """Wall time; on a GPU between two of its events."""
    if DEVICE == "cpu":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    work()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000


def times(contestants: dict[str, Callable[[], None]], forget: Callable[[], None], repeats: int) -> dict[str, float]:
    """The median seconds of each contestant, after one turn that isn't counted; nan of one that can't."""
    turns = [(name, turn) for turn in range(repeats + 1) for name in contestants]
    if DEVICE == "cuda":  # its speed doesn't drift, and what the one's memory leaves free isn't the other's
        turns = [(name, turn) for name in contestants for turn in range(repeats + 1)]
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for name, turn in turns:
        if math.isnan(sum(taken[name])):
            continue
        if DEVICE == "cuda" and turn == 0:
            torch.cuda.empty_cache()
        try:
            taken[name].append(seconds(contestants[name]))
        except Exception as error:  # the others go on: out of memory, or a peer's kernel that isn't for this GPU
            print(f"{name}, turn {turn}: {type(error).__name__}: {error}", file=sys.stderr)
            taken[name].append(math.nan)
        forget()
    return {name: statistics.median(values[1:] or values) for name, values in taken.items()}


def resident_peak() -> float:
    """This process's peak resident memory, GiB."""
    (line,) = (text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def extra_gib(contest: Contest, name: str) -> float:
    """Peak memory of one turn above what the inputs take."""
    work = contest.contestants()[name]
    if DEVICE == "cpu":
        Contest("tiny", 1, "float32").contestants()[name]()  # what it imports isn't counted
    if DEVICE == "cuda":  # where it has run before
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        contest.forget()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
    before = resident_peak()
    work()
    return resident_peak() - before


def alone(*arguments: str) -> float:
    """`extra_gib` in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", *arguments]
    # glibc would keep freed tensors of up to 32 MiB, and small chunks would look larger than they are
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout))


def table(size: str, tokens: int, dtype: str, repeats: int, without: list[str]) -> None:
    """Measure and print one size; without contestants whose names have one of these words."""
    print(f"\n### {size}: V {SIZES[size][0]}, H {SIZES[size][1]}/{SIZES[size][2]}, {tokens} tokens, {dtype}\n")
    unit, factor = ("ms", 1000) if DEVICE == "cuda" else ("seconds", 1)
    print(f"| | {unit} | ours / its | GiB | ours / its | over the floor |\n|---|---|---|---|---|---|")
    contest = Contest(size, tokens, dtype)
    contestants = {n: work for n, work in contest.contestants().items() if not any(word in n for word in without)}
    taken = times(contestants, contest.forget, repeats)
    if DEVICE == "cuda":
        memory = {name: math.nan if math.isnan(taken[name]) else extra_gib(contest, name) for name in taken}
    del contest, contestants
    if DEVICE == "cpu":
        memory = {name: alone(size, str(tokens), dtype, name) for name in taken}
    ours = next(iter(taken))
    floor = taken["four matrix products"]
    for name, value in taken.items():
        ratios = f"{taken[ours] / value:.2f} | {memory[name]:.2f} | {memory[ours] / memory[name]:.2f}"
        print(f"| {name} | {factor * value:.2f} | {ratios} | {value / floor:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=[s for s in SIZES if s != "tiny"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 1024])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--without", nargs="+", default=[], help="words in the names of contestants to leave out")
    parser.add_argument("--memory-of", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        size, tokens, dtype, name, *top_k = arguments.memory_of
        print(json.dumps(extra_gib(Contest(size, int(tokens), dtype, *map(int, top_k)), name)))
        return
    check_same()
    machine = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {machine}")
    for size in arguments.sizes:
        for dtype in arguments.dtypes:
            for tokens in arguments.tokens:
                table(size, tokens, dtype, arguments.repeats, arguments.without)


if __name__ == "__main__":
    main()
