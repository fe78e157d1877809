"""Build the demo of `src/tsdkd/demo` from seeds: tokenizer, teacher, student, prompts (about 10 minutes on one core).

    python scripts/dev/build_demo.py                     # build everything, print the accuracies
    python scripts/dev/build_demo.py --evaluate DIR ...  # only print the accuracies, also at temperature 0.6
    python scripts/dev/build_demo.py --control           # the demo's schedule

Teacher and student are pre-trained on sampled solutions of fresh problems, each once. The student's solutions begin
with any of the offered moves. The last quarter of the teacher's prefers moves that are no table, as the solutions of a
better teacher would: standard methods first. The control goes on with the student's pre-training on fresh problems,
with AdamW and the step count and learning rate of a distillation run, so that what a distillation gains beyond it
comes from the teacher.

Runs repeat bit for bit on one machine with one thread; another CPU or torch rounds differently and trains other
weights of similar accuracy.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    get_scheduler,
)

from tsdkd.demo import task
from tsdkd.demo.run_demo import evaluate_demo
from tsdkd.evaluation.problem_set import at_temperature

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message['role'] == 'assistant' %}"
    "{{- '<sol> ' }}{% generation %}{{- message['content'] + ' <eos>' }}{% endgeneration %}"
    "{%- else %}{{- '<user> ' + message['content'] + ' ' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<sol>' }}{%- endif %}"
)
BATCH_SIZE = 128
MUON_LR, ADAMW_LR, WARMUP_STEPS = 0.03, 4e-3, 20
CURATED_TABLE_WEIGHT = 0.1  # of a first move that is a table, against 1
WAVE_SCALE = 0.2  # of the embeddings' initial waves and vectors
WAVE_DECAY = 1.0  # the k-th frequency has an amplitude of k ** -WAVE_DECAY
OWN_SCALE = 1.0  # of a move's own vector, relative to the waves
LAST_NORM = 2.0  # initial weight of the last norm: logits can be large from the start
TRAIN_ROWS, TEST_ROWS, VALID_ROWS = 24_576, 1024, 512
TRAIN_SEED, TEST_SEED, VALID_SEED, CONTROL_SEED = 1, 2, 3, 1000
MAX_POSITIONS = 128
REPORT_TEMPERATURES = (1.0, 0.6)

Row = dict[str, str]


@dataclass(frozen=True)
class Recipe:
    """The size of a model and its pre-training.

    Attributes:
        steps: batches of `BATCH_SIZE` fresh problems.
        curated: share of the steps, at the end, whose solutions prefer moves that are no table.
    """

    hidden: int
    heads: int
    ffn: int
    layers: int
    seed: int
    steps: int
    curated: float = 0.0

    @property
    def rows(self) -> int:
        return self.steps * BATCH_SIZE


RECIPES = {
    "teacher": Recipe(hidden=96, heads=3, ffn=288, layers=3, seed=100, steps=3000, curated=0.25),
    "student": Recipe(hidden=64, heads=2, ffn=192, layers=3, seed=200, steps=1500),
}


def problem_rows(seed: int, split: task.Split, count: int) -> list[Row]:
    """The first `count` problems of a seed, each with one reference solution."""
    return [
        {"prompt": problem.prompt, "answer": problem.prompt, "completion": solution}
        for problem, solution in islice(task.iter_problems(seed, split), count)
    ]


def pretraining_rows(recipe: Recipe) -> Iterator[Row]:
    """The rows a model is pre-trained on, in order, and no others."""
    rng, curated_from = random.Random(recipe.seed), round(recipe.rows * (1 - recipe.curated))
    problems = islice(task.iter_problems(recipe.seed, "train"), recipe.rows)
    for index, (problem, solution) in enumerate(problems):
        if index >= curated_from:
            solution = task.sample_solution(problem, rng, CURATED_TABLE_WEIGHT)
        yield {"prompt": problem.prompt, "completion": solution}


def write_jsonl(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; decoding puts single spaces between the words again."""
    ids = {word: index for index, word in enumerate(task.VOCABULARY)}
    words = Tokenizer(WordLevel(ids, unk_token=task.UNK))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=task.PAD,
        eos_token=task.EOS,
        unk_token=task.UNK,
        additional_special_tokens=[task.USER, task.ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=MAX_POSITIONS,
    )


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    torch.manual_seed(recipe.seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.ffn,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        max_window_layers=recipe.layers,
        sliding_window=None,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Qwen3ForCausalLM(config)
    init_embeddings(model, tokenizer)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return model


@torch.no_grad()
def init_embeddings(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Let cells and moves start as waves of their coordinates and amounts, so that the torus is learned in minutes.

    The first dimensions of a cell hold cosines and sines of x, then of y, at as many of the torus's frequencies as
    fit. A shift or mirror has the waves of its amount in the dimensions of its axis. Every move also gets a random
    vector for its kind and axis, and one of its own, because copying a move requires telling it from the others.
    """
    embeddings, moves = model.get_input_embeddings().weight, list(task.MOVES.values())
    size = embeddings.shape[1]
    frequencies = torch.arange(1, min(size // 6, task.SIDE // 2) + 1).float()
    amplitudes = frequencies**-WAVE_DECAY
    amplitudes /= amplitudes.square().mean().sqrt()
    angles = torch.arange(task.SIDE)[:, None] * frequencies * (2 * torch.pi / task.SIDE)
    waves = WAVE_SCALE * torch.cat([angles.cos() * amplitudes, angles.sin() * amplitudes], 1)  # of each coordinate
    width = waves.shape[1]

    x, y = torch.tensor(list(task.CELLS.values())).T
    cell_ids = tokenizer.convert_tokens_to_ids(list(task.CELLS))
    embeddings[cell_ids, : 2 * width] = torch.cat([waves[x], waves[y]], 1) + 0.1 * embeddings[cell_ids, : 2 * width]

    vectors = OWN_SCALE * WAVE_SCALE * torch.randn(len(moves), size)
    of_kind = {key: WAVE_SCALE * torch.randn(size) for key in dict.fromkeys((m.axis, m.kind) for m in moves)}
    for move, vector in zip(moves, vectors, strict=True):
        vector += of_kind[move.axis, move.kind]
        if move.kind != "table":
            vector[move.axis * width : (move.axis + 1) * width] += waves[move.amount % task.SIDE]
    embeddings[tokenizer.convert_tokens_to_ids(list(task.MOVES))] += vectors
    model.model.norm.weight.fill_(LAST_NORM)


def collate(rows: list[Row], tokenizer: PreTrainedTokenizerFast) -> dict[str, torch.Tensor]:
    """A batch with labels on the completion and its <eos>. All rows have the same length."""
    texts = [f"{task.USER} {row['prompt']} {task.ASSISTANT} {row['completion']} {task.EOS}" for row in rows]
    input_ids = torch.tensor(tokenizer(texts).input_ids)
    labels = input_ids.clone()
    labels[:, : task.PROMPT_TOKENS] = -100
    return {"input_ids": input_ids, "labels": labels}


def muon_and_adamw(model: PreTrainedModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings and norms."""
    named = list(model.named_parameters())
    hidden = [p for name, p in named if p.ndim == 2 and ".layers." in name]
    rest = [p for name, p in named if not (p.ndim == 2 and ".layers." in name)]
    return [
        torch.optim.Muon(hidden, lr=MUON_LR, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=ADAMW_LR, weight_decay=0.0),
    ]


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: Iterator[Row],
    batch_size: int,
    optimizers: list[torch.optim.Optimizer],
    steps: int,
) -> None:
    """Supervised training, each row once, with a cosine schedule."""
    schedules = [get_scheduler("cosine", optimizer, WARMUP_STEPS, steps) for optimizer in optimizers]
    start = time.perf_counter()
    model.train()
    for step in range(1, steps + 1):
        loss = model(**collate(list(islice(rows, batch_size)), tokenizer)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        if step % 100 == 0 or step == steps:
            print(f"  step {step:4d}  loss {loss.item():.4f}  {time.perf_counter() - start:.0f} s", flush=True)


def load(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """What a user loads, in float32, which is faster than bfloat16 on a CPU."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path)


def report(label: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> None:
    found = evaluate_demo(model, tokenizer, rows, REPORT_TEMPERATURES).metrics
    names = ("greedy", *(at_temperature(name, t) for t in REPORT_TEMPERATURES for name in ("avg@8", "pass@8")))
    print(f"{label}: " + "  ".join(f"{name} {found[name]:.1f}" for name in names), flush=True)


def build_data(output_dir: Path) -> None:
    """Write the prompts and prove that no model and no other file has seen a test prompt."""
    test = problem_rows(TEST_SEED, "held_out", TEST_ROWS)
    tested = {row["prompt"] for row in test}
    valid = [row for row in problem_rows(VALID_SEED, "held_out", 2 * VALID_ROWS) if row["prompt"] not in tested]
    train = problem_rows(TRAIN_SEED, "train", TRAIN_ROWS)
    seen = chain(train, valid, *(pretraining_rows(recipe) for recipe in RECIPES.values()))
    assert tested.isdisjoint(row["prompt"] for row in seen)
    write_jsonl(output_dir / "train.jsonl", train)
    write_jsonl(output_dir / "valid.jsonl", valid[:VALID_ROWS])
    write_jsonl(output_dir / "test.jsonl", [{"prompt": row["prompt"], "answer": row["answer"]} for row in test])


def build_pretrained(name: str, output_dir: Path) -> None:
    """Pre-train one model and save it in bfloat16 beside its tokenizer."""
    recipe, tokenizer = RECIPES[name], build_tokenizer()
    model = build_model(recipe, tokenizer)
    print(f"{name}: {model.num_parameters():,} parameters, {recipe.steps} steps", flush=True)
    fit(model, tokenizer, pretraining_rows(recipe), BATCH_SIZE, muon_and_adamw(model), recipe.steps)
    model.to(torch.bfloat16).save_pretrained(output_dir / name)
    tokenizer.save_pretrained(output_dir / name)
    (output_dir / name / "model.safetensors").chmod(0o644)  # safetensors writes it for the owner alone


def control(output_dir: Path, steps: int, batch_size: int, learning_rate: float, seed: int) -> None:
    """Go on with the student's supervised pre-training on fresh problems, and compare before and after."""
    test = read_jsonl(output_dir / "test.jsonl")
    model, tokenizer = load(output_dir / "student")
    report("student before", model, tokenizer, test)
    rows = problem_rows(CONTROL_SEED + seed, "train", steps * batch_size)
    adamw = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    fit(model, tokenizer, iter(rows), batch_size, [adamw], steps)
    with tempfile.TemporaryDirectory() as folder:  # rounded to bfloat16, as the shipped models are
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        report(f"student after {steps} more steps of its own SFT", *load(Path(folder)), test)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parents[2] / "src" / "tsdkd" / "demo")
    parser.add_argument("--only", choices=[*RECIPES, "data"], help="build this part alone")
    parser.add_argument("--evaluate", type=Path, nargs="+", metavar="DIR", help="print accuracies of these models")
    parser.add_argument("--control", action="store_true", help="continue the student's own SFT instead of building")
    parser.add_argument("--steps", type=int, default=300, help="control: optimizer steps")
    parser.add_argument("--batch_size", type=int, default=128, help="control: rows a step")
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="control: peak of the cosine")
    parser.add_argument("--seed", type=int, default=0, help="control: which problems it sees")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    output_dir: Path = arguments.output_dir
    torch.set_num_threads(1)
    if arguments.control:
        control(output_dir, arguments.steps, arguments.batch_size, arguments.learning_rate, arguments.seed)
        return
    folders = arguments.evaluate
    if folders is None:
        output_dir.mkdir(parents=True, exist_ok=True)
        if arguments.only in (None, "data"):
            build_data(output_dir)
        names = [name for name in RECIPES if arguments.only in (None, name)]
        for name in names:
            build_pretrained(name, output_dir)
        folders = [output_dir / name for name in names]
    for folder in folders:
        report(folder.name, *load(folder), read_jsonl(output_dir / "test.jsonl"))


if __name__ == "__main__":
    main()
