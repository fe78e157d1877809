"""The demo in bfloat16, stopped by SIGTERM and resumed, both methods at once: one row a stage, with the accuracy."""

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tsdkd.data import load_split
from tsdkd.demo.run_demo import evaluate_demo
from tsdkd.errors import PreemptedError

CONFIGS = {"tsd-kd": "demo.yaml", "eopd": "demo_eopd.yaml"}
DEMO = Path(str(resources.files("tsdkd").joinpath("demo")))
CUDA = torch.cuda.is_available()


def train(method: str, flags: list[str], stop: bool) -> None:
    """`tsdkd train`, to its end or stopped after its first line of the log.

    Raises:
        RuntimeError: something else became of it.
    """
    expected = PreemptedError.exit_code if stop else 0
    command = [sys.executable, "-m", "tsdkd", "train", "--config", CONFIGS[method], *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        print(f"{method}: {line}", end="", flush=True)
        said = line.strip() or said
        if stop and ", loss " in line:
            process.send_signal(signal.SIGTERM)
            stop = False
    if process.wait() != expected:
        raise RuntimeError(f"{method}: exit code {process.returncode} instead of {expected}, {said!r}")


def row(method: str, stage: str, model: Path, problems: int, start: float) -> None:
    """Print a stage and its model's accuracy, percent."""
    rows = list(load_split(str(DEMO / "test.jsonl"), None, "train"))[:problems]
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to("cuda" if CUDA else "cpu")
    found = evaluate_demo(loaded, AutoTokenizer.from_pretrained(model), rows).metrics
    cells = " | ".join(f"{found[name]:.1f}" for name in ("greedy", "avg@8", "pass@8"))
    print(f"| {method} | {stage} | {cells} | {time.monotonic() - start:.0f} |", flush=True)


def check(method: str, folder: Path, steps: int, batch: int, problems: int) -> None:
    """Train, be stopped, go on to the end."""
    start = time.monotonic()
    flags = ["--output_dir", str(folder), "--use_cpu", str(not CUDA), "--bf16", "true", "--resume", "true"]
    flags += ["--max_steps", str(steps), "--logging_steps", "10", "--disable_tqdm", "true", "--report_to", "none"]
    flags += ["--per_device_train_batch_size", str(batch)]
    flags += ["--rollout_batch_size", str(batch)] if method == "eopd" else []
    train(method, flags, stop=True)
    (checkpoint,) = folder.glob("checkpoint-*")
    row(method, f"stopped, {checkpoint.name}", checkpoint, problems, start)
    train(method, flags, stop=False)
    row(method, f"resumed, step {steps}", folder, problems, start)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--problems", type=int, default=256)
    arguments = parser.parse_args()
    print("| method | | greedy | avg@8 | pass@8 | s |\n|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as parent, ThreadPoolExecutor() as pool:
        start = time.monotonic()
        runs = [
            pool.submit(check, name, Path(parent, name), arguments.steps, arguments.batch, arguments.problems)
            for name in CONFIGS
        ]
        row("", "before", DEMO / "student", arguments.problems, start)
    errors = [error for error in (future.exception() for future in runs) if error]
    print(*map(repr, errors), sep="\n")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
