"""How fast student, teacher and rollouts are on 8 to 256 GPUs, in each layout of docs/cluster.md: a simulation.

    python benchmarks/pipeline.py [--pairs NAME ...] [--gpus 8 16 ...] [--plot docs/pictures/pipeline.svg]

Nothing is measured here: sizes and speeds are those of `tsdkd plan`. The simulation adds what the plan leaves out:
completions of different lengths, the processes' waiting for each other, and the network. For each layout and number of
GPUs, the eight splits that the plan's formula finds best are simulated, and the fastest is shown.

Assumed: A100s of 80 GiB, eight to a node, as `tsdkd plan` assumes them; 25 GB/s of network per node (200 Gbit/s), and
200 GB/s between the GPUs of a node; steps of 512 completions whatever the number of GPUs; lengths with a lognormal
distribution (median 0.4 of the limit, sigma 0.6), cut at the limit.
"""

import argparse
import heapq
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice, zip_longest
from typing import Any

from transformers import Qwen2Config, Qwen3Config, Qwen3MoeConfig

from tsdkd.launch.memory import Sharding, estimate_memory
from tsdkd.launch.model_size import ModelSize, compute_model_size
from tsdkd.launch.split import divide_workload, estimate_parts, pipelined_step
from tsdkd.launch.step_time import decode_seconds, estimate_step_seconds
from tsdkd.launch.workload import GIB, VllmMemoryConfig, Workload

GPU_GIB, USABLE = 80, 0.9
GPUS_PER_NODE, NETWORK, NVLINK = 8, 25e9, 200e9  # bytes per second, of a node and of a GPU
COMPLETIONS, PROMPT_TOKENS = 512, 256
MICRO_BATCH_TOKENS = 16384
STEPS, CANDIDATES = 10, 8  # simulated

COMMON = {"vocab_size": 151936, "head_dim": 128, "tie_word_embeddings": False}
TIED = {**COMMON, "tie_word_embeddings": True}


def sizes(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return dict(zip(names, (hidden, intermediate, layers, heads, kv_heads), strict=True))


EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1536}
PAIRS = {  # student, teacher, limit of a completion
    "1.5B / 14B": (
        Qwen2Config(**sizes(1536, 8960, 28, 12, 2), **TIED),
        Qwen2Config(**sizes(5120, 13824, 48, 40, 8), **COMMON),
        1024,
    ),
    "4B / 32B": (
        Qwen3Config(**sizes(2560, 9728, 36, 32, 8), **TIED),
        Qwen3Config(**sizes(5120, 25600, 64, 64, 8), **COMMON),
        4096,
    ),
    "8B / 235B-A22B": (
        Qwen3Config(**sizes(4096, 12288, 36, 32, 8), **COMMON),
        Qwen3MoeConfig(**sizes(4096, 12288, 94, 64, 4), **EXPERTS, **COMMON),
        4096,
    ),
}
LAYOUTS = ("all in one", "teacher apart", "everything apart", "everything apart, rollout_ahead")


@dataclass(frozen=True)
class Split:
    """GPUs of the student, of the teacher and of the rollouts; 0: with the student."""

    student: int
    teacher: int
    rollout: int
    ahead: bool

    def __str__(self) -> str:
        return f"{self.student}+{self.teacher}+{self.rollout}"


