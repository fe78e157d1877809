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
# of transformers, ours, and torch's checks of arguments, such as an embedding's padding_idx
_READ_ONLY_SHAPES = ("sdpa_attention.py", "categorical.py", "torch/nn/functional.py")


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

    def release(self) -> None:
        """Release the caches of the last call, e.g. because they are about to be replaced."""
        if isinstance(self._capture, _CudaGraph):
            self._capture.inputs = ()

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return the next tokens, ids `[B]`. Arguments: see `DecodingStep.__call__`."""
        capture = {"cpu": _Trace, "cuda": _CudaGraph}.get(inputs[0].device.type)
        # on a CPU, autocast copies the weights for one rollout, and a trace would keep the copies for the next
        if capture is not None and self._can_capture and not torch.is_autocast_enabled("cpu"):
            self._capture = self._capture or capture(self.step)
            try:
                return self._capture(inputs)
            except Exception as error:  # the step itself, below, raises it again if it isn't from the capture
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
        self.num_traced = 0
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
        if len(self.weights) != self.num_traced:  # e.g. an adapter was added
            self.trace = None
        if self.trace is not None and not self.is_first and shape in self.verified_shapes:
            return self._run(inputs)[0]
        expected = None if self.trace is None else self._verify(inputs)
        if expected is None:  # none yet, or the model has changed, e.g. its adapters were merged
            self.trace, self.num_traced, self.verified_shapes = self._make(inputs), len(self.weights), set()
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
    """A CUDA graph. It contains the addresses of the caches, so each new shape and each rollout gets its own.

    It freezes what Python decides, like a trace, so its first logits must be close to those of the step.
    """

    def __init__(self, step: DecodingStep) -> None:
        self.step, self.stream = step, torch.cuda.Stream(step.device)  # one: freed memory is reused only on its stream
        self.start()

    def start(self) -> None:
        """See `CapturedStep`."""
        self.graph: Any = None
        self.outputs: tuple[Tensor, ...] = ()
        self.inputs: tuple[Tensor, ...] = ()
        self.pool = torch.cuda.graph_pool_handle()  # a pool without a graph can't be captured into again

    def __call__(self, inputs: tuple[Tensor, ...]) -> Tensor:
        small, large = inputs[: DecodingStep.NUM_SMALL_INPUTS], inputs[DecodingStep.NUM_SMALL_INPUTS :]
        own = self.inputs[len(small) :]
        with torch.cuda.device(self.step.device):
            if not own or any(x is not y for x, y in zip(large, own, strict=True)):
                return self._make(small, large)
            for mine, new in zip(self.inputs, small, strict=False):
                mine.copy_(new)
            self.graph.replay()
            return self.outputs[0].clone()  # the next replay overwrites them

    def _make(self, small: tuple[Tensor, ...], large: tuple[Tensor, ...]) -> Tensor:
        """Capture a graph for the following tokens; compute this one without it, which also prepares the kernels."""
        self.inputs = (*(x.clone() for x in small), *large)
        current, mode = torch.cuda.current_stream(), torch.cuda.get_sync_debug_mode()
        self.stream.wait_stream(current)
        torch.cuda.set_sync_debug_mode("error")  # a step that synchronizes would leave a broken capture behind
        try:
            with torch.cuda.stream(self.stream):
                expected = self.step(*self.inputs)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        current.wait_stream(self.stream)
        for output in expected:
            output.record_stream(current)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                self.outputs = self.step(*self.inputs)
        except BaseException:
            torch.cuda.set_stream(current)  # torch.cuda.graph does not if the capture can't begin or end
            raise
        self.graph = graph  # the previous one has kept the pool alive until here
        graph.replay()
        for found, logits in zip(self.outputs[1:], expected[1:], strict=True):
            if not (found - logits).abs().max() <= 0.01 * logits.abs().max():
                raise CaptureError("the logits of the CUDA graph differ from those of the models")
        return expected[0]
