"""A whole on-policy training step against TRL's `GKDTrainer` and `DistillationTrainer`, split into its parts.

    python benchmarks/step.py [--pairs demo large] [--repeats 3] [--steps 4] [--threads N] [--vllm]

Our step is TSD-KD with its three terms, the peers' is a JSD with beta 0.9: same pair, prompts, batch, limits, float32.
`demo` is the embedded pair (32 completions); `large` has random weights, 60M and 250M parameters, the Qwen2.5
vocabulary (8 completions of 64 tokens). The trainers take turns, each turn's first step isn't counted; figures are
medians of the turns, in seconds a step. `head` is from the student's last hidden states to their gradient:
projections, loss, and the way back. `--vllm` adds our trainer with rollouts on vLLM; `sync`, a part of the rollout,
copies the weights. On a GPU the device is waited for wherever a part begins or ends.
"""

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # the peers' memory isn't the engine's

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from tsdkd import TSDKDConfig, TSDKDTrainer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl.experimental.gkd import GKDConfig, GKDTrainer

DEMO = resources.files("tsdkd").joinpath("demo")
STUDENT, TEACHER = str(DEMO.joinpath("student")), str(DEMO.joinpath("teacher"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PARTS = ("rollout", "sync", "teacher", "student", "head", "optimizer")
COMMON: dict[str, Any] = {
    "learning_rate": 1e-6,
    "use_cpu": DEVICE == "cpu",
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "report_to": "none",
    "save_strategy": "no",
    "logging_strategy": "no",
    "temperature": 1.0,
    "beta": 0.9,
}
SHAPES = {"demo": (32, 64), "large": (8, 64)}  # completions, their limit in tokens


def save_random(folder: str, hidden: int, layers: int) -> None:
    """Qwen2 with its own vocabulary, tied."""
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(hidden)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(STUDENT).save_pretrained(folder)


def folders(pair: str, parent: str) -> tuple[str, str]:
    """Student and teacher."""
    if pair == "demo":
        return STUDENT, TEACHER
    save_random(f"{parent}/student", 256, 20)
    save_random(f"{parent}/teacher", 768, 14)
    return f"{parent}/student", f"{parent}/teacher"


def now() -> float:
    """Seconds, when the device has done what it was told."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock(TrainerCallback):
    """Where a step's time goes; the first step isn't counted."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.rolling = False
        self.steps = 0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = now()
        yield
        self.seconds[name] += now() - start

    def wrap(self, owner: Any, method: str, name: str) -> None:
        """Time a method as a part."""
        inner = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.rolling, before = name == "rollout", self.rolling
            with self.part(name):
                result = inner(*args, **kwargs)
            self.rolling = before
            return result

        setattr(owner, method, timed)

    def watch(self, student: torch.nn.Module, teacher: torch.nn.Module, accelerator: Any) -> None:
        """Teacher and student by hooks on their backbones, the head as what lies between."""

        def after_student(module: Any, args: Any, output: Any) -> None:
            if not self.rolling and torch.is_grad_enabled():
                self.hidden_at, self.teacher_then = now(), self.seconds["teacher"]
                output.last_hidden_state.register_hook(at_gradient)

        def at_gradient(gradient: torch.Tensor) -> None:
            self.gradient_at = now()
            inside = self.seconds["teacher"] - self.teacher_then
            self.seconds["head"] += self.gradient_at - self.hidden_at - inside

        backward = accelerator.backward

        def timed_backward(*args: Any, **kwargs: Any) -> None:
            backward(*args, **kwargs)
            self.seconds["student"] += now() - self.gradient_at

        accelerator.backward = timed_backward
        self.wrap(teacher.base_model, "forward", "teacher")
        student.base_model.register_forward_hook(after_student)
        inner = student.base_model.forward

        def student_forward(*args: Any, **kwargs: Any) -> Any:
            if self.rolling or not torch.is_grad_enabled():
                return inner(*args, **kwargs)
            with self.part("student"):
                return inner(*args, **kwargs)

        student.base_model.forward = student_forward

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.wrap(optimizer, "step", "optimizer")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        at = now()
        if state.global_step == 1:
            self.seconds.clear()
            self.start = at
        else:
            self.steps += 1
            self.total = (at - self.start) / self.steps

    def result(self) -> dict[str, float]:
        """Seconds a step: in all, and of each part."""
        return {"step": self.total, **{name: self.seconds[name] / self.steps for name in PARTS}}


def trainers(pair: str, rows: Dataset, folder: str, names: tuple[str, str], steps: int, vllm: bool) -> dict[str, Any]:
    """Name -> a function that makes the trainer and the object whose method is its rollout."""
    completions, limit = SHAPES[pair]
    common = {**COMMON, "output_dir": folder, "max_steps": steps + 1, "per_device_train_batch_size": completions}
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    chats = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    answers = [[{"role": "assistant", "content": row["completion"]}] for row in rows]
    data = {
        GKDTrainer: Dataset.from_dict({"messages": [c + a for c, a in zip(chats, answers, strict=True)]}),
        DistillationTrainer: Dataset.from_dict({"prompt": chats}),
        TSDKDTrainer: rows,
    }

    def make(trainer_class: Any, args: Any, clock: Clock) -> Any:
        student, teacher = (AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32) for name in names)
        trainer = trainer_class(
            model=student,
            teacher_model=teacher,
            args=args,
            train_dataset=data[trainer_class],
            processing_class=tokenizer,
            callbacks=[clock],
        )
        clock.watch(student, teacher, trainer.accelerator)
        if trainer_class is TSDKDTrainer:
            clock.wrap(trainer.sampler, "update", "sync")
        clock.wrap(trainer, "generate_on_policy_outputs" if trainer_class is GKDTrainer else "_generate", "rollout")
        return trainer

    gkd = {"max_new_tokens": limit, "max_length": 128, "lmbda": 1.0}
    ours = {**common, **gkd, "log_term_gradients": 0}
    found = {
        "TSD-KD, tsdkd": lambda clock: make(TSDKDTrainer, TSDKDConfig(**ours), clock),
        "JSD, GKDTrainer": lambda clock: make(GKDTrainer, GKDConfig(**common, **gkd), clock),
        "JSD, DistillationTrainer": lambda clock: make(
            DistillationTrainer, DistillationConfig(**common, max_completion_length=limit), clock
        ),
    }
    if vllm:
        found["TSD-KD, tsdkd, vLLM"] = lambda clock: make(TSDKDTrainer, TSDKDConfig(**ours, use_vllm=True), clock)
    return found


def table(pair: str, rows: Dataset, repeats: int, steps: int, vllm: bool) -> None:
    """Measure and print one pair."""
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        names = folders(pair, folder)
        for _ in range(repeats):
            for name, make in trainers(pair, rows, folder, names, steps, vllm).items():
                clock = Clock()
                make(clock).train()
                found[name].append(clock.result())
    medians = {name: {key: statistics.median(r[key] for r in runs) for key in runs[0]} for name, runs in found.items()}
    ours = next(iter(medians.values()))["step"]
    print(f"\n### {pair} pair: {SHAPES[pair][0]} completions of at most {SHAPES[pair][1]} tokens\n")
    print(f"| | step | ours / its | {' | '.join(PARTS)} |\n|{'---|' * (3 + len(PARTS))}")
    for name, parts in medians.items():
        print(f"| {name} | {parts['step']:.3f} | {ours / parts['step']:.2f} |", end="")
        print("".join(f" {parts[part]:.3f} |" for part in PARTS), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--vllm", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = load_dataset("json", data_files=str(DEMO.joinpath("train.jsonl")), split="train").select(range(512))
    machine = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {machine}")
    for pair in arguments.pairs:
        table(pair, rows, arguments.repeats, arguments.steps, arguments.vllm)


if __name__ == "__main__":
    main()
