"""Records statistics of both models at each token of some completions, for analyses and reports.

Writes one Parquet file per recorded step.

Only the models' statistics are stored. `tsdkd.analysis` derives quantities of a method (opener, gate, selected tokens,
ranking) from them and the method's options.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from ..config.base import TokenSelectiveConfig
from ..data import completion_mask, pad_sequences, target_ids
from ..files import atomic_path
from ..lm_head.statistics import StatisticsRequest
from ..losses import Divergence, forward_kl_on, jsd
from ..selection import token_index
from .forward import HeadForward, teacher_inputs

RECORDS_DIR = "records"
NUM_CANDIDATES = 10  # top tokens of the student, recorded with the teacher's log-probabilities
MASS_TOP_K = (1, 2, 4, 8, 16, 32, 64)  # numbers of top teacher tokens whose probability mass is recorded
FORWARD_KL_TOP_K = 16
_DEFAULT_BETA = 0.9  # TSD-KD's


@dataclass
class RecordedCompletion:
    """A completion to record.

    Attributes:
        index: index of its row in the data set.
        prompt, completion: token ids.
        teacher_prompt: the teacher's prompt, if it differs.
    """

    index: int
    prompt: list[int]
    completion: list[int]
    teacher_prompt: list[int] | None = None


def pad_recorded(samples: Sequence[RecordedCompletion], device: torch.device) -> dict[str, Any]:
    """Pad completions to a batch for `compute_token_records`."""
    completions = [s.completion for s in samples]
    batch: dict[str, Any] = pad_sequences([s.prompt for s in samples], completions)
    teacher_prompts = [s.teacher_prompt for s in samples if s.teacher_prompt is not None]
    if teacher_prompts:
        batch["teacher"] = pad_sequences(teacher_prompts, completions)
    return send_to_device(batch, device)


def recorded_divergence(args: TokenSelectiveConfig) -> Divergence:
    """Return the generalized JSD to record: that of the method, or TSD-KD's if the method has none.

    Every configuration inherits `beta` from TRL, but it is used only if `has_jsd` is true.
    """
    return jsd(args.beta if args.has_jsd else _DEFAULT_BETA)


@torch.no_grad()
def compute_token_records(
    head_forward: HeadForward, student: nn.Module, teacher: nn.Module, batch: dict[str, Any], divergence: Divergence
) -> dict[str, Tensor]:
    """Compute statistics of both models at the N completion tokens of a batch; returns them on the CPU.

    Args:
        head_forward: runs the forward passes.
        student, teacher: the models, wrapped for training.
        batch: a batch from `pad_recorded`.
        divergence: the divergence to record.

    Returns:
        Columns `[N]` or `[N, K]`; entropies, log-probabilities and divergences in nats.
    """
    index = token_index(completion_mask(batch))
    sampled = target_ids(batch, index).unsqueeze(-1)
    was_training = student.training
    student.eval()
    both = StatisticsRequest(
        entropy=True, teacher_entropy=True, divergence=divergence, top_k=NUM_CANDIDATES, ids=sampled
    )
    of_teacher = teacher_inputs(batch, index)
    student_statistics = head_forward.forward(
        student, batch, index, both, teacher=head_forward.teacher_forward(teacher, *of_teacher)
    )
    ids = torch.cat([sampled, student_statistics.topk_ids], dim=-1)
    teacher_statistics = head_forward.compute_statistics(
        teacher, *of_teacher, StatisticsRequest(top_k=MASS_TOP_K[-1], ids=ids)
    )
    top = teacher_statistics.topk_ids[:, :FORWARD_KL_TOP_K]
    student_logps_at_teacher_topk = head_forward.compute_statistics(
        student, batch, index, StatisticsRequest(ids=top)
    ).logps
    student.train(was_training)
    masses = teacher_statistics.topk_logps.exp().cumsum(-1)
    columns = {
        "token": sampled[:, 0],
        "student_entropy": student_statistics.entropy,
        "teacher_entropy": student_statistics.teacher_entropy,
        "student_logp": student_statistics.logps[:, 0],
        "teacher_logp": teacher_statistics.logps[:, 0],
        "divergence": student_statistics.divergence,
        "forward_kl": forward_kl_on(
            student_logps_at_teacher_topk, teacher_statistics.topk_logps[:, :FORWARD_KL_TOP_K]
        ),
        "candidates": student_statistics.topk_ids,
        "candidate_logps": student_statistics.topk_logps,
        "candidate_teacher_logps": teacher_statistics.logps[:, 1:],
        "teacher_mass": torch.stack([masses[:, min(k, masses.shape[1]) - 1] for k in MASS_TOP_K], dim=-1),
    }
    return {name: values.detach().cpu() for name, values in columns.items()}


def write_token_records(
    folder: Path, step: int, samples: Sequence[RecordedCompletion], columns: dict[str, Tensor], decode: Any
) -> Path:
    """Write the file of a step atomically.

    Args:
        folder: the run's output directory.
        step: number of completed optimizer steps.
        samples: the completions, in the order of their tokens in `columns`.
        columns: result of `compute_token_records`.
        decode: token ids -> text.
    """
    lengths = [len(sample.completion) for sample in samples]
    order = {
        "sample": [i for i, n in enumerate(lengths) for _ in range(n)],
        "position": [t for n in lengths for t in range(n)],
    }
    arrays = {name: pa.array(values, pa.int32()) for name, values in order.items()}
    arrays |= {name: _to_arrow(values) for name, values in columns.items()}
    ids = {i for sample in samples for i in (*sample.prompt, *sample.completion)}
    ids |= set(columns["candidates"].flatten().tolist())
    metadata = {
        "step": step,
        "samples": [{"index": s.index, "prompt": s.prompt} for s in samples],
        "texts": {i: decode_in_context(i, decode) for i in sorted(ids)},  # so that readers don't need the tokenizer
    }
    table = pa.table(arrays).replace_schema_metadata({"tsdkd": json.dumps(metadata)})
    path = folder / RECORDS_DIR / f"step-{step:08d}.parquet"
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        pq.write_table(table, file, compression="zstd")
    return path


def decode_in_context(token: int, decode: Callable[[list[int]], str]) -> str:
    """Decode a token as within a sentence, because many tokenizers drop the space before the first token."""
    return decode([token, token])[len(decode([token])) :]


class TokenRecorder:
    """Records tokens during training.

    All processes run the forward passes, because sharded models need them; the main process writes.

    Args:
        head_forward: runs the forward passes.
        args: record_steps, record_completions, output_dir.
        decode: token ids -> text.
    """

    def __init__(
        self, head_forward: HeadForward, args: TokenSelectiveConfig, decode: Callable[[list[int]], str]
    ) -> None:
        self.head_forward, self.args, self.decode = head_forward, args, decode
        self._next = 0

    def is_due(self, step: int, mode: str) -> bool:
        """Whether to record the rollout of this step: the first rollout in every `record_steps` steps."""
        return mode == "train" and self.args.record_steps > 0 and step >= self._next

    def record(self, student: nn.Module, teacher: nn.Module, samples: Sequence[RecordedCompletion], step: int) -> None:
        """Score some of this process's completions with both models and write the records."""
        self._next = (step // self.args.record_steps + 1) * self.args.record_steps
        chosen = samples[: self.args.record_completions]
        batch = pad_recorded(chosen, self.head_forward.accelerator.device)
        columns = compute_token_records(self.head_forward, student, teacher, batch, recorded_divergence(self.args))
        if self.head_forward.accelerator.is_main_process:
            write_token_records(Path(str(self.args.output_dir)), step, chosen, columns, self.decode)


def _to_arrow(values: Tensor) -> pa.Array:
    """Convert ids to int32, and other values to float32, or float16 in fixed-size lists if that is precise enough."""
    dtype = pa.float32() if values.is_floating_point() else pa.int32()
    numbers = values.float() if values.is_floating_point() else values.int()
    if values.ndim == 1:
        return pa.array(numbers.numpy(), dtype)
    if values.is_floating_point():
        dtype, numbers = pa.float16(), numbers.half()
    return pa.FixedSizeListArray.from_arrays(pa.array(numbers.flatten().numpy(), dtype), values.shape[1])
