"""Short runs of every method. Their losses, gradient norms and final weights are on record in `invariants.json`.

A change that shouldn't alter numbers leaves the record as it is: on a machine like the one that wrote it the runs must
repeat it bit by bit. On others, numbers are rounded differently, and sooner or later another token is sampled. A
change that should alter numbers writes a new record, and its commit says why:

    python tests/invariants.py --write "one process" "two processes"
    python tests/invariants.py --write vllm                             where vLLM is installed
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # for the processes of a launcher
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB an engine: all of them share a process

import torch
import transformers
import trl
from safetensors.torch import load_file

from conftest import (
    DDP,
    ENVIRONMENT,
    QUIET,
    build_model,
    build_tokenizer,
    flags,
    make_rows,
    on_cpus,
    run_to_end,
    write_jsonl,
)
from preloaded import python
from tsdkd.cli import main
from tsdkd.methods import METHODS

Runs = dict[str, tuple[str, dict[str, Any]]]
"""Case -> method and options."""

RECORD = Path(__file__).with_suffix(".json")
COMMON_OPTIONS = {
    "max_steps": 4,
    "per_device_train_batch_size": 3,
    "per_device_eval_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.01,
    "logging_steps": 1,
    "max_length": 64,
    "max_completion_length": 12,
    "eval_strategy": "steps",
    "eval_steps": 2,
}
METHOD_OPTIONS: dict[str, dict[str, Any]] = {
    "minillm": {"num_iterations": 2},
    "grpo": {"max_length": None, "num_generations": 3, "per_device_eval_batch_size": 3, "eval_strategy": "no"},
}
"""What a method needs beside `COMMON_OPTIONS`; None removes an option."""

_DENSE: Runs = {f"{method}, dense": (method, {"fused_head": False}) for method in METHODS if method != "grpo"}
_PACKED = {"padding_free": None}
"""The default. All other runs pad, so that their numbers don't depend on how sequences are packed."""
ONE_PROCESS: Runs = {
    **{method: (method, {}) for method in METHODS},
    **_DENSE,
    "tsd-kd, adaptive opener": ("tsd-kd", {"adaptive_opener": True, "gradient_checkpointing": True}),
    "tsd-kd, packed": ("tsd-kd", _PACKED),
    "tsd-kd, packed, adaptive opener": (
        "tsd-kd",
        {**_PACKED, "adaptive_opener": True, "max_tokens_per_micro_batch": 40},
    ),
    "eopd, packed, continued": ("eopd", {**_PACKED, "save_strategy": "steps", "save_steps": 1}),
    "tsd-kd, bfloat16": ("tsd-kd", {"bf16": True}),
    "eopd, bfloat16": ("eopd", {"bf16": True}),
    "tsd-kd, sum and temperature": ("tsd-kd", {"indirect_reduction": "sum", "temperature": 0.7}),
    "gkd, lmbda": ("gkd", {"lmbda": 0.5}),
    "tsd-kd, records": ("tsd-kd", {"record_steps": 2}),
    "tsd-kd, term gradients": ("tsd-kd", {"log_term_gradients": 2}),
    "tsd-kd, continued": ("tsd-kd", {"save_strategy": "steps", "save_steps": 2}),
    "eopd, continued": ("eopd", {"save_strategy": "steps", "save_steps": 1}),
    "distillm, continued": ("distillm", {"save_strategy": "steps", "save_steps": 2, "on_policy_share": 0.5}),
    "minillm, continued": ("minillm", {"save_strategy": "steps", "save_steps": 1}),
}
TWO_PROCESSES: Runs = {
    **{method: (method, {}) for method in METHODS},
    **{case: _DENSE[case] for case in ("tsd-kd, dense", "eopd, dense")},
    "tsd-kd, packed": ("tsd-kd", {**_PACKED, "max_tokens_per_micro_batch": 40}),
}
VLLM: Runs = {method: (method, {"use_vllm": True}) for method in ("tsd-kd", "eopd")}
_LEFT_OUT = ("speed", "runtime", "per_second", "flos", "time", "padding")


