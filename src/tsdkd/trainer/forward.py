"""From a model and a micro-batch to the head that an objective asks: the backbone runs, the logits are never whole."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple, TypeVar
from weakref import WeakSet

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.models.utils import _ForwardRedirection

from ..config.base import TokenSelectiveConfig
from ..errors import ModelError
from ..lm_head.dense import DenseHead
from ..lm_head.fused import FusedHead, compute_dtype
from ..lm_head.projection import Projection
from ..lm_head.statistics import Head, StatisticsRequest, TokenStatistics

Output = TypeVar("Output")
_FUSED_HEAD_HINT = "set fused_head: false, which computes whole logits"


class HeadForward:
    """Runs the pair's models, as they are wrapped for training, up to their heads.

    Args:
        accelerator: knows the wrappers and the precision.
        args: fused_head, head_chunk_gib, temperature.
        vocab_size: ids that both models have.
    """

    def __init__(self, accelerator: Accelerator, args: TokenSelectiveConfig, vocab_size: int) -> None:
        self.accelerator, self.args, self.vocab_size = accelerator, args, vocab_size
        self._redirect = _ForwardRedirection()
        self._checked: WeakSet[nn.Module] = WeakSet()

    @torch.no_grad()
    def teacher_forward(self, model: nn.Module, batch: dict[str, Tensor], index: Tensor) -> "TeacherOutput":
        """The teacher's part of a head for `forward`: hidden states or logits at the N positions `index`."""
        if not self.args.fused_head:
            return TeacherOutput(model, self._logits(model, batch, index))
        unwrapped = self.accelerator.unwrap_model(model)
        return TeacherOutput(unwrapped, self._redirect(model, unwrapped, self._hidden, unwrapped, batch, index))

    def forward(
        self,
        model: nn.Module,
        batch: dict[str, Tensor],
        index: Tensor,
        head_fn: Callable[[Head], Output],
        teacher: "TeacherOutput | None" = None,
        loss_in_forward: bool = True,
    ) -> Output:
        """`head_fn` of the head over the model's predictions at N positions.

        Args:
            model: as it is wrapped for training.
            batch: `input_ids` `[B, S]`; `attention_mask` too where padding itself is asked about.
            index: `[N]`, places in the flattened `[B, S - 1]` (`tsdkd.selection.token_index`).
            question: what is asked; its answer is a dataclass, `TokenStatistics` or `ObjectiveOutput`.
            teacher: from `teacher_forward`, where the question is about both.
            loss_in_forward: see `FusedHead`.

        Raises:
            ModelError: the fused head doesn't give the model's own logits.
        """
        if not self.args.fused_head:
            states = None if teacher is None else teacher.states
            return head_fn(DenseHead(self._logits(model, batch, index), states))
        unwrapped = self.accelerator.unwrap_model(model)
        kind: list[type[Output]] = []

        def run_head(hidden: Tensor) -> dict[str, Any]:
            with ExitStack() as stack:
                output = head_fn(self._make_fused_head(stack, unwrapped, hidden, teacher, loss_in_forward))
            kind.append(type(output))
            return vars(output)  # DDP and DeepSpeed look for tensors in plain containers only

        def forward_fn(input_ids: Tensor) -> dict[str, Any]:
            hidden = self._hidden(unwrapped, {**batch, "input_ids": input_ids}, index)
            with self.accelerator.autocast():
                return self._forward_as_output_layer(unwrapped, run_head, hidden)

        # as the wrapper's forward: DDP arms its gradient reduction there. On CUDA it moves what it is given to its
        # device first, and fails where it is given nothing.
        fields = self._redirect(model, unwrapped, forward_fn, batch["input_ids"])
        return kind[0](**fields)

    @torch.no_grad()
    def compute_statistics(
        self, model: nn.Module, batch: dict[str, Tensor], index: Tensor, request: StatisticsRequest
    ) -> TokenStatistics:
        """`request` of a model in eval mode, without gradients; `forward` says what the arguments are."""
        was_training = model.training
        model.eval()
        output = self.forward(model, batch, index, lambda head: head(request))
        model.train(was_training)
        return output

    def _make_fused_head(
        self,
        stack: ExitStack,
        model: PreTrainedModel,
        hidden: Tensor,
        teacher: "TeacherOutput | None",
        loss_in_forward: bool,
    ) -> FusedHead:
        second: tuple[Any, ...] = ()
        if teacher is not None:
            _gather_parameters(stack, _output_layer(teacher.model))
            second = (teacher.states, get_projection(teacher.model))
        return FusedHead(
            hidden,
            get_projection(model),
            *second,
            vocab_size=self.vocab_size,
            temperature=self.args.temperature,
            chunk_gib=self.args.head_chunk_gib,
            loss_in_forward=loss_in_forward,
        )

    def _forward_as_output_layer(
        self, model: PreTrainedModel, function: Callable[[Tensor], Any], hidden: Tensor
    ) -> Any:
        """`function(hidden)` as the forward of the model's output layer: under ZeRO-3 its weight is then gathered,
        here and in the backward pass, and the gradient lands in the shard."""
        layer = _output_layer(model)
        return self._redirect(layer, layer, function, hidden)

    def _logits(self, model: nn.Module, batch: dict[str, Tensor], index: Tensor) -> Tensor:
        """`[N, V]`, over the shared ids, temperature applied."""
        output = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"), use_cache=False)
        logits = _select_positions(index, output.logits)[:, : self.vocab_size]
        return logits if self.args.temperature == 1.0 else logits / self.args.temperature

    def _hidden(self, model: PreTrainedModel, batch: dict[str, Tensor], index: Tensor) -> Tensor:
        """`[N, H]`, the last hidden states."""
        with self.accelerator.autocast():
            if model not in self._checked:
                self._check_logits(model, batch["input_ids"][:1, :8])
                torch.clear_autocast_cache()  # older torches keep casts of weights that were made without a gradient
                self._checked.add(model)
            return _select_positions(index, _forward_backbone(model, batch["input_ids"], batch.get("attention_mask")))

    @torch.no_grad()
    def _check_logits(self, model: PreTrainedModel, ids: Tensor) -> None:
        """Once a model: a head that forgets a scale would train on other distributions, without any error."""
        was_training = model.training
        model.eval()
        expected = model(input_ids=ids, use_cache=False).logits
        try:
            hidden = _forward_backbone(model, ids)
        except (AttributeError, TypeError) as error:
            raise ModelError(
                f"{_class_name(model)}: its backbone gives no last hidden states; {_FUSED_HEAD_HINT}"
            ) from error

        def logits(hidden: Tensor) -> Tensor:
            projection = get_projection(model)
            return projection.slice_vocab(len(projection.weight), dtype).logits(hidden.to(dtype))

        dtype = compute_dtype(hidden)
        found = self._forward_as_output_layer(model, logits, hidden)
        model.train(was_training)
        tolerance = max(1e-3, 16 * torch.finfo(dtype).eps) * float(expected.abs().max())
        same_shape = found.shape == expected.shape
        difference = float((found - expected).abs().max()) if same_shape else float("inf")
        if not difference <= tolerance:
            raise ModelError(
                f"{_class_name(model)}: its logits are not its output layer's (they differ by {difference:.3g}, more than "
                f"{tolerance:.3g}): it does something else with them than a scale or a soft cap; {_FUSED_HEAD_HINT}"
            )


