"""A long run of the demo: do memory, open files, threads or the time of a step grow?

    python benchmarks/soak.py [--steps 2000] [--settle 100] [--vllm]

Resident memory, open files, threads and seconds a step are read after every tenth of the run. Exit code 1 if, of the
readings from step `--settle` on, the last three have a median of over 1.05 times the first three's memory, or more
open files or threads.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tsdkd.run.arguments import parse_arguments
from tsdkd.run.build import build_trainer


class Watch(TrainerCallback):
    """Reads this process's state."""

    def __init__(self, settle: int, every: int) -> None:
        self.settle, self.every = settle, every
        self.rows: list[tuple[int, float, int, int, float]] = []
        self.times: list[float] = []
        self.last = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.times.append(now - self.last)
        self.last = now
        if state.global_step == self.settle or state.global_step % self.every == 0:
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            row = (
                state.global_step,
                int(status["VmRSS"].split()[0]) / 2**20,
                len(os.listdir("/proc/self/fd")),
                int(status["Threads"]),
                statistics.median(self.times),
            )
            self.times.clear()
            self.rows.append(row)
            print("| {} | {:.3f} | {} | {} | {:.3f} |".format(*row), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--settle", type=int, default=100)
    parser.add_argument("--vllm", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--output_dir", f"{folder}/run", "--max_steps", str(arguments.steps), "--report_to", "none"]
        flags += ["--save_strategy", "steps", "--save_steps", str(arguments.steps // 10), "--save_total_limit", "2"]
        flags += ["--logging_steps", "50", "--disable_tqdm", "true", "--use_vllm", str(arguments.vllm).lower()]
        flags += ["--learning_rate", "1e-4"]  # the demo's is for a seventh of the steps
        watch = Watch(arguments.settle, arguments.steps // 10)
        trainer = build_trainer(parse_arguments("demo.yaml", flags))
        trainer.add_callback(watch)
        print("| step | resident, GiB | open files | threads | median step, s |\n|---|---|---|---|---|", flush=True)
        trainer.train()
    settled = [row[1:4] for row in watch.rows if row[0] >= arguments.settle]
    ends = (settled[:3], settled[-3:])
    first, last = ([statistics.median(column) for column in zip(*end, strict=True)] for end in ends)
    flat = last[0] <= 1.05 * first[0] and last[1] <= first[1] and last[2] <= first[2]
    print("flat" if flat else "NOT flat")
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
