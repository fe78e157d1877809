"""Does a gradient depend on how the batch is split, or a run on where it was interrupted? tsdkd and TRL's trainers.

    python benchmarks/correctness.py

The embedded demo pair, float32, CPU, beta 0.9. The first step's gradient on 8 prompts (micro-batch size x accumulation
steps) against one batch and a float64 loop over the same tokens; models with different numbers of output rows; a run
that a fresh process resumes. Differences of gradients are relative, in the L2 norm. tsdkd samples its own completions,
which don't depend on the split. TRL's do: except for the resumed run, a patched `model.generate` returns those that
tsdkd sampled, so only the normalization of the loss differs. `control` is wrong on purpose: `GKDTrainer` with a mean
of the micro-batches' means, resumed without the random state.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator
from importlib import resources
from itertools import chain, product
from types import SimpleNamespace
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset, disable_progress_bars, load_dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from tsdkd import TSDKDConfig, TSDKDTrainer
from tsdkd.methods import METHODS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl.experimental.gkd import GKDConfig, GKDTrainer

disable_progress_bars()
transformers.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()
DEMO = resources.files("tsdkd").joinpath("demo")
STUDENT, TEACHER = str(DEMO.joinpath("student")), str(DEMO.joinpath("teacher"))
BETA, LIMIT, PROMPTS, PAD = 0.9, 64, 8, 0
LMBDAS = {0.0: "data set's completions", 1.0: "own completions"}
ROWS = load_dataset("json", data_files=str(DEMO.joinpath("train.jsonl")), split="train").select(range(64))
RESUMES = {"first epoch": (32, 4, 2), "second epoch": (24, 6, 4)}  # prompts, steps, the checkpoint that is resumed
QUIET = {"disable_tqdm": True, "report_to": "none", "logging_strategy": "no"}
FLOAT32 = {**QUIET, "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
COMMON: dict[str, Any] = {**FLOAT32, "beta": BETA, "temperature": 1.0, "seed": 1, "learning_rate": 1e-4}
Gradients = dict[str, Tensor]
Cell = tuple[str, str, str | float]  # row, trainer, value
Sequences = list[tuple[list[int], list[int]]]  # prompt and completion ids


class MeanOfMeans(GKDTrainer):
    """Wrong on purpose: a token's weight depends on the micro-batch that it is in."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        return super().compute_loss(model, inputs, return_outputs) / self.current_gradient_accumulation_steps


TRAINERS: dict[str, tuple[Any, Any]] = {
    "tsdkd, gkd": (METHODS["gkd"], METHODS["gkd"].config_class),
    "tsdkd, tsd-kd": (TSDKDTrainer, TSDKDConfig),
    "GKDTrainer": (GKDTrainer, GKDConfig),
    "DistillationTrainer": (DistillationTrainer, DistillationConfig),
    "control": (MeanOfMeans, GKDConfig),
}
CASES: list[tuple[str, float, dict[str, Any]]] = [
    *((name, lmbda, {}) for name, lmbda in product(TRAINERS, LMBDAS) if (name, lmbda) != ("DistillationTrainer", 0)),
    *(("GKDTrainer", lmbda, {"average_tokens_across_devices": False}) for lmbda in LMBDAS),
]  # DistillationTrainer always samples


