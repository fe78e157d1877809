"""Records any two models: the student completes some prompts, and both models score each token."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from ..config.base import TokenSelectiveConfig
from ..data import prepare_for_pair
from ..files import require_empty_dir, wrap_os_errors
from ..models.loading import ModelPair, load_frozen_model, resolve_pair
from ..rollout.hf import make_step, sample_with_step
from ..rollout.seeding import prompt_generator
from ..run.arguments import RunArguments
from ..run.build import load_datasets, set_model_init_kwargs
from ..trainer.forward import HeadForward
from ..trainer.token_records import (
    RecordedCompletion,
    compute_token_records,
    pad_recorded,
    recorded_divergence,
    write_token_records,
)

_BATCH_SIZE = 8


@dataclass
class PairRecord:
    """Two models, and what both predict at each token of the student's completions.

    Attributes:
        training: the run's configuration.
        pair: configurations and tokenizers of the models.
        student, teacher: the models, in eval mode.
        rows: the rows with `index`, `prompt_ids`, `limit` (tokens) and, if the data set has one, `answer`.
        completions: the completion of each row.
        columns: result of `compute_token_records` for all tokens, `[N]` or `[N, K]`.
    """

    training: TokenSelectiveConfig
    pair: ModelPair
    student: PreTrainedModel
    teacher: PreTrainedModel
    rows: Dataset
    completions: list[RecordedCompletion]
    columns: dict[str, Tensor]

    def write(self) -> Path:
        """Write the records. Returns the run's folder. Raises `OutputDirError`."""
        folder = Path(str(self.training.output_dir))
        with wrap_os_errors(folder):
            write_token_records(folder, 0, self.completions, self.columns, self.pair.tokenizer.decode)
        return folder


def record_pair(arguments: RunArguments, limit: int) -> PairRecord:
    """Record the first `limit` prompts of a run's data set. Writes nothing.

    Raises:
        DataError, ModelError, TokenizerMismatchError: as for training.
        OutputDirError: the folder isn't empty, so it may hold the records of a run.
    """
    training = arguments.training_args
    require_empty_dir(Path(str(training.output_dir)))
    rows, _ = load_datasets(arguments.data_args, training)
    rows = rows.select(range(min(limit, len(rows))))
    set_model_init_kwargs(arguments)
    names = str(arguments.model_args.model_name_or_path), str(training.teacher_model_name_or_path)
    pair = resolve_pair(*names, training)
    prepared = prepare_for_pair(rows, pair, training)
    fields = ("model_name_or_path", "teacher_model_name_or_path")
    student, teacher = (
        load_frozen_model(name, training, field, training.device).eval()
        for name, field in zip(names, fields, strict=True)
    )
    stop_token_ids = pair.stop_token_ids()
    head_forward = HeadForward(Accelerator(cpu=training.use_cpu), training, pair.shared_vocab_size)
    step = make_step(student, vocab_size=pair.shared_vocab_size, temperature=training.temperature)
    samples, parts = [], []
    for start in range(0, len(prepared), _BATCH_SIZE):
        some = prepared.select(range(start, min(start + _BATCH_SIZE, len(prepared))))
        generators = [(prompt_generator(training.seed, 0, i),) for i in some["index"]]
        prompts, limits = list(some["prompt_ids"]), list(some["limit"])
        completions = sample_with_step(step, prompts, limits, generators, stop_token_ids=stop_token_ids)
        recorded = [
            RecordedCompletion(row["index"], row["prompt_ids"], c.ids, row.get("teacher_prompt_ids"))
            for row, c in zip(some, completions, strict=True)
        ]
        batch = pad_recorded(recorded, training.device)
        parts.append(compute_token_records(head_forward, student, teacher, batch, recorded_divergence(training)))
        samples += recorded
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return PairRecord(training, pair, student, teacher, prepared, samples, columns)
