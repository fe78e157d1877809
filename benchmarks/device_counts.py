"""What a GPU would be asked to do: kernels, host syncs, bytes. Counted on a CPU, by tests/virtual_device.py.

    python benchmarks/device_counts.py [--methods tsd-kd eopd] [--layers 2] [--no_fused_head] [--lines] [--json]

Two Qwen2 of tiny width, float32 weights under bfloat16 autocast, micro-batches of 4 rows of 32 tokens. Counted are:

- a decoded token of the student's own rollout: kernels, and host syncs in 16 tokens. What a rollout costs once isn't
  in it.
- a micro-batch of training: forward and backward pass, and its share of what precedes a step but the sampling
  (padding, counting, the teacher's and the policy's answers). The optimizer isn't in it.
- the head: bytes that kernels read and write for each (token, word of the vocabulary) in such a micro-batch, all
  passes of both heads with the student's backward pass; from the difference between two vocabularies.

`--lines` lists the host syncs: the line, what it calls outside torch, torch's operation, and how often.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, Qwen2Config

import virtual_device
from conftest import QUIET, build_tokenizer, make_rows
from tsdkd.methods import METHODS
from virtual_device import Counts, counted, uncounted

ROWS, TOKENS, ACCUMULATED, STEPS = 4, 32, 2, 2  # the first step, with what happens once, isn't counted
VOCABULARIES = (4096, 8192)


def model(layers: int, vocabulary: int, seed: int) -> Any:
    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen2Config(vocab_size=vocabulary, num_hidden_layers=layers, tie_word_embeddings=False, **size)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def build(method: str, layers: int, vocabulary: int, fused: bool, folder: str) -> Any:
    """A trainer whose completions all have TOKENS tokens."""
    kind = METHODS[method].config_class
    values = {**QUIET, "use_cpu": False, "bf16": True, "max_steps": STEPS, "logging_steps": 100, "fused_head": fused}
    values |= {"per_device_train_batch_size": ROWS, "gradient_accumulation_steps": ACCUMULATED}
    values |= {"max_completion_length": TOKENS, "dataloader_pin_memory": False}
    for name, value in {"rollout_batch_size": ROWS * ACCUMULATED, "num_iterations": 1, "on_policy_share": 1.0}.items():
        if hasattr(kind, name):
            values[name] = value
    trainer = METHODS[method](
        model=model(layers, vocabulary, 0),
        teacher_model=model(layers, vocabulary, 1),
        args=kind(output_dir=folder, **values),
        train_dataset=Dataset.from_list(make_rows(ROWS * ACCUMULATED * STEPS, completion_words=(TOKENS, TOKENS))),
        processing_class=build_tokenizer(),
    )
    trainer.sampler.sampling = dataclasses.replace(trainer.sampler.sampling, stop_token_ids=frozenset())
    return trainer


def count_training(trainer: Any) -> Counts:
    """What the micro-batches of all counted steps do."""
    counts = Counts()

    def inside(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with counted(counts if trainer.state.global_step else None):
                return function(*args, **kwargs)

        return call

    def outside(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with uncounted():
                return function(*args, **kwargs)

        return call

    trainer.training_step, trainer.get_batch_samples = inside(trainer.training_step), inside(trainer.get_batch_samples)
    trainer.sampler.generate = outside(trainer.sampler.generate)
    trainer.train()
    del trainer.sampler.generate  # its class's again
    return counts


def count_rollout(trainer: Any, tokens: int) -> Counts:
    """A rollout, every completion of so many tokens, prompts of several lengths."""
    prompts = [[4 + i] * (2 + i) for i in range(ROWS)]
    with counted() as counts:
        trainer.sampler.generate(trainer.model_wrapped, prompts, [tokens] * ROWS, [(0, 0, i) for i in range(ROWS)])
    return counts


def measure(method: str, layers: int, fused: bool) -> dict[str, Any]:
    """The figures of one method."""
    trained = []
    for vocabulary in VOCABULARIES:
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
            trainer = build(method, layers, vocabulary, fused, folder)
            trained.append(count_training(trainer))
    batches = ACCUMULATED * (STEPS - 1)
    small, large = trained
    words = batches * ROWS * TOKENS * (VOCABULARIES[1] - VOCABULARIES[0])
    figures: dict[str, Any] = {"method": method}
    if METHODS[method].config_class.lmbda > 0 or METHODS[method].config_class.always_needs_completions:
        short, long = count_rollout(trainer, 16), count_rollout(trainer, 48)
        figures["kernels a token"] = (long.kernels - short.kernels) / 32
        figures["host syncs in 16 tokens"] = (long.syncs - short.syncs) / 2
        figures["lines of a token"] = dict(long.lines - short.lines)
    figures["kernels a micro-batch"] = small.kernels / batches
    figures["host syncs a micro-batch"] = small.syncs / batches
    figures["bytes a word"] = (large.bytes - small.bytes) / words
    figures["lines of a micro-batch"] = {line: count / batches for line, count in small.lines.most_common()}
    return figures


def table(measured: list[dict[str, Any]]) -> str:
    """Markdown."""
    columns = ["method", *(name for name in measured[0] if name != "method" and "lines" not in name)]
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    for figures in measured:
        cells = (figures.get(name, "") for name in columns)
        lines.append("| " + " | ".join(c if isinstance(c, str) else f"{c:,.4g}" for c in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    methods = [method for method in METHODS if method != "grpo"]  # TRL's trainer
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.add_argument("--layers", type=int, default=2, help="of both models; kernels grow with them")
    parser.add_argument("--no_fused_head", action="store_true")
    parser.add_argument("--lines", action="store_true", help="also where the host syncs are")
    parser.add_argument("--json", action="store_true", help="everything, instead of the table")
    arguments = parser.parse_args()
    os.environ["ACCELERATE_TORCH_DEVICE"] = virtual_device.DEVICE
    virtual_device.install()
    disable_progress_bars()
    torch.set_num_threads(1)
    measured = [measure(method, arguments.layers, not arguments.no_fused_head) for method in arguments.methods]
    if arguments.json:
        print(json.dumps(measured))
        return
    print(table(measured))
    if arguments.lines:
        for figures in measured:
            for what in ("a token", "a micro-batch"):
                lines = Counter(figures.get(f"lines of {what}", {}))
                print(
                    f"\n{figures['method']}, {what}:",
                    *(f"{n:7.4g}  {line}" for line, n in lines.most_common()),
                    sep="\n",
                )


if __name__ == "__main__":
    main()