class Pair:
    """Sizes and speeds of a student and its teacher."""

    def __init__(self, name: str) -> None:
        student, teacher, self.limit = PAIRS[name]
        self.student, self.teacher = compute_model_size(student), compute_model_size(teacher)
        self.gpus_per_teacher = self.gpus_for(self.teacher)
        self.gpus_per_engine = self.gpus_for(self.student)
        token = replace(self.workload(1), samples_per_step=1, sequence_length=1)
        seconds = estimate_step_seconds(self.student, self.teacher, token)
        self.student_token, self.teacher_token = seconds["student"] + seconds["head"], seconds["teacher"]

    def gpus_for(self, model: ModelSize) -> int:
        """The GPUs that hold a model in bfloat16: a power of two, for tensor parallelism."""
        return 2 ** math.ceil(math.log2(max(1.0, 2 * model.num_parameters / (USABLE * GPU_GIB * GIB))))

    def workload(self, gpus: int, colocated: bool = False) -> Workload:
        """What each of `gpus` GPUs does, if all of them train."""
        length = self.limit + PROMPT_TOKENS
        samples = COMPLETIONS // gpus
        memory = 0.3 * GPU_GIB * GIB if colocated else 0.0
        engine = VllmMemoryConfig(memory_bytes=memory, max_model_len=length, max_num_seqs=COMPLETIONS)
        return Workload(
            samples_per_step=samples,
            micro_batch_tokens=MICRO_BATCH_TOKENS,
            micro_batches_per_step=math.ceil(samples * length / MICRO_BATCH_TOKENS),
            rollout_size=samples,
            steps_per_rollout=1,
            sequence_length=length,
            row_width=length,
            weight_itemsize=4,
            compute_itemsize=2,
            teacher_bytes_per_parameter=2,
            uses_gradient_checkpointing=True,
            uses_eager_attention=False,
            head_gib=1.0,
            needs_teacher_in_rollout=False,
            engine=engine,
        )

    def fits(self, gpus: int, students: int, placement: str, colocated: bool) -> bool:
        """Whether the student's GPUs have enough memory, with ZeRO-2."""
        workload = divide_workload(self.workload(gpus, colocated), gpus, students)
        parts = estimate_memory(self.student, self.teacher, workload, Sharding(2), placement, students)
        return sum(parts.values()) <= USABLE * (0.95 * GPU_GIB - 2)

    def lengths(self, step: int) -> list[int]:
        """Completion lengths of a step."""
        rng = random.Random(step)
        draws = (self.limit * 0.4 * rng.lognormvariate(0.0, 0.6) for _ in range(COMPLETIONS))
        return [max(1, min(self.limit, round(draw))) for draw in draws]


# What takes time --------------------------------------------------------------------------------------------------


