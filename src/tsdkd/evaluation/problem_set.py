"""Evaluates a model on problems with known answers: greedy accuracy, avg@k and pass@k."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel

from ..data import completion_mask, pad_sequences
from ..grading import Grader
from ..losses import token_entropy
from ..rollout.base import Completion
from ..rollout.captured import CapturedStep
from ..rollout.hf import make_step, sample_with_step
from ..rollout.seeding import prompt_generator
from .pass_at_k import default_ks, pass_at_k

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
class SampleCounts:
    """The samples of a model at one temperature.

    Attributes:
        num_correct: number of samples that are right, for each problem.
        num_samples: samples per problem.
        mean_length: mean length of the samples, tokens.
    """

    num_correct: list[int]
    num_samples: int
    mean_length: float

    @property
    def metrics(self) -> dict[str, float]:
        """avg@n and pass@k in percent, and `length` in tokens."""
        return {**sampled_accuracies(self.num_correct, self.num_samples), "length": self.mean_length}


@dataclass
class EvalResult(SampleCounts):
    """Which problems a model solved; the inherited attributes are those of the samples at temperature 1.

    Attributes:
        is_greedy_correct: whether the greedy completion is right, for each problem.
        mean_entropy: mean entropy of the next-token distributions along the first sample of each problem, nats.
        by_temperature: the samples at the other temperatures.
    """

    is_greedy_correct: list[bool]
    mean_entropy: float
    by_temperature: dict[float, SampleCounts] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, float]:
        """Accuracies in percent (greedy, avg@n, pass@k), `length` in tokens, `entropy` in nats.

        Those of another temperature than 1 have names such as "avg@8 T=0.6".
        """
        greedy = 100 * sum(self.is_greedy_correct) / len(self.is_greedy_correct)
        others = {
            at_temperature(name, temperature): value
            for temperature, counts in self.by_temperature.items()
            for name, value in counts.metrics.items()
        }
        return {"greedy": greedy, **super().metrics, "entropy": self.mean_entropy, **others}


def at_temperature(metric: str, temperature: float) -> str:
    """The name of a metric of samples at a temperature."""
    return metric if temperature == 1 else f"{metric} T={temperature:g}"


def sampled_accuracies(num_correct: Sequence[int], num_samples: int) -> dict[str, float]:
    """avg@n, and pass@k for the powers of two up to n and for n, in percent. pass@1 equals avg@n.

    Args:
        num_correct: number of right samples of each problem.
        num_samples: n, samples per problem.
    """
    average = 100 * sum(num_correct) / (len(num_correct) * num_samples)
    counts = np.array(num_correct)
    passed = {f"pass@{k}": 100 * float(pass_at_k(counts, num_samples, k).mean()) for k in default_ks(num_samples)}
    return {f"avg@{num_samples}": average, **passed}


def evaluate(
    model: PreTrainedModel,
    problems: ProblemSet,
    num_samples: int = 8,
    batch_size: int = 256,
    temperatures: Sequence[float] = (1.0,),
    top_p: float = 1.0,
) -> EvalResult:
    """Solve every problem once greedily and `num_samples` times at each temperature, from fixed seeds.

    Args:
        model: the model, which is put into eval mode.
        problems: at least one problem.
        num_samples: samples per problem, at least 1.
        batch_size: completions per batch.
        temperatures: temperatures of the samples; 1 is always one of them.
        top_p: probability mass of the samples' nucleus, at every temperature.
    """
    model.eval()
    greedy = make_step(model, vocab_size=problems.vocab_size, is_greedy=True)
    is_greedy_correct = _grade(problems, _sample_completions(greedy, problems, None, batch_size))
    counts, first = _count_correct(model, problems, num_samples, batch_size, 1.0, top_p)
    return EvalResult(
        **vars(counts),
        is_greedy_correct=is_greedy_correct,
        mean_entropy=_mean_entropy(model, problems, first),
        by_temperature={
            t: _count_correct(model, problems, num_samples, batch_size, t, top_p)[0] for t in temperatures if t != 1
        },
    )


def _count_correct(
    model: PreTrainedModel, problems: ProblemSet, num_samples: int, batch_size: int, temperature: float, top_p: float
) -> tuple[SampleCounts, list[Completion]]:
    """The samples at one temperature, and the first completion of each problem."""
    step = make_step(model, vocab_size=problems.vocab_size, temperature=temperature, top_p=top_p)
    num_correct, length = [0] * len(problems.prompts), 0
    first: list[Completion] = []
    for sample_index in range(num_samples):
        completions = _sample_completions(step, problems, sample_index, batch_size)
        graded = _grade(problems, completions)
        num_correct = [count + is_correct for count, is_correct in zip(num_correct, graded, strict=True)]
        length += sum(len(c.ids) for c in completions)
        first = first or completions
    return SampleCounts(num_correct, num_samples, length / (num_samples * len(num_correct))), first


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
