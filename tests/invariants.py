"""Short runs of every method whose losses, gradient norms and weights are on record in `invariants.json`.

A change that shouldn't alter numbers leaves the record as it is. A change that should alter them writes a new one, and
its commit says why:

    python tests/invariants.py --write "one process" "two processes"
    python tests/invariants.py --write vllm                             where vLLM is installed
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
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

from conftest import DDP, QUIET, build_model, build_tokenizer, flags, make_rows, on_cpus, write_jsonl
from tsdkd.cli import main
from tsdkd.methods import METHODS

RECORD = Path(__file__).with_suffix(".json")
STEP = {
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
OWN: dict[str, dict[str, Any]] = {
    "minillm": {"num_iterations": 2},
    "grpo": {"max_length": None, "num_generations": 3, "per_device_eval_batch_size": 3, "eval_strategy": "no"},
}
"""What a method needs beside `STEP`; None takes an option away."""

_WHOLE = {f"{method}, dense": (method, {"fused_head": False}) for method in METHODS if method != "grpo"}
ONE_PROCESS: dict[str, tuple[str, dict[str, Any]]] = {
    **{method: (method, {}) for method in METHODS},
    **_WHOLE,
    "tsd-kd, adaptive opener": ("tsd-kd", {"adaptive_opener": True, "gradient_checkpointing": True}),
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
TWO_PROCESSES: dict[str, tuple[str, dict[str, Any]]] = {
    **{method: (method, {}) for method in METHODS},
    **{case: _WHOLE[case] for case in ("tsd-kd, dense", "eopd, dense")},
}
VLLM: dict[str, tuple[str, dict[str, Any]]] = {method: (method, {"use_vllm": True}) for method in ("tsd-kd", "eopd")}
_TIMES = ("speed", "runtime", "per_second", "flos", "time")


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


def measure(case: str, method: str, options: dict[str, Any], folder: Path, processes: int = 1) -> dict[str, Any]:
    """Train, and look at what was saved: the log without times, and a hash of the weights."""
    pair = folder / "pair"
    rank = int(os.environ.get("RANK", "0"))
    if not pair.exists() and rank == 0:
        for name, model in {
            "teacher": build_model("qwen3", 1, rows=70, hidden=48, head_dim=32),
            "student": _student(),
        }.items():
            model.save_pretrained(pair / name)
            build_tokenizer().save_pretrained(pair / name)
        write_jsonl(pair / "train.jsonl", make_rows(24))
        write_jsonl(pair / "eval.jsonl", make_rows(5, seed=3))
        (folder / "ready").touch()
    while not (folder / "ready").exists():
        pass
    output = folder / case.replace(", ", "-").replace(" ", "-")
    step = {**STEP, "per_device_train_batch_size": 3 if processes == 1 else 2}
    fields = METHODS[method].config_class.__dataclass_fields__
    rollout = {"rollout_batch_size": 2 * 2 * step["per_device_train_batch_size"] * processes}
    own = rollout if "rollout_batch_size" in fields else {}
    values = {**QUIET, **step, **own, **OWN.get(method, {}), **options}
    values |= {"method": method, "model_name_or_path": pair / "student", "output_dir": output}
    values |= {"dataset_name": pair / "train.jsonl", "eval_dataset_name": pair / "eval.jsonl"}
    if "teacher_model_name_or_path" not in METHODS[method].config_class.unsupported_options:
        values["teacher_model_name_or_path"] = pair / "teacher"
    if values["eval_strategy"] == "no":
        del values["eval_dataset_name"], values["eval_steps"]
    command = ["train", *flags(**{key: value for key, value in values.items() if value is not None})]
    assert main(command) == 0, case
    if case.endswith("continued"):
        shutil.rmtree(output / "checkpoint-4")
        for name in ("model.safetensors", "trainer_state.json"):
            (output / name).unlink()
        assert main([*command, "--resume", "true"]) == 0, case
    if rank:
        return {}
    weights = b"".join(
        w.contiguous().numpy().tobytes() for _, w in sorted(load_file(output / "model.safetensors").items())
    )
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    rows = [{k: v for k, v in row.items() if not any(word in k for word in _TIMES)} for row in log]
    found = {"weights": hashlib.sha256(weights).hexdigest(), "log": rows}
    recorded = sorted(output.glob("records/*.parquet"))
    if recorded:
        import pyarrow.parquet as pq

        columns = [pq.read_table(path).to_pydict() for path in recorded]
        found["records"] = hashlib.sha256(json.dumps(columns).encode()).hexdigest()
    return found


def _student() -> Any:
    return build_model("gemma2", 0, head_dim=32)


def measure_all(cases: dict[str, tuple[str, dict[str, Any]]], processes: int = 1) -> dict[str, Any]:
    """All cases in this process, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(os.environ.get("INVARIANTS_FOLDER", folder))
        return {case: measure(case, *what, shared, processes) for case, what in cases.items()}


def measure_two() -> dict[str, Any]:
    """`TWO_PROCESSES`, started by accelerate."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        command = [sys.executable, "-m", "accelerate.commands.launch", *DDP, __file__, "--two", str(out)]
        result = subprocess.run(
            command, env={**on_cpus(), "INVARIANTS_FOLDER": folder}, capture_output=True, text=True, timeout=900
        )
        assert result.returncode == 0, result.stderr[-3000:]
        return json.loads(out.read_text())


def differences(found: dict[str, Any], expected: dict[str, Any], exact: bool) -> list[str]:
    """What differs between two measurements of one case; without `exact`, what differs by more than rounding does."""
    if exact:
        if found == expected:
            return []
        rows = zip(found["log"], expected["log"], strict=False)
        first = next((f"{a} instead of {b}" for a, b in rows if a != b), "weights or records")
        return [first]
    problems = []
    if len(found["log"]) != len(expected["log"]):
        problems.append(f"{len(found['log'])} lines of log instead of {len(expected['log'])}")
    for a, b in zip(found["log"], expected["log"], strict=False):
        if a.keys() != b.keys():
            problems.append(f"step {b['step']}: names {sorted(a.keys() ^ b.keys())}")
        for name in a.keys() & b.keys():
            if abs(a[name] - b[name]) > 2e-3 * abs(b[name]) + 2e-4:
                problems.append(f"step {b['step']}: {name} is {a[name]} instead of {b[name]}")
    return problems


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "one process": lambda: measure_all(ONE_PROCESS),
    "two processes": measure_two,
    "vllm": lambda: measure_all(VLLM),
}


def compare(part: str) -> list[str]:
    """Measure a part again; what differs from the record, bit by bit on the machine that wrote it."""
    expected, found = json.loads(RECORD.read_text())[part], PARTS[part]()
    exact = expected["machine"] == machine()
    problems = {case: differences(found[case], expected["runs"][case], exact) for case in expected["runs"]}
    return [f"{case}: {problem}" for case, several in problems.items() for problem in several]


if __name__ == "__main__":
    if sys.argv[1] == "--two":
        measured = measure_all(TWO_PROCESSES, processes=2)
        if int(os.environ["RANK"]) == 0:
            Path(sys.argv[2]).write_text(json.dumps(measured))
    elif sys.argv[1] == "--write":
        record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        record |= {part: {"machine": machine(), "runs": PARTS[part]()} for part in sys.argv[2:]}
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