class Recorder(TrainerCallback):
    """The first step's gradient, as the optimizer gets it."""

    gradients: Gradients

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def load(name: str, padding: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A model of the pair, with `padding` random rows after those of its vocabulary."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    if padding:
        size = model.config.vocab_size
        model.resize_token_embeddings(size + padding, mean_resizing=False)
        torch.manual_seed(0)
        with torch.no_grad():  # words that no tokenizer knows, as likely as the others
            for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
                weight[size:] = weight[torch.randint(size, (padding,))] + 0.1 * torch.randn(padding, weight.shape[1])
    return model


def data(name: str, rows: Dataset) -> Dataset:
    """The same rows in the trainer's format."""
    if name.startswith("tsdkd"):
        return rows.select_columns(["prompt", "completion"])
    chats = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    if name == "DistillationTrainer":
        return Dataset.from_dict({"prompt": chats})
    answers = [[{"role": "assistant", "content": row["completion"]}] for row in rows]
    return Dataset.from_dict({"messages": [c + a for c, a in zip(chats, answers, strict=True)]})


def make(
    name: str, rows: Dataset, folder: str, *, lmbda: float = 1.0, padding: tuple[int, int] = (0, 0), **options: Any
) -> Any:
    """A trainer with its normal settings but for `COMMON` and `options`."""
    trainer_class, config_class = TRAINERS[name]
    limits = {"max_new_tokens": LIMIT, "max_length": 128, "lmbda": lmbda}
    if config_class is DistillationConfig:
        limits = {"max_completion_length": LIMIT}
    trainer = trainer_class(
        model=load(STUDENT, padding[0]),
        teacher_model=load(TEACHER, padding[1]),
        args=config_class(output_dir=folder, **COMMON, **limits, **options),
        train_dataset=data(name, rows),
        processing_class=AutoTokenizer.from_pretrained(STUDENT),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def answer_with(model: Any, sequences: Sequences) -> None:
    """Patch `model.generate`, of which TRL's trainers make their completions, to return these."""
    known = {tuple(prompt): completion for prompt, completion in sequences}

    def generate(input_ids: Tensor, attention_mask: Tensor, return_dict_in_generate: bool = False, **_: Any) -> Any:
        pairs = zip(input_ids, attention_mask, strict=True)
        completions = [torch.tensor(known[tuple(ids[mask == 1].tolist())]) for ids, mask in pairs]
        found = torch.cat([input_ids, pad_sequence(completions, batch_first=True, padding_value=PAD)], dim=1)
        return SimpleNamespace(sequences=found) if return_dict_in_generate else found

    model.generate = generate


def first_gradient(
    name: str, rows: Dataset, sampled: Sequences, batch: int, accumulate: int, lmbda: float, **options: Any
) -> Gradients:
    """Of a step with `batch * accumulate` prompts a process; `sampled` are TRL's completions."""
    with tempfile.TemporaryDirectory() as folder:
        options |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate, "max_steps": 1}
        trainer = make(name, rows, folder, lmbda=lmbda, **options, save_strategy="no", max_grad_norm=0.0)
        if "tsdkd" not in name:
            answer_with(trainer.model, sampled)
        trainer.add_callback(recorder := Recorder())
        trainer.train()
        return recorder.gradients


def difference(found: Gradients, expected: Gradients) -> float:
    """Relative, in the L2 norm; rows that only one of them has count as zeros in the other."""
    square = norm = 0.0
    for name, b in expected.items():
        a, b = found[name].double(), b.double()
        if a.shape != b.shape:
            a, b = (torch.cat([x, x.new_zeros(max(len(a), len(b)) - len(x), *x.shape[1:])]) for x in (a, b))
        square, norm = square + float((a - b).square().sum()), norm + float(b.square().sum())
    return (square / norm) ** 0.5


def reference(sequences: Sequences, per_token: bool) -> Gradients:
    """Of a plain JSD, in float64, one completion after the other: a mean over all tokens, or of completions' means."""
    student, teacher = (load(name, dtype=torch.float64) for name in (STUDENT, TEACHER))
    total = sum(len(completion) for _, completion in sequences)
    for prompt, completion in sequences:
        ids, part = torch.tensor([prompt + completion]), slice(len(prompt) - 1, -1)
        q = student(ids).logits[0, part].log_softmax(-1)
        with torch.no_grad():
            p = teacher(ids).logits[0, part].log_softmax(-1)
        m = (BETA * p.exp() + (1 - BETA) * q.exp()).log()
        loss = (BETA * p.exp() * (p - m) + (1 - BETA) * q.exp() * (q - m)).sum()
        (loss / (total if per_token else len(completion) * len(sequences))).backward()
    return {name: p.grad for name, p in student.named_parameters()}


def sequences(rows: Dataset) -> tuple[Sequences, Sequences]:
    """Prompts with the data set's completions, and with those that tsdkd samples in the first step."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make("tsdkd, gkd", rows, folder)
        prompts, own = (list(trainer.train_dataset[column]) for column in ("prompt_ids", "completion_ids"))
        keys = [(trainer.args.seed, 0, i) for i in range(PROMPTS)]
        found = trainer.sampler.generate(trainer.model, prompts, [LIMIT] * PROMPTS, keys)
    return list(zip(prompts, own, strict=True)), list(zip(prompts, (c.ids for c in found), strict=True))


def eight_rows() -> Dataset:
    """Completions of very different lengths: every second one is the answer alone, without the way to it."""
    by_length = sorted(range(len(ROWS)), key=lambda i: len(ROWS[i]["completion"]))
    rows = ROWS.select(by_length[:: len(ROWS) // PROMPTS])
    short = ["answer " + row["answer"] if i % 2 else row["completion"] for i, row in enumerate(rows)]
    return rows.remove_columns("completion").add_column("completion", short)


def splits(rows: Dataset, own: Sequences, sampled: Sequences, folder: str) -> Iterator[Cell]:
    """How the batch is split."""
    torch.save(sampled, f"{folder}/sampled")
    two_processes = iter(this("processes", folder))
    for name, lmbda, options in CASES:
        title, trained_on = LMBDAS[lmbda], sampled if lmbda else own
        whole = first_gradient(name, rows, sampled, PROMPTS, 1, lmbda)
        divided = difference(next(two_processes), whole)
        if options:
            yield f"{title}: 2 processes x 4, `average_tokens_across_devices=False`", name, divided
            continue
        if name != "tsdkd, tsd-kd":  # a plain JSD
            exact = reference(trained_on, per_token="tsdkd" not in name)
            yield f"{title}: 8 x 1 against float64", name, difference(whole, exact)
        for batch, accumulate in ((1, 8), (2, 4)):
            found = first_gradient(name, rows, sampled, batch, accumulate, lmbda)
            yield f"{title}: {batch} x {accumulate} against 8 x 1", name, difference(found, whole)
        yield f"{title}: 2 processes x 4 against 8 x 1", name, divided


def padded(rows: Dataset, sampled: Sequences) -> Iterator[Cell]:
    """The gradient of a pair with surplus rows against that of the pair without: the larger of two differences."""
    for name, (model, padding) in product(TRAINERS, {"student": (64, 0), "teacher": (0, 64)}.items()):
        row, batch = f"64 surplus rows in the {model}", (rows, sampled, PROMPTS, 1)
        try:
            found = [first_gradient(name, *batch, lmbda, padding=padding) for lmbda in LMBDAS]
            yield row, name, max(map(difference, found, (first_gradient(name, *batch, lmbda) for lmbda in LMBDAS)))
        except ValueError as error:
            yield row, name, "refused" if "vocab_size" in str(error) else str(error)


def run(name: str, case: str, folder: str, checkpoint: str | None) -> Tensor:
    """All weights at the end of a run, from the start or from its checkpoint."""
    prompts, steps, _ = RESUMES[case]
    split: dict[str, Any] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = make(name, ROWS.select(range(prompts)), folder, **split, save_steps=2, max_steps=steps)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == steps
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def resumed() -> Iterator[Cell]:
    """Whether a fresh process comes to the same weights as the run that wasn't interrupted."""
    for name, case in product(TRAINERS, RESUMES):
        with tempfile.TemporaryDirectory() as folder:
            whole, part, checkpoint = f"{folder}/whole", f"{folder}/part", f"checkpoint-{RESUMES[case][2]}"
            expected = run(name, case, whole, None)
            shutil.copytree(f"{whole}/{checkpoint}", f"{part}/{checkpoint}")
            if name == "control":
                os.remove(f"{part}/{checkpoint}/rng_state.pth")
            found = this("resume", folder, name, case, part, f"{part}/{checkpoint}")
            largest = float((found - expected).abs().max())
            yield f"resumed in the {case}: weights", name, "bitwise" if largest == 0 else f"**max. {largest:.1e}**"


def this(what: str, folder: str, *arguments: str) -> Any:
    """What this file finds in a fresh process, or in two."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if what == "processes" else []
    command = [sys.executable, *launcher, __file__, "--worker", what, folder, *arguments]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return torch.load(f"{folder}/found")


def work(what: str, folder: str, *arguments: str) -> None:
    """The other side of `this`."""
    if what == "resume":
        torch.save(run(*arguments), f"{folder}/found")
        return
    half = eight_rows(), torch.load(f"{folder}/sampled"), PROMPTS // 2, 1
    found = [first_gradient(name, *half, lmbda, **options) for name, lmbda, options in CASES]
    if os.environ["RANK"] == "0":
        torch.save(found, f"{folder}/found")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    if worker := parser.parse_args().worker:
        work(*worker)
        return
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}")
    rows = eight_rows()
    own, sampled = sequences(rows)
    lengths = [[len(completion) for _, completion in completions] for completions in (own, sampled)]
    print(f"tokens of the completions: {lengths[0]} in the data set, {lengths[1]} sampled\n")
    table: dict[str, dict[str, str]] = defaultdict(dict)
    with tempfile.TemporaryDirectory() as folder:
        for row, name, cell in chain(splits(rows, own, sampled, folder), padded(rows, sampled), resumed()):
            table[row][name] = cell if isinstance(cell, str) else f"{cell:.1e}" if cell < 1e-4 else f"**{cell:.2f}**"
    print(f"| | {' | '.join(TRAINERS)} |\n|{'---|' * (1 + len(TRAINERS))}")
    for row, cells in table.items():
        print(f"| {row} | {' | '.join(cells.get(name, '') for name in TRAINERS)} |")


if __name__ == "__main__":
    main()
