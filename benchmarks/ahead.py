"""`rollout_ahead: 1` against 0: the time of a step, and what a policy that is a step behind does to the result.

    python benchmarks/ahead.py time [--tokens 64] [--steps 8] [--repeats 2]
    python benchmarks/ahead.py accuracy [--seeds 1 2 3 4 5] [--method tsd-kd]

`time`: random models of about 60M and 250M parameters without tied embeddings, float32, 8 completions; a vLLM server
on one CPU core, the trainer on another. The two settings take turns; the first two steps of a turn aren't counted. It
needs two idle cores, and `.venv-vllm`.

`accuracy`: the demo pair, whose tied embeddings a vLLM server on a CPU can't take over. So the student itself samples,
at the moment when a server would begin, with the same weights and seeds: what is trained on is what
`rollout_ahead` trains on, only nothing runs at the same time. avg@8 and pass@8 of 256 test problems.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import resources
from pathlib import Path
from typing import Any

COMMON = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True}


# Time -------------------------------------------------------------------------------------------------------------


def save_pair(folder: Path) -> None:
    """Random Qwen3 models with the demo's tokenizer, V 32768."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

    for name, hidden, layers in (("student", 512, 8), ("teacher", 1024, 12)):
        heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64, "head_dim": 64}
        config = Qwen3Config(
            vocab_size=32768,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
            **heads,
        )
        torch.manual_seed(hidden)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters", flush=True)
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(str(resources.files("tsdkd").joinpath("demo", "student"))).save_pretrained(
            folder / name
        )


def start_server(model: Path, port: int) -> subprocess.Popen[bytes]:
    environment = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_CI_ENV": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--max-model-len", "512", "--dtype", "float32"]
    server = subprocess.Popen(
        [*command, "--logprobs-mode", "processed_logprobs"],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {1}),
    )
    import requests

    while True:
        try:
            if requests.get(f"http://127.0.0.1:{port}/health", timeout=1).ok:
                return server
        except requests.RequestException:
            if server.poll() is not None:
                raise SystemExit("the server ended") from None
        time.sleep(1)


