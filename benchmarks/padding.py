"""Padded, sorted and packed micro-batches: share of padding, and throughput of the training part of a step.

    python benchmarks/padding.py [--rows 32] [--shortest 20] [--longest 200] [--repeats 3] [--steps 2] [--threads N]

TSD-KD on given completions, so that nothing is rolled out. Prompt plus completion have between `shortest` and
`longest` tokens, uniformly distributed. Random Qwen2 models whose layers take most of the time, as in a real pair:
11M and 25M parameters in the layers, a vocabulary of 8192. float32, without gradient checkpointing. Timed are both
models' forward passes, the head, and the student's backward pass. Three trainers take turns in one process:

- `padded`: `padding_free: false`, micro-batches in the order of the data
- `by length`: micro-batches within the token budget, sorted by length but not packed, as for recurrent models
- `packed`: the default

Figures are medians of the turns; the first step of each turn isn't counted.
"""

import argparse
import os
import random
import statistics
import tempfile
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from step import DEVICE, STUDENT
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from tsdkd import TSDKDConfig, TSDKDTrainer

VOCABULARY = 8192
STUDENT_SHAPE, TEACHER_SHAPE = (384, 6), (512, 8)  # hidden size, layers
MODES = ("padded", "by length", "packed")


def make_model(hidden: int, layers: int) -> Any:
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(hidden)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def make_rows(count: int, shortest: int, longest: int) -> Dataset:
    """Sequences of the given lengths in the words of the demo, each one token; prompts have ten."""
    rng = random.Random(0)
    words = ["a", "b", "so", "then", "="]
    lengths = [rng.randint(shortest, longest) for _ in range(count)]
    prompt = " ".join(["a"] * 10)
    return Dataset.from_list(
        [{"prompt": prompt, "completion": " ".join(rng.choices(words, k=n - 10))} for n in lengths]
    )


def make_trainer(mode: str, arguments: argparse.Namespace, folder: str) -> TSDKDTrainer:
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    tokenizer.eos_token = None
    args = TSDKDConfig(
        f"{folder}/{mode}",
        padding_free=False if mode == "padded" else None,
        per_device_train_batch_size=arguments.batch,
        gradient_accumulation_steps=arguments.rows // arguments.batch,
        max_steps=arguments.steps + 1,
        max_length=arguments.longest,
        max_completion_length=arguments.longest,
        chat_template_source="none",
        lmbda=0.0,
        logging_steps=1,
        log_term_gradients=0,
        use_cpu=DEVICE == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        log_level="error",
    )
    rows = make_rows(arguments.rows * (arguments.steps + 1), arguments.shortest, arguments.longest)
    models = (make_model(*STUDENT_SHAPE), make_model(*TEACHER_SHAPE))
    trainer = TSDKDTrainer(
        *models, args, train_dataset=rows, processing_class=tokenizer, teacher_processing_class=tokenizer
    )
    if mode == "by length":
        trainer.planner.check_models = lambda models: None  # which finds that they can be packed
    return trainer


def take_turn(trainer: TSDKDTrainer) -> tuple[float, float]:
    """Return the share of padding and the seconds of a step."""
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry][1:]
    seconds = [entry["time/teacher_seconds"] + entry["time/student_seconds"] for entry in log]
    return statistics.mean(entry["padding"] for entry in log), statistics.mean(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32, help="completions of a step")
    parser.add_argument("--batch", type=int, default=8, help="per_device_train_batch_size")
    parser.add_argument("--shortest", type=int, default=20)
    parser.add_argument("--longest", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        trainers = {mode: make_trainer(mode, arguments, folder) for mode in MODES}
        turns = [{mode: take_turn(trainer) for mode, trainer in trainers.items()} for _ in range(arguments.repeats)]
    print(f"torch {torch.__version__}, {DEVICE}, {arguments.threads} threads")
    print(f"{arguments.rows} completions a step, {arguments.shortest} to {arguments.longest} tokens\n")
    print("| micro-batches | padding | seconds | throughput |\n|---|---:|---:|---:|")
    for mode in MODES:
        padding = turns[0][mode][0]
        seconds = statistics.median(turn[mode][1] for turn in turns)
        ratio = statistics.median(turn["padded"][1] / turn[mode][1] for turn in turns)
        print(f"| {mode} | {padding:.1%} | {seconds:.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
