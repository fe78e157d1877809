"""`tsdkd plan`'s estimate against measured peak memory, each case in a process of its own.

    python benchmarks/plan.py [--cases NAME ...]

Random Qwen2 pairs, one process, float32 (or the student's weights in bfloat16), the student's own rollouts of full
length. Measured is the process's peak resident memory over what it has before the models are loaded; on a GPU what its
allocator had at most given out.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CASES: dict[str, dict[str, Any]] = {
    "short": {"hidden": 512, "layers": 8, "batch": 2, "tokens": 128, "checkpointing": False},
    "long": {"hidden": 256, "layers": 8, "batch": 16, "tokens": 128, "checkpointing": False},
    "long, checkpointed": {"hidden": 256, "layers": 8, "batch": 16, "tokens": 128, "checkpointing": True},
    "wide": {"hidden": 1024, "layers": 6, "batch": 2, "tokens": 64, "checkpointing": False},
    "wide, each term's gradients": {"hidden": 1024, "layers": 6, "batch": 2, "tokens": 64, "log_term_gradients": 1},
    "wide, bfloat16": {"hidden": 1024, "layers": 6, "batch": 2, "tokens": 64, "dtype": "bfloat16"},
}


def save(folder: str, hidden: int, layers: int) -> None:
    """A random model, untied, V 32768."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=32768,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def resident(field: str) -> float:
    """GiB, of /proc/self/status."""
    (line,) = (text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(field))
    return int(line.split()[1]) / 2**20


def measure(folder: str, case: dict[str, Any]) -> None:
    """Train two steps and print estimate and measurement, GiB, as JSON."""
    import torch
    from datasets import Dataset
    from transformers import AutoConfig, AutoTokenizer

    from tsdkd import TSDKDConfig, TSDKDTrainer
    from tsdkd.launch.memory import Sharding, estimate_memory
    from tsdkd.launch.model_size import compute_model_size
    from tsdkd.launch.workload import build_workload

    on_gpu = torch.cuda.is_available()
    student, teacher = f"{folder}/student", f"{folder}/teacher"
    tokenizer = AutoTokenizer.from_pretrained(str(Path(sys.modules["tsdkd"].__path__[0], "demo/student")))
    tokenizer.eos_token = None
    args = TSDKDConfig(
        f"{folder}/out",
        use_cpu=not on_gpu,
        bf16=False,
        head_chunk_gib=0.25,
        per_device_train_batch_size=case["batch"],
        max_length=case["tokens"],
        max_new_tokens=case["tokens"],
        gradient_checkpointing=case.get("checkpointing", False),
        model_init_kwargs={"dtype": case.get("dtype", "float32")},
        max_steps=2,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        log_term_gradients=case.get("log_term_gradients", 0),
    )
    rows = Dataset.from_dict({"prompt": ["27,7 x+5 y~3 -> y+3"] * 64})
    before = resident("VmRSS")
    if not on_gpu:
        Path("/proc/self/clear_refs").write_text("5")
    TSDKDTrainer(
        student, teacher, args, train_dataset=rows, processing_class=tokenizer, teacher_processing_class=tokenizer
    ).train()
    measured = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else resident("VmHWM") - before
    configs = [AutoConfig.from_pretrained(folder) for folder in (student, teacher)]
    values = {**vars(args), "dtype": case.get("dtype", "float32"), "attn_implementation": None, "head_chunk_gib": 0.25}
    workload = build_workload(TSDKDConfig, values, configs, gpus=1, gpu_gib=1.0)
    parts = estimate_memory(*map(compute_model_size, configs), workload, Sharding(zero_stage=0), "replica", gpus=1)
    print(json.dumps({"estimate": sum(parts.values()), "measured": measured, "parts": parts}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure[0], json.loads(arguments.measure[1]))
        return
    print("| | estimate, GiB | measured, GiB | ratio |\n|---|---|---|---|")
    for name in arguments.cases:
        case = CASES[name]
        with tempfile.TemporaryDirectory() as folder:
            save(f"{folder}/student", case["hidden"], case["layers"])
            save(f"{folder}/teacher", 768, 6)
            command = [sys.executable, __file__, "--measure", folder, json.dumps(case)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found = json.loads(output.splitlines()[-1])
        ratio = found["estimate"] / found["measured"]
        print(f"| {name} | {found['estimate']:.2f} | {found['measured']:.2f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
