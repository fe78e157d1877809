"""Captures a decoding step and replays it, without the time that Python takes between the kernels.

For a small model, or on a GPU, most of a step's time is not computation but launching hundreds of small kernels from
Python. On a CPU, a TorchScript trace launches them; on a GPU, a CUDA graph.
"""

import logging
import warnings
from typing import Any

import torch
from torch import Tensor

from .step import DecodingStep

_logger = logging.getLogger(__name__)
_READ_ONLY_SHAPES = ("transformers/integrations/sdpa_attention.py", "tsdkd/rollout/categorical.py")


class CaptureError(Exception):
    """A step can't be captured, or its capture does not compute the same."""


class CapturedStep:
    """Runs a `DecodingStep`: captured, or as it is where it can't be captured.

    Args:
        step: the step.
    """

    def __init__(self, step: DecodingStep) -> None:
        self.step = step
        self._capture: Any = None
        self._can_capture = True

    def start(self) -> None:
        """Start a rollout, for which the weights may have changed."""
        if self._capture is not None:
            self._capture.start()

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return the next tokens, ids `[B]`. Arguments: see `DecodingStep.__call__`."""
        capture = {"cpu": _Trace, "cuda": _CudaGraph}.get(inputs[0].device.type)
        # on a CPU, autocast copies the weights for one rollout, and a trace would keep the copies for the next
        if capture is not None and self._can_capture and not torch.is_autocast_enabled("cpu"):
            self._capture = self._capture or capture(self.step)
            try:
                return self._capture(inputs)
            except (CaptureError, RuntimeError) as error:
                _logger.info("rollout: decoding without a capture: %s", error)
                self._can_capture, self._capture = False, None
        return self.step(*inputs)[0]


class _Trace:
    """A TorchScript trace. Weights and caches are inputs, so it serves all rollouts and batches.

    A trace freezes what Python decides. Therefore, steps that read a tensor's value in Python are refused, and the
    logits must equal those of the step, bit by bit, at the first token of each rollout and of each new shape.
    """

    def __init__(self, step: DecodingStep) -> None:
        self.step = step
        self.trace: Any = None
        self.verified_shapes: set[torch.Size] = set()
        self.start()

    def start(self) -> None:
        """See `CapturedStep`."""
        # tied weights are in two places
        self.places = [
            (m._parameters, n) for m in self.step.modules for n, p in m._parameters.items() if p is not None
        ]
        self.weights = [parameters[name] for parameters, name in self.places]
        self.is_first = True

    def __call__(self, inputs: tuple[Tensor, ...]) -> Tensor:
        shape = inputs[-1].shape
        if self.trace is not None and not self.is_first and shape in self.verified_shapes:
            return self._run(inputs)[0]
        expected = None if self.trace is None else self._verify(inputs)
        if expected is None:  # none yet, or the model has changed, e.g. its adapters were merged
            self.trace, self.verified_shapes = self._make(inputs), set()
            expected = self._verify(inputs)
        if expected is None:
            raise CaptureError("the logits of the trace differ from those of the models")
        self.is_first = False
        self.verified_shapes.add(shape)
        return expected

    def _verify(self, inputs: tuple[Tensor, ...]) -> Tensor | None:
        """Return the next tokens, or None if the trace computes other logits than the step."""
        found, expected = self._run(inputs), self.step(*inputs)
        same = all(torch.equal(_bits(x), _bits(y)) for x, y in zip(found, expected, strict=True))
        return expected[0] if same else None

    def _run(self, inputs: tuple[Tensor, ...]) -> Any:
        with torch.jit.optimized_execution(False):  # the optimizer would start again for each shape
            return self.trace(*inputs, *self.weights)

    def _make(self, inputs: tuple[Tensor, ...]) -> Any:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trace = torch.jit.trace(self._call_with_weights, (*inputs, *self.weights), check_trace=False)
        for warning in caught:
            if issubclass(warning.category, torch.jit.TracerWarning) and not warning.filename.endswith(
                _READ_ONLY_SHAPES
            ):
                raise CaptureError(f"{warning.filename}:{warning.lineno}: {warning.message}")
        torch._C._jit_pass_cse(trace.graph)  # a trace repeats each computation of a shape
        torch._C._jit_pass_dce(trace.graph)
        return trace

    def _call_with_weights(self, *inputs_and_weights: Tensor) -> tuple[Tensor, ...]:
        weights = inputs_and_weights[len(inputs_and_weights) - len(self.weights) :]
        try:
            self._set_weights(weights)
            return self.step(*inputs_and_weights[: -len(weights)])
        finally:
            self._set_weights(self.weights)

    def _set_weights(self, weights: Any) -> None:
        for (parameters, name), weight in zip(self.places, weights, strict=True):
            parameters[name] = weight


def _bits(x: Tensor) -> Tensor:
    """Return a tensor that equals another one also where both are NaN."""
    return x.view(torch.int32) if x.dtype == torch.float32 else x


class _CudaGraph:
    """A CUDA graph. It contains the addresses of the caches, so each new shape and each rollout gets its own."""

    def __init__(self, step: DecodingStep) -> None:
        self.step, self.pool = step, torch.cuda.graph_pool_handle()
        self.start()

    def start(self) -> None:
        """See `CapturedStep`."""
        self.graph: Any = None
        self.inputs: tuple[Tensor, ...] = ()

    def __call__(self, inputs: tuple[Tensor, ...]) -> Tensor:
        small, large = inputs[: DecodingStep.NUM_SMALL_INPUTS], inputs[DecodingStep.NUM_SMALL_INPUTS :]
        if self.graph is None or any(x is not y for x, y in zip(large, self.inputs[len(small) :], strict=True)):
            return self._make(small, large)
        for own, new in zip(self.inputs, small, strict=False):
            own.copy_(new)
        self.graph.replay()
        return self.ids.clone()  # the next replay overwrites them

    def _make(self, small: tuple[Tensor, ...], large: tuple[Tensor, ...]) -> Tensor:
        """Capture a graph for the following tokens; compute this one without it, which also prepares the kernels."""
        self.graph = None  # free its memory
        self.inputs = (*(x.clone() for x in small), *large)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            ids = self.step(*self.inputs)[0]
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            self.ids = self.step(*self.inputs)[0]
        self.graph = graph
        return ids