class TeacherOutput(NamedTuple):
    """The teacher's unwrapped model with its hidden states `[N, H]`, or its logits `[N, V]` without the fused head."""

    model: Any
    states: Tensor


def get_projection(model: PreTrainedModel) -> Projection:
    """A model's output layer, with the scale and soft cap that its configuration names."""
    layer, config = _output_layer(model), model.config.get_text_config()
    divisor = getattr(config, "logits_scaling", None)  # Granite; HyperCLOVA X multiplies by it
    if divisor is not None:
        scale = divisor if config.model_type == "hyperclovax" else 1.0 / divisor
    else:
        names = ("logit_scale", "output_multiplier", "lm_head_multiplier")
        scale = next((s for name in names if (s := getattr(config, name, None)) is not None), 1.0)
    return Projection(layer.weight, layer.bias, scale, getattr(config, "final_logit_softcapping", None))


def _output_layer(model: PreTrainedModel) -> Any:
    layer = model.get_output_embeddings()
    copies = getattr(layer, "modules_to_save", None)  # peft's trained copy of a whole layer
    return layer if copies is None else copies[layer.active_adapter]


def _gather_parameters(stack: ExitStack, layer: Any) -> None:
    """A layer's parameters, sharded by ZeRO-3 or not, whole within the stack."""
    sharded = [p for p in (layer.weight, layer.bias) if p is not None and hasattr(p, "ds_status")]
    if sharded:
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus

        # a weight that the embedding shares may be there already, and must stay
        missing = [p for p in sharded if p.ds_status != ZeroParamStatus.AVAILABLE]
        stack.enter_context(GatheredParameters(missing))


def _select_positions(index: Tensor, states: Tensor) -> Tensor:
    """`[N, ...]`: those of `[B, S, ...]` at the places `index` of the flattened `[B, S - 1]`."""
    return states.flatten(0, 1).index_select(0, index + index // (states.shape[1] - 1))


def _forward_backbone(model: Any, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    return (
        _unwrap_peft(model).base_model(input_ids=ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    )


def _unwrap_peft(model: Any) -> Any:
    """Without peft's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _class_name(model: Any) -> str:
    return type(_unwrap_peft(model)).__name__