def machine() -> dict[str, str]:
    """What the bits of a run depend on beside the code."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
    }


def write_inputs(folder: Path) -> None:
    """The pair and the data of all runs."""
    models = {
        "teacher": build_model("qwen3", 1, rows=70, hidden=48, head_dim=32),
        "student": build_model("gemma2", 0, head_dim=32),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        build_tokenizer().save_pretrained(folder / name)
    write_jsonl(folder / "train.jsonl", make_rows(24))
    write_jsonl(folder / "eval.jsonl", make_rows(5, seed=3))


def train_command(method: str, options: dict[str, Any], inputs: Path, output: Path, processes: int) -> list[str]:
    """The arguments of `tsdkd`."""
    config = METHODS[method].config_class
    batch = 3 if processes == 1 else 2
    values = {**QUIET, **COMMON_OPTIONS, "per_device_train_batch_size": batch}
    if "rollout_batch_size" in config.__dataclass_fields__:
        values["rollout_batch_size"] = 2 * COMMON_OPTIONS["gradient_accumulation_steps"] * batch * processes
    if "padding_free" not in config.unsupported_options:
        values["padding_free"] = False
    values |= {**METHOD_OPTIONS.get(method, {}), **options}
    values |= {"method": method, "model_name_or_path": inputs / "student", "output_dir": output}
    values |= {"dataset_name": inputs / "train.jsonl", "eval_dataset_name": inputs / "eval.jsonl"}
    if config.has_teacher:
        values["teacher_model_name_or_path"] = inputs / "teacher"
    if values["eval_strategy"] == "no":
        del values["eval_dataset_name"], values["eval_steps"]
    return ["train", *flags(**{key: value for key, value in values.items() if value is not None})]


def read_run(output: Path) -> dict[str, Any]:
    """What a run leaves: the log without times and padding, hashes of weights and of token records."""
    state = load_file(output / "model.safetensors")
    weights = b"".join(weight.contiguous().numpy().tobytes() for _, weight in sorted(state.items()))
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    rows = [{k: v for k, v in row.items() if not any(word in k for word in _LEFT_OUT)} for row in log]
    result = {"weights": hashlib.sha256(weights).hexdigest(), "log": rows}
    records = sorted(output.glob("records/*.parquet"))
    if records:
        import pyarrow.parquet as pq

        columns = [pq.read_table(path).to_pydict() for path in records]
        result["records"] = hashlib.sha256(json.dumps(columns).encode()).hexdigest()
    return result


def measure(case: str, command: list[str], output: Path) -> dict[str, Any]:
    """Train, and read what was saved; {} in all processes but the first.

    A case that ends in "continued" loses its last checkpoint and its result, and is resumed.
    """
    assert main(command) == 0, case
    if case.endswith("continued"):
        shutil.rmtree(output / "checkpoint-4")
        for name in ("model.safetensors", "trainer_state.json"):
            (output / name).unlink()
        assert main([*command, "--resume", "true"]) == 0, case
    return read_run(output) if int(os.environ.get("RANK", "0")) == 0 else {}


def measure_all(runs: Runs, folder: Path, processes: int = 1) -> dict[str, Any]:
    """All runs in this process, one after the other. `folder` has `inputs`."""
    results = {}
    for case, (method, options) in runs.items():
        output = folder / case.replace(", ", "-").replace(" ", "-")
        command = train_command(method, options, folder / "inputs", output, processes)
        results[case] = measure(case, command, output)
    return results


def measure_one_process(runs: Runs) -> dict[str, Any]:
    """In this process."""
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder, "inputs"))
        return measure_all(runs, Path(folder))


def measure_two_processes() -> dict[str, Any]:
    """`TWO_PROCESSES`, in processes that accelerate starts."""
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder, "inputs"))
        command = [python(), "-m", "accelerate.commands.launch", *DDP, __file__, "--rank-of", folder]
        result = run_to_end(command, on_cpus(), timeout=900)
        assert result.returncode == 0, result.stderr[-3000:]
        return json.loads(Path(folder, "results.json").read_text())


def measure_vllm() -> dict[str, Any]:
    """`VLLM`, in a process of its own: vLLM's import changes OpenMP's settings, on which bits depend."""
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder, "inputs"))
        environment = {**ENVIRONMENT, "OMP_NUM_THREADS": "1"}
        result = run_to_end([sys.executable, __file__, "--vllm-of", folder], environment, timeout=900)
        assert result.returncode == 0, result.stderr[-3000:]
        return json.loads(Path(folder, "results.json").read_text())


def find_difference(measured: dict[str, Any], recorded: dict[str, Any]) -> str | None:
    """The first difference between two results of one case."""
    if measured == recorded:
        return None
    pairs = zip(measured["log"], recorded["log"], strict=False)
    return next((f"{ours} instead of {theirs}" for ours, theirs in pairs if ours != theirs), "weights or records")


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "one process": lambda: measure_one_process(ONE_PROCESS),
    "two processes": measure_two_processes,
    "vllm": measure_vllm,
}


def is_recorded_machine(part: str) -> bool:
    """Whether this is a machine like the one that wrote a part."""
    return bool(json.loads(RECORD.read_text())[part]["machine"] == machine())


def compare(part: str) -> list[str]:
    """Measure a part again; what differs from the record."""
    recorded, measured = json.loads(RECORD.read_text())[part]["runs"], PARTS[part]()
    missing = [f"{case}: not on record; write it" for case in measured.keys() - recorded.keys()]
    differences = {case: find_difference(measured[case], run) for case, run in recorded.items()}
    return missing + [f"{case}: {text}" for case, text in differences.items() if text]


def write(parts: list[str]) -> None:
    """Put parts on record."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    record |= {part: {"machine": machine(), "runs": PARTS[part]()} for part in parts}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


def run_rank(folder: Path) -> None:
    """One of several processes; the first one writes the results."""
    results = measure_all(TWO_PROCESSES, folder, processes=2)
    if int(os.environ["RANK"]) == 0:
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--write", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    group.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    group.add_argument("--vllm-of", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        run_rank(arguments.rank_of)
    elif arguments.vllm_of:
        results = measure_all(VLLM, arguments.vllm_of)
        (arguments.vllm_of / "results.json").write_text(json.dumps(results))
    else:
        write(arguments.write)
