"""Accuracy of a model on the demo task: greedy, the average sample, and the best of eight."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models import stop_token_ids
from ..rollout import prompt_generator
from ..rollout.hf import sample
from . import task

SAMPLES = 8


@dataclass
class Accuracy:
    """Percent of the problems solved.

    Attributes:
        greedy: by the greedy completion.
        avg: by the average of eight samples at temperature 1.
        best: by at least one of the eight.
    """

    greedy: float
    avg: float
    best: float


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, str]]) -> Accuracy:
    """Solve every row (`prompt`, `answer`) once greedily and eight times by sampling, from fixed seeds."""
    model.eval()
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, return_dict=False
        )
        for row in rows
    ]
    limit = task.MAX_COMPLETION_TOKENS + 10

    def solved(repeat: int | None) -> list[bool]:
        generators = None if repeat is None else [prompt_generator(0, repeat, i) for i in range(len(rows))]
        completions = sample(
            model,
            prompts,
            [limit] * len(prompts),
            generators,
            stop_ids=stop_token_ids(tokenizer, model.generation_config),
            vocab_size=model.config.vocab_size,
        )
        texts = [tokenizer.decode(c.ids, skip_special_tokens=True) for c in completions]
        return [task.is_correct(text, row["answer"]) for text, row in zip(texts, rows, strict=True)]

    samples = [solved(repeat) for repeat in range(SAMPLES)]
    share = 100 / len(rows)
    return Accuracy(
        greedy=share * sum(solved(None)),
        avg=share * sum(map(sum, samples)) / SAMPLES,
        best=share * sum(map(any, zip(*samples, strict=True))),
    )
