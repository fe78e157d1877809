"""Computes the statistics of a micro-batch's tokens: backbone first, then head, without storing the full logits."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.models.utils import _ForwardRedirection

from ..config.base import TokenSelectiveConfig
from ..data import completion_mask
from ..errors import ModelError
from ..lm_head.dense import DenseHead
from ..lm_head.fused import FusedHead, compute_dtype
from ..lm_head.projection import get_output_layer, get_projection
from ..lm_head.statistics import PerTokenLoss, StatisticsRequest, TokenStatistics
from ..models.loading import unwrap_peft
from ..models.served_teacher import find_client
from ..models.teacher_client import TeacherClient
from ..selection import token_index

_FUSED_HEAD_HINT = "set fused_head: false to compute the full logits"


class HeadForward:
    """Runs forward passes of student and teacher, wrapped for training: input ids -> hidden states -> statistics.

    Args:
        accelerator: unwraps models and provides autocast.
        args: fused_head, head_chunk_gib, temperature.
        vocab_size: number of ids shared by both models.
    """

    def __init__(self, accelerator: Accelerator, args: TokenSelectiveConfig, vocab_size: int) -> None:
        self.accelerator, self.args, self.vocab_size = accelerator, args, vocab_size
        self._verified_models: WeakSet[nn.Module] = WeakSet()

    def forward(
        self,
        model: nn.Module,
        batch: dict[str, Tensor],
        index: Tensor,
        request: StatisticsRequest,
        per_token_loss: PerTokenLoss | None = None,
        teacher: "TeacherOutput | None" = None,
        loss_in_forward: bool = True,
    ) -> TokenStatistics:
        """Compute statistics of a model's predictions at N positions.

        Args:
            model: the model, wrapped for training.
            batch: `input_ids` `[B, S]`; `packed` (`tsdkd.data.pack_sequences`) if the forward pass packs the
                sequences; `attention_mask` if padding positions have statistics.
            index: `[N]`, indices into the flattened `[B, S - 1]` (`tsdkd.selection.token_index`).
            request, per_token_loss: see `Head`.
            teacher: result of `teacher_forward`, if the request needs the teacher.
            loss_in_forward: see `FusedHead`.

        Raises:
            ModelError: the fused head does not reproduce the model's logits.
        """
        if not self.args.fused_head:
            states = None if teacher is None else teacher.states
            return DenseHead(self._logits(model, batch, index), states)(request, per_token_loss)
        unwrapped = self.accelerator.unwrap_model(model)
        call = _HeadCall(unwrapped, teacher, request, per_token_loss, loss_in_forward)
        forward = partial(self._backbone_and_head, call, batch, index)
        return TokenStatistics(**run_as_forward(model, unwrapped, forward, batch["input_ids"]))

    def _backbone_and_head(
        self, call: "_HeadCall", batch: dict[str, Tensor], index: Tensor, input_ids: Tensor
    ) -> dict[str, Any]:
        hidden = self._hidden(call.student, {**batch, "input_ids": input_ids}, index)
        with self.accelerator.autocast():
            return _run_as_output_layer(call.student, partial(self._head, call), hidden)

    def _head(self, call: "_HeadCall", hidden: Tensor) -> dict[str, Any]:
        """Return the statistics as a dictionary, because DDP and DeepSpeed find tensors only in plain containers."""
        with ExitStack() as stack:
            of_teacher: tuple[Any, ...] = ()
            if call.teacher is not None:
                _gather_output_layer(stack, get_output_layer(call.teacher.model))
                of_teacher = (call.teacher.states, get_projection(call.teacher.model))
            head = FusedHead(
                hidden,
                get_projection(call.student),
                *of_teacher,
                vocab_size=self.vocab_size,
                temperature=self.args.temperature,
                chunk_gib=self.args.head_chunk_gib,
                loss_in_forward=call.loss_in_forward,
            )
            return vars(head(call.request, call.per_token_loss))

    @torch.no_grad()
    def teacher_forward(self, model: nn.Module, batch: dict[str, Tensor], index: Tensor) -> "TeacherOutput":
        """Compute the teacher's hidden states or logits at the N positions `index`, for `forward`."""
        if not self.args.fused_head:
            return TeacherOutput(model, self._logits(model, batch, index))
        unwrapped = self.accelerator.unwrap_model(model)
        return TeacherOutput(unwrapped, run_as_forward(model, unwrapped, self._hidden, unwrapped, batch, index))

    @torch.no_grad()
    def compute_statistics(
        self, model: nn.Module, batch: dict[str, Tensor], index: Tensor, request: StatisticsRequest
    ) -> TokenStatistics:
        """Like `forward`, but in eval mode and without gradients."""
        was_training = model.training
        model.eval()
        statistics = self.forward(model, batch, index, request)
        model.train(was_training)
        return statistics

    def _logits(self, model: nn.Module, batch: dict[str, Tensor], index: Tensor) -> Tensor:
        """Compute logits `[N, V]` over the shared ids, temperature applied."""
        output = model(**model_inputs(self.accelerator.unwrap_model(model), batch))
        logits = _select_positions(batch, index, output.logits)[:, : self.vocab_size]
        return logits if self.args.temperature == 1.0 else logits / self.args.temperature

    def _hidden(self, model: PreTrainedModel, batch: dict[str, Tensor], index: Tensor) -> Tensor:
        """Compute the last hidden states `[N, H]`, or get them from the servers that have the model's layers."""
        with self.accelerator.autocast():
            if model not in self._verified_models:
                _verify_output_layer(model, batch["input_ids"][:1, :8])
                torch.clear_autocast_cache()  # older torch versions reuse weight casts made without gradient
                self._verified_models.add(model)
            if (client := find_client(model)) is not None:
                return _served_states(client, batch, index)
            return _select_positions(batch, index, forward_backbone(model, model_inputs(model, batch)))


