"""Evaluates a model on problems with known answers: greedy accuracy, avg@k and pass@k."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from ..data import completion_mask, pad_sequences
from ..grading import Grader
from ..losses import token_entropy
from ..rollout.base import Completion
from ..rollout.captured import CapturedStep
from ..rollout.hf import make_step, sample_with_step
from ..rollout.seeding import prompt_generator

_LOGITS_GIB = 0.5  # GiB of logits per batch, for the entropy


@dataclass
class ProblemSet:
    """Prompts with answers, and how completions are sampled and graded.

    Attributes:
        prompts: token ids.
        answers: the right answers.
        limits: maximum length of each completion, tokens.
        stop_token_ids: tokens that end a completion.
        vocab_size: only ids below it are sampled.
        decode: converts token ids to text.
        grader: says whether a completion is right.
    """

    prompts: Sequence[list[int]]
    answers: Sequence[str]
    limits: Sequence[int]
    stop_token_ids: Collection[int]
    vocab_size: int
    decode: Callable[[list[int]], str]
    grader: Grader = field(default_factory=Grader)


@dataclass
class EvalResult:
    """Which problems a model solved.

    Attributes:
        is_greedy_correct: whether the greedy completion is right, for each problem.
        num_correct: number of samples that are right, for each problem.
        num_samples: samples per problem.
        mean_length: mean length of the samples, tokens.
        mean_entropy: mean entropy of the next-token distributions along the first sample of each problem, nats.
    """

    is_greedy_correct: list[bool]
    num_correct: list[int]
    num_samples: int
    mean_length: float
    mean_entropy: float

    @property
    def metrics(self) -> dict[str, float]:
        """Accuracies in percent (greedy, avg@n, pass@n), `length` in tokens, `entropy` in nats."""
        count = len(self.is_greedy_correct)
        return {
            "greedy": 100 * sum(self.is_greedy_correct) / count,
            f"avg@{self.num_samples}": 100 * sum(self.num_correct) / (count * self.num_samples),
            f"pass@{self.num_samples}": 100 * sum(n > 0 for n in self.num_correct) / count,
            "length": self.mean_length,
            "entropy": self.mean_entropy,
        }


def evaluate(model: PreTrainedModel, problems: ProblemSet, num_samples: int = 8, batch_size: int = 256) -> EvalResult:
    """Solve every problem once greedily and `num_samples` times at temperature 1, from fixed seeds.

    Args:
        model: the model, which is put into eval mode.
        problems: at least one problem.
        num_samples: samples per problem, at least 1.
        batch_size: completions per batch.
    """
    model.eval()
    greedy, step = (make_step(model, vocab_size=problems.vocab_size, is_greedy=g) for g in (True, False))
    is_greedy_correct = _grade(problems, _sample_completions(greedy, problems, None, batch_size))
    sampled = [_sample_completions(step, problems, sample_index, batch_size) for sample_index in range(num_samples)]
    num_correct = [sum(column) for column in zip(*(_grade(problems, some) for some in sampled), strict=True)]
    lengths = [len(c.ids) for some in sampled for c in some]
    return EvalResult(
        is_greedy_correct,
        num_correct,
        num_samples,
        sum(lengths) / len(lengths),
        _mean_entropy(model, problems, sampled[0]),
    )


def _sample_completions(
    step: CapturedStep, problems: ProblemSet, sample_index: int | None, batch_size: int
) -> list[Completion]:
    """One completion per problem; greedy if `sample_index` is None. Samples don't depend on the batch."""
    completions: list[Completion] = []
    for start in range(0, len(problems.prompts), batch_size):
        indices = range(start, min(start + batch_size, len(problems.prompts)))
        completions += sample_with_step(
            step,
            [problems.prompts[i] for i in indices],
            [problems.limits[i] for i in indices],
            None if sample_index is None else [(prompt_generator(0, sample_index, i),) for i in indices],
            stop_token_ids=problems.stop_token_ids,
        )
    return completions


def _grade(problems: ProblemSet, completions: Sequence[Completion]) -> list[bool]:
    texts = (problems.decode(c.ids) for c in completions)
    graded = enumerate(zip(texts, problems.answers, strict=True))
    return [problems.grader(text, str(answer), row) for row, (text, answer) in graded]


@torch.no_grad()
def _mean_entropy(model: PreTrainedModel, problems: ProblemSet, completions: Sequence[Completion]) -> float:
    total, count, start = 0.0, 0, 0
    longest = max(len(p) + len(c.ids) for p, c in zip(problems.prompts, completions, strict=True))
    size = max(1, int(_LOGITS_GIB * 2**30 / (4 * longest * problems.vocab_size)))
    while start < len(completions):
        some = slice(start, start + size)
        batch = pad_sequences(problems.prompts[some], [c.ids for c in completions[some]])
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        entropies = token_entropy(logits[:, :-1][completion_mask(batch)][:, : problems.vocab_size])
        total, count, start = total + float(entropies.double().sum()), count + len(entropies), start + size
    return total / max(count, 1)