def step_seconds(folder: Path, port: int, ahead: int, tokens: int, steps: int) -> dict[str, float]:
    """Medians of what a run logs for its steps."""
    values = {**COMMON, "model_name_or_path": folder / "student", "teacher_model_name_or_path": folder / "teacher"}
    values |= {"dataset_name": "tsdkd://demo/train.jsonl", "output_dir": tempfile.mkdtemp(dir=folder)}
    values |= {"per_device_train_batch_size": 8, "max_length": 512, "max_completion_length": tokens}
    values |= {"use_vllm": True, "vllm_mode": "server", "vllm_server_port": port, "rollout_ahead": ahead}
    values |= {"logging_steps": 1, "save_strategy": "no", "log_term_gradients": 0, "learning_rate": 1e-6}
    values |= {"vllm_check_every": 1000, "max_steps": steps + 2}
    script = (
        "import json, sys; from tsdkd import TSDKDConfig, TSDKDTrainer; from tsdkd.data import load_split\n"
        "from tsdkd.files import resolve_path\n"
        "values = json.loads(sys.argv[1]); models = [values.pop(f'{r}model_name_or_path') for r in ('', 'teacher_')]\n"
        "rows = load_split(resolve_path(values.pop('dataset_name')), None, 'train')\n"
        "trainer = TSDKDTrainer(*models, TSDKDConfig(**values), train_dataset=rows); trainer.train()\n"
        "print(json.dumps([e for e in trainer.state.log_history if 'loss' in e]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(values, default=str)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {0}),
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    logs = json.loads(done.stdout.splitlines()[-1])[2:]
    parts = ("step", "rollout", "teacher", "student")
    return {part: statistics.median(entry[f"time/{part}_seconds"] for entry in logs) for part in parts}


def compare_time(tokens: int, steps: int, repeats: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), 8123
        save_pair(folder)
        server = start_server(folder / "student", port)
        try:
            found: dict[int, list[dict[str, float]]] = {0: [], 1: []}
            for _ in range(repeats):
                for ahead in found:
                    found[ahead].append(step_seconds(folder, port, ahead, tokens, steps))
                    print(ahead, {k: round(v, 2) for k, v in found[ahead][-1].items()}, flush=True)
        finally:
            os.killpg(server.pid, 9)
        steps_of = {ahead: statistics.median(one["step"] for one in turns) for ahead, turns in found.items()}
        print(f"rollout_ahead 1: {steps_of[1]:.2f} s, 0: {steps_of[0]:.2f} s, ratio {steps_of[1] / steps_of[0]:.2f}")


# Accuracy ---------------------------------------------------------------------------------------------------------


def accuracy(method: str, seed: int, ahead: int) -> dict[str, float]:
    """avg@8 and pass@8 of the demo after training, percent."""
    import yaml

    from tsdkd.data import load_split
    from tsdkd.files import resolve_path
    from tsdkd.methods import find_method
    from tsdkd.rollout.hf import HuggingFaceSampler
    from tsdkd.run.presets import find_preset

    def start(self: Any, prompts: Any, limits: Any, keys: Any) -> Any:
        completions = self.generate(self.model, prompts, limits, keys)
        return lambda: completions

    HuggingFaceSampler.start = start  # type: ignore[attr-defined]
    preset = find_preset("demo.yaml" if method == "tsd-kd" else "demo_eopd.yaml")
    values = {**yaml.safe_load(preset.read_text()), "report_to": "none", "disable_tqdm": True, "eval_samples": 8}
    values |= {"seed": seed, "logging_steps": 100, "log_term_gradients": 0}
    names = ("dataset_name", "eval_dataset_name")
    rows = {name: load_split(resolve_path(values.pop(name)), None, "train") for name in names}
    models = [values.pop(f"{role}model_name_or_path") for role in ("", "teacher_")]
    trainer_class = find_method(values.pop("method"))
    with tempfile.TemporaryDirectory() as folder:
        args = trainer_class.config_class(**{**values, "output_dir": folder})
        args.rollout_ahead = ahead  # after the check that it has a server
        trainer = trainer_class(
            *models,
            args,
            train_dataset=rows["dataset_name"],
            eval_dataset=rows["eval_dataset_name"].select(range(256)),
        )
        trainer.sampler.model = trainer.model
        trainer.train()
        found = trainer.evaluate()
    return {name: 100 * found[f"eval_{name}"] for name in ("avg@8", "pass@8")}


def compare_accuracy(method: str, seeds: list[int]) -> None:
    found: dict[int, list[dict[str, float]]] = {0: [], 1: []}
    for seed in seeds:
        for ahead in found:
            found[ahead].append(accuracy(method, seed, ahead))
            print(f"seed {seed}, rollout_ahead {ahead}: {found[ahead][-1]}", flush=True)
    from scipy.stats import t

    for name in ("avg@8", "pass@8"):
        means = [statistics.mean(one[name] for one in found[ahead]) for ahead in (0, 1)]
        differences = [b[name] - a[name] for a, b in zip(found[0], found[1], strict=True)]
        half = t.ppf(0.975, len(seeds) - 1) * statistics.stdev(differences) / len(seeds) ** 0.5
        print(f"{method} {name}: 0: {means[0]:.1f}, 1: {means[1]:.1f}, {means[1] - means[0]:+.1f} ± {half:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    timed, trained = kinds.add_parser("time"), kinds.add_parser("accuracy")
    timed.add_argument("--tokens", type=int, default=64)
    timed.add_argument("--steps", type=int, default=8)
    timed.add_argument("--repeats", type=int, default=2)
    trained.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    trained.add_argument("--method", default="tsd-kd", choices=["tsd-kd", "eopd"])
    args = parser.parse_args()
    if args.kind == "time":
        compare_time(args.tokens, args.steps, args.repeats)
    else:
        compare_accuracy(args.method, args.seeds)


if __name__ == "__main__":
    main()