@dataclass(frozen=True)
class _HeadCall:
    """Arguments of the fused head other than the hidden states; see `HeadForward.forward`."""

    student: PreTrainedModel
    teacher: "TeacherOutput | None"
    request: StatisticsRequest
    per_token_loss: PerTokenLoss | None
    loss_in_forward: bool


class TeacherOutput(NamedTuple):
    """The teacher's unwrapped model and its hidden states `[N, H]`, or its logits `[N, V]` without the fused head."""

    model: Any
    states: Tensor


def run_as_forward(wrapper: nn.Module, module: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """Call `wrapper`, with `function(*args)` in place of the forward of `module`.

    A computation that uses a module's parameters without calling the module must look like its forward to its
    wrappers. DDP prepares its gradient reduction in its own forward, from the returned tensors. DeepSpeed ZeRO-3
    gathers a module's parameters in hooks around its forward, and again in the backward pass. On CUDA, DDP first moves
    its arguments to its device and fails if there are none, so pass at least one tensor.

    Args:
        wrapper: the wrapped module, or the module itself.
        module: the module whose forward is replaced for this call.
        function: the function to run; takes and returns tensors in plain containers.
        args: arguments of `function`.
    """
    return _ForwardRedirection()(wrapper, module, function, *args)


def _run_as_output_layer(model: PreTrainedModel, function: Callable[[Tensor], Any], hidden: Tensor) -> Any:
    """Call `function(hidden)` with the output layer's weight gathered; its gradient goes to the shard."""
    layer = get_output_layer(model)
    return run_as_forward(layer, layer, function, hidden)


@torch.no_grad()
def _verify_output_layer(model: PreTrainedModel, ids: Tensor) -> None:
    """Check the head once per model. Without the check, a missing scale would silently change the distributions."""
    was_training = model.training
    model.eval()
    expected = model(input_ids=ids, use_cache=False).logits
    try:
        hidden = forward_backbone(model, {"input_ids": ids, "use_cache": False})
    except (AttributeError, TypeError) as error:
        raise ModelError(
            f"{class_name(model)}: the backbone does not return the last hidden states; {_FUSED_HEAD_HINT}"
        ) from error
    dtype = compute_dtype(hidden)
    found = _run_as_output_layer(model, partial(_project, model, dtype), hidden)
    model.train(was_training)
    tolerance = max(1e-3, 16 * torch.finfo(dtype).eps) * float(expected.abs().max())
    same_shape = found.shape == expected.shape
    difference = float((found - expected).abs().max()) if same_shape else float("inf")
    if not difference <= tolerance:
        raise ModelError(
            f"{class_name(model)}: the model's logits differ from those of its output layer by {difference:.3g}, "
            f"more than {tolerance:.3g}; the fused head supports only a scale and a soft cap; {_FUSED_HEAD_HINT}"
        )


def _project(model: PreTrainedModel, dtype: torch.dtype, hidden: Tensor) -> Tensor:
    projection = get_projection(model)
    return projection.slice_vocab(len(projection.weight), dtype).logits(hidden.to(dtype))


def _gather_output_layer(stack: ExitStack, layer: Any) -> None:
    """Gather a layer's parameters, if ZeRO-3 shards them, until the stack is closed."""
    sharded = [p for p in (layer.weight, layer.bias) if p is not None and hasattr(p, "ds_status")]
    if sharded:
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus

        # a weight shared with the embedding may already be gathered and must stay gathered
        missing = [p for p in sharded if p.ds_status != ZeroParamStatus.AVAILABLE]
        stack.enter_context(GatheredParameters(missing))


def _select_positions(batch: dict[str, Any], index: Tensor, states: Tensor) -> Tensor:
    """Select the states `[N, ...]` of the positions `index` of the flattened `[B, S - 1]` from a forward pass."""
    row = index // (batch["input_ids"].shape[1] - 1)
    if "packed" in batch:
        starts = batch["packed"]["starts"].index_select(0, row)
        positions = starts + index - row * (batch["input_ids"].shape[1] - 1)
    else:
        positions = index + row
    return states.flatten(0, 1).index_select(0, positions)


def _served_states(client: TeacherClient, batch: dict[str, Any], index: Tensor) -> Tensor:
    """Get the states `[N, H]` of the positions `index` of the flattened `[B, S - 1]` from servers."""
    sequences = _unpad(batch)
    starts, width = torch.tensor([0, *accumulate(map(len, sequences))]), batch["input_ids"].shape[1] - 1
    row, position = (index // width).cpu(), (index % width).cpu()
    states = torch.cat(client.hidden_states(sequences)).index_select(0, starts[row] + position)
    return states.to(index.device, non_blocking=True)


def _unpad(batch: dict[str, Any]) -> list[list[int]]:
    """Return the token ids of a batch's sequences without their padding."""
    lengths = (batch["prompt_lengths"] + batch["completion_lengths"]).tolist()
    return [ids[:length] for ids, length in zip(batch["input_ids"].tolist(), lengths, strict=True)]


def teacher_inputs(batch: dict[str, Any], index: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Return the batch that the teacher reads, and where the N positions `index` are in it.

    They are the student's, unless the teacher's prompts differ (`teacher_chat_template_kwargs`).
    """
    own = batch.get("teacher")
    return (batch, index) if own is None else (own, token_index(completion_mask(own), len(index)))


def get_forward_ids(batch: dict[str, Any]) -> Tensor:
    """Return the token ids as the models read them: `[R, W]` if they are packed, else `[B, S]`."""
    ids: Tensor = batch.get("packed", batch)["input_ids"]
    return ids


def model_inputs(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of a model for a micro-batch.

    A cache would make transformers ignore that positions restart, and sequences of a row would see each other.
    """
    inputs = {"input_ids": get_forward_ids(batch), "use_cache": False}
    if "packed" not in batch:
        return {**inputs, "attention_mask": batch.get("attention_mask")}
    packed = batch["packed"]
    inputs["position_ids"] = packed["position_ids"]
    if uses_flash_attention(unwrap_peft(model).config):  # it would ask the device for these in every layer
        inputs |= {f"cu_seq_lens_{side}": packed["cu_seq_lens"] for side in "qk"}
        inputs |= {f"max_length_{side}": packed["max_length"] for side in "qk"}
    return inputs


def uses_flash_attention(config: Any) -> bool:
    """Whether a model's attention is one of the flash attention kernels, whose cost doesn't depend on row width."""
    return "flash" in str(getattr(config, "_attn_implementation", None))


def forward_backbone(model: Any, inputs: dict[str, Any]) -> Tensor:
    return unwrap_peft(model).base_model(**inputs).last_hidden_state


def class_name(model: Any) -> str:
    """Return the name of a model's class, without PEFT's wrapper."""
    return type(unwrap_peft(model)).__name__