def sampling_seconds(pair: Pair, lengths: list[int], engines: int, gpus_per_engine: int, memory: float) -> float:
    """Until the last of the engines has sampled its completions, each with as many at a time as its cache holds."""
    workload = pair.workload(1)
    kv_bytes = 2 * pair.student.num_hidden_layers * pair.student.kv_cache_numbers * workload.sequence_length
    slots = max(1, int((memory * gpus_per_engine - 2 * pair.student.num_parameters) // kv_bytes))
    slowest = 0.0
    for own in (lengths[i::engines] for i in range(engines)):
        waiting, active, now, done = sorted(own), [], 0.0, 0  # ends of the active ones, in decoded tokens
        while waiting or active:
            while waiting and len(active) < slots:
                heapq.heappush(active, done + waiting.pop())
            end = heapq.heappop(active)
            context = PROMPT_TOKENS + pair.limit / 4
            token = decode_seconds(pair.student, workload, len(active) + 1, context) / gpus_per_engine
            now, done = now + token * (end - done), end
        slowest = max(slowest, now)
    return slowest


def deal(lengths: list[int], students: int) -> list[list[list[int]]]:
    """The micro-batches of each process: sequences dealt by length, as `MicroBatchPlanner.exchange` does."""
    ordered = sorted((PROMPT_TOKENS + n for n in lengths), reverse=True)
    rounds = [ordered[i : i + students] for i in range(0, len(ordered), students)]
    rounds = [part if i % 2 == 0 else part[::-1] for i, part in enumerate(rounds)]
    shares = [[part[rank] for part in rounds if rank < len(part)] for rank in range(students)]
    return [list(micro_batches(share)) for share in shares]


def micro_batches(sequences: list[int]) -> Iterator[list[int]]:
    """Sequences of at most `MICRO_BATCH_TOKENS` tokens together."""
    batch: list[int] = []
    for tokens in sequences:
        if batch and sum(batch) + tokens > MICRO_BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(tokens)
    if batch:
        yield batch


def scored_at(pair: Pair, shares: list[list[list[int]]], start: float, teachers: int) -> list[list[float]]:
    """When the hidden states of each micro-batch have arrived, from servers that take one sequence after another."""
    per_server = pair.gpus_per_teacher
    servers = [(start, number) for number in range(teachers // per_server)]
    link_free = [start] * max(1, teachers // GPUS_PER_NODE)
    arrived: list[list[float]] = [[] for _ in shares]
    for column in zip_longest(*shares):  # the first micro-batches of all processes, then the second ones
        for rank, batch in enumerate(column):
            if batch is None:
                continue
            last = start
            for tokens in batch:
                free, number = heapq.heappop(servers)
                done = free + tokens * pair.teacher_token / per_server
                heapq.heappush(servers, (done, number))
                node = number * per_server // GPUS_PER_NODE % len(link_free)
                sent = tokens * pair.teacher.hidden_size * 2 / NETWORK
                link_free[node] = max(done, link_free[node]) + sent
                last = max(last, link_free[node])
            arrived[rank].append(last)
    return arrived


def training_end(pair: Pair, lengths: list[int], split: Split, start: float) -> float:
    """When the optimizer step has been taken."""
    shares, nodes = deal(lengths, split.student), math.ceil(split.student / GPUS_PER_NODE)
    link, token, gather = NETWORK if nodes > 1 else NVLINK, pair.student_token, 0.0
    if split.teacher:
        ready = scored_at(pair, shares, start, split.teacher)
    else:
        token += pair.teacher_token
        ready = [[start] * len(share) for share in shares]
        if not pair.fits(split.student, split.student, "replica", colocated=True):  # sharded, gathered each time
            gather = 2 * pair.teacher.num_parameters / link
    ends = []
    for share, arrivals in zip(shares, ready, strict=True):
        now = start
        for batch, arrival in zip(share, arrivals, strict=True):
            now = max(now, arrival) + sum(batch) * token + gather
        ends.append(now)
    gradients = 2 * 2 * pair.student.num_parameters
    return max(ends) + (gradients / link if split.student > 1 else 0.0)


def simulate(pair: Pair, split: Split) -> dict[str, float]:
    """Seconds per step, and bytes per step over the network, after the first steps."""
    engines = (split.rollout or split.student) // pair.gpus_per_engine or 1
    memory = (USABLE if split.rollout else 0.3) * GPU_GIB * GIB
    copy = 2 * pair.student.num_parameters / NETWORK if split.rollout else 0.0

    def sample(step: int) -> float:
        return sampling_seconds(pair, pair.lengths(step), engines, pair.gpus_per_engine, memory)

    now, sampled, marks = 0.0, sample(0), []
    for step in range(STEPS + 2):
        now = max(now, sampled)
        if split.ahead:
            now += copy
            sampled = now + sample(step + 1)
        now = training_end(pair, pair.lengths(step), split, now)
        if not split.ahead:
            sampled = now + copy + sample(step + 1)
        marks.append(now)
    tokens = sum(n + PROMPT_TOKENS for n in pair.lengths(0))
    states = tokens * pair.teacher.hidden_size * 2 if split.teacher else 0
    seconds = (marks[-1] - marks[1]) / STEPS
    copies = 2 * pair.student.num_parameters * engines if split.rollout else 0
    return {"seconds": seconds, "states": states / seconds, "weights": copies / seconds}


def best_split(pair: Pair, gpus: int, layout: str) -> tuple[Split, dict[str, float]] | None:
    """The fastest of the splits that fit and that the plan's formula finds best, and its simulation."""
    if layout == "all in one":
        fits = any(pair.fits(gpus, gpus, placement, colocated=True) for placement in ("replica", "zero3"))
        splits = [Split(gpus, 0, 0, False)] if fits else []
    else:
        apart, ahead = layout != "teacher apart", layout.endswith("rollout_ahead")
        splits = list(islice(promising_splits(pair, gpus, apart, ahead), CANDIDATES))
    simulated = [(split, simulate(pair, split)) for split in splits]
    return min(simulated, key=lambda found: found[1]["seconds"], default=None)


def promising_splits(pair: Pair, gpus: int, apart: bool, ahead: bool) -> Iterator[Split]:
    """Those that fit, the fastest by the plan's formula first."""
    found = []
    workload, memory = pair.workload(gpus, colocated=not apart), USABLE * GPU_GIB * GIB
    for teachers in range(pair.gpus_per_teacher, gpus, pair.gpus_per_teacher):
        for rollouts in range(pair.gpus_per_engine, gpus - teachers, pair.gpus_per_engine) if apart else (0,):
            students = gpus - teachers - rollouts
            numbers = (students, teachers, rollouts)
            parts = estimate_parts(pair.student, pair.teacher, workload, gpus, numbers, memory)
            count = divide_workload(workload, gpus, students).micro_batches_per_step
            found.append((pipelined_step(parts, count, 1, ahead), numbers))
    for _, (students, teachers, rollouts) in sorted(found):
        if pair.fits(gpus, students, "server", colocated=not apart):
            yield Split(students, teachers, rollouts, ahead)


# Output -----------------------------------------------------------------------------------------------------------


def run(names: list[str], counts: list[int]) -> dict[str, dict[str, dict[int, tuple[Split, dict[str, float]]]]]:
    """Simulate and print a table for each pair."""
    found: dict[str, Any] = {}
    for name in names:
        pair, tables = Pair(name), {layout: {} for layout in LAYOUTS}
        print(f"\n{name}: teacher on {pair.gpus_per_teacher} GPUs each; s per step (student + teacher + rollouts)\n")
        print(f"| GPUs | {' | '.join(LAYOUTS)} | hidden states, GB/s | weights, GB/s |")
        print(f"|---:|{'---:|' * (len(LAYOUTS) + 2)}")
        for gpus in counts:
            cells, last = [], None
            for layout in LAYOUTS:
                best = best_split(pair, gpus, layout)
                if best is None:
                    cells.append("-")
                    continue
                split, last = tables[layout][gpus] = best
                cells.append(f"{last['seconds']:.1f} ({split})")
            traffic = [f"{last[key] / 1e9:.1f}" if last else "-" for key in ("states", "weights")]
            print(f"| {gpus} | {' | '.join([*cells, *traffic])} |", flush=True)
        found[name] = tables
    return found


def plot(found: dict[str, Any], path: str) -> None:
    """Completions per second over the number of GPUs, one panel for each pair."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "tsdkd"  # the same file every time
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(4.2 * len(found), 3.6), layout="constrained", squeeze=False)
    for axis, (name, tables) in zip(axes[0], found.items(), strict=True):
        for layout, style in zip(LAYOUTS, ("o:", "s-.", "^--", "D-"), strict=True):
            points = sorted(tables[layout].items())
            axis.plot(
                [gpus for gpus, _ in points],
                [COMPLETIONS / result["seconds"] for _, (_, result) in points],
                style,
                label=layout,
                markersize=4,
            )
        counts = sorted({gpus for table in tables.values() for gpus in table})
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xticks(counts, [str(gpus) for gpus in counts])
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_title(name)
        axis.set_xlabel("GPUs")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("completions per second")
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--gpus", nargs="+", type=int, default=[8, 16, 32, 64, 128, 256])
    parser.add_argument("--plot", metavar="FILE", help="write a figure")
    args = parser.parse_args()
    found = run(args.pairs, args.gpus)
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
