"""A device that isn't there: its tensors say `virtual:0`, refuse to meet CPU tensors as CUDA's do, and are counted.

    import virtual_device
    virtual_device.install()  # for the rest of the process, and only once
    with virtual_device.counted() as counts:
        ...  # ACCELERATE_TORCH_DEVICE=virtual:0 makes it accelerate's and Trainer's device

What is computed is computed on the CPU. Mixing raises where CUDA raises: a CPU tensor of no dimensions may take part,
a CPU index in brackets is moved (and counted), a generator must be the device's own. Counted are kernels (operations
that launch one on CUDA, fused attention as one), the bytes that they read and write, how often the host waits for the
device (where `torch.cuda.set_sync_debug_mode` would warn: also at a blocking copy from the host), and the bytes moved
between the two. Triton kernels run in Triton's interpreter. The launch counts as one kernel; the bytes are those that
its loads and stores address.

It can't see DDP, NCCL, DeepSpeed, `device.type == "cuda"` branches, vLLM, streams, memory, nor how long anything
takes.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported
from transformers import PreTrainedModel, training_args
from triton.runtime import interpreter

import triton_interpreter
from tsdkd.lm_head import triton_kernels
from tsdkd.run import arguments

NAME = "virtual"
DEVICE = f"{NAME}:0"
_PACKAGE = "/tsdkd/"
aten = torch.ops.aten
_FREE = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten._unsafe_view}
_FREE |= {aten.lift_fresh, aten.detach, aten.alias, aten._local_scalar_dense, aten.set_, aten.sym_size}
_WAITING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.bincount, aten._unique2}
_WAITING |= {aten.unique_dim, aten.unique_consecutive, aten.repeat_interleave}
_INDEXING = {aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_}
# of an input only as much is read as comes out
_PICKING = {aten.index, aten.gather, aten.index_select, aten.embedding, aten.take_along_dim}
_PLACING = {aten.index_put_, aten.scatter_, aten.scatter_add_, aten.index_add_, aten.index_fill_}
_OVERWRITING = {aten.copy_, aten.fill_, aten.zero_, aten.uniform_, aten.normal_}
# of CUDA's lists those that language models and this package use
_LOWERED = ["mm", "bmm", "addmm", "baddbmm", "matmul", "linear", "linalg_vecdot", "scaled_dot_product_attention"]
_RAISED = ["exp", "log", "log1p", "rsqrt", "softmax.int", "log_softmax.int", "cumsum", "sum", "sum.dim_IntList"]


@dataclass
class Counts:
    """What happened while it was open. Lines are `file:line` of this package, with the caller below it in brackets."""

    kernels: int = 0
    bytes: int = 0
    moved: int = 0
    lines: Counter[str] = field(default_factory=Counter)

    @property
    def syncs(self) -> int:
        """How often the host waited."""
        return sum(self.lines.values())


_open: list[Counts] = []


@contextmanager
def counted(into: Counts | None = None) -> Iterator[Counts]:
    """Count what runs inside, in whatever thread."""
    counts = Counts() if into is None else into  # or forgotten
    _open.append(counts)
    try:
        yield counts
    finally:
        _open.remove(counts)


@contextmanager
def uncounted() -> Iterator[None]:
    """Count nothing inside."""
    counting, _open[:] = list(_open), []
    try:
        yield
    finally:
        _open[:] = counting


class VirtualTensor(Tensor):
    """Wraps `raw`, a CPU tensor."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> "VirtualTensor":
        layout = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "dtype": raw.dtype}
        made = Tensor._make_wrapper_subclass(cls, raw.size(), device=DEVICE, **layout)
        made.raw = raw
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy")

    __array__ = numpy

    def __repr__(self) -> str:
        return f"{self.raw!r} on {DEVICE}"


class _Everywhere(TorchDispatchMode):
    """Sees the factories, which have no tensor to tell them the device."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, args, kwargs or {})


def _run(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    leaves = tree_leaves((args, kwargs))
    ours = [x for x in leaves if isinstance(x, VirtualTensor)]
    asked = kwargs.get("device")
    asked = None if asked is None else torch.device(asked).type
    if not ours and asked != NAME:
        return op(*args, **kwargs)
    others = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, VirtualTensor)]
    _refuse_mixing(op, ours, others, kwargs.get("generator"))
    raws = {id(x.raw): x for x in ours}
    args, kwargs = tree_map_only(VirtualTensor, lambda x: x.raw, (args, kwargs))
    on_cpu = _addmm_dtype_out if op is aten.addmm.dtype_out else op
    found = on_cpu(*args, **(kwargs if asked is None else {**kwargs, "device": "cpu"}))
    on_device = isinstance(args[0], Tensor) and op.overloadpacket is aten.copy_ and id(args[0]) in raws
    on_device |= op.overloadpacket is not aten.copy_ and asked in (None, NAME)
    if _open:
        _count(op, args, kwargs, ours, others, found, on_device)
    if not on_device:
        return found
    # an operation that writes to one of its inputs returns it
    return tree_map_only(Tensor, lambda x: raws[id(x)] if id(x) in raws else VirtualTensor(x), found)


def _addmm_dtype_out(x: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, *, out: Tensor, **factors: Any) -> Tensor:
    """Which only CUDA has: the product of two half-precision matrices is added before it is rounded."""
    return out.copy_(torch.addmm(x.to(dtype), a.to(dtype), b.to(dtype), **factors))


def _refuse_mixing(op: Any, ours: list[Any], others: list[Tensor], generator: torch.Generator | None) -> None:
    packet = op.overloadpacket
    if generator is not None and generator.device.type != NAME:
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{generator.device.type}'")
    if packet in (aten._to_copy, aten.copy_) or not ours:
        return
    if packet in _INDEXING:
        return
    if any(x.dim() for x in others):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {DEVICE} and cpu! ({op})"
        )


def _count(
    op: Any, args: Any, kwargs: Any, ours: list[Any], others: list[Tensor], found: Any, on_device: bool
) -> None:
    packet = op.overloadpacket
    results = [x for x in tree_leaves(found) if isinstance(x, Tensor)]
    waits = int(packet in _WAITING)
    if packet is aten.repeat_interleave and kwargs.get("output_size") is not None:
        waits = 0
    moved = 0
    crossing = packet in (aten._to_copy, aten.copy_) and (not on_device or not ours or bool(others))
    if crossing:
        moved = _bytes(results)
        waits = int(moved > 0 and not kwargs.get("non_blocking") and not (len(args) > 2 and args[2] is True))
    elif packet in _INDEXING:
        indices = [x for x in args[1] if x is not None]
        uploads = [x for x in others if any(x is i for i in indices) and x.dim()]
        moved = _bytes(uploads)
        waits = len(uploads) + sum(x.dtype in (torch.bool, torch.uint8) for x in indices)
        if packet is not aten.index and len(indices) == 1 and args[2].dim() == 0:
            waits = len(uploads)  # `x[mask] = number` is a masked fill
    launches = not crossing and packet not in _FREE and not _is_view(op) and any(x.numel() for x in results)
    overwritten = [args[0]] if packet in _OVERWRITING else tree_leaves(kwargs.get("out"))
    if op is aten.addmm.dtype_out:  # `out` is what is added to
        ours, overwritten = ours[:-1], []
    read = [x.raw for x in ours if not any(x.raw is y for y in overwritten)]
    if packet in _PICKING:
        read = [*results, *read[1:]]
    elif packet in _PLACING:
        results, read = [], [x for x in read[1:] for _ in range(2)]
    line = f"{_line()} {packet.__name__}" if waits else ""
    for counts in _open:
        counts.kernels += launches
        counts.bytes += _bytes(read) + _bytes(results) if launches else 0
        counts.moved += moved
        if waits:
            counts.lines[line] += waits


def _is_view(op: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns)


def _bytes(tensors: list[Tensor]) -> int:
    """What is stored of them: an expanded dimension is there once."""
    total = 0
    for x in tensors:
        numbers = 1
        for size, stride in zip(x.shape, x.stride(), strict=True):
            numbers *= size if stride else min(size, 1)
        total += numbers * x.element_size()
    return total


def _line() -> str:
    """The innermost line of the package, and the innermost one outside torch where that is another."""
    innermost = ""
    frame: Any = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name != __file__ and "/torch/" not in name:
            here = f"{'/'.join(Path(name).parts[-2:])}:{frame.f_lineno}"
            innermost = innermost or here
            if _PACKAGE in name and "/site-packages/" not in name:
                ours = f"{name.rsplit(_PACKAGE, 1)[1]}:{frame.f_lineno}"
                return ours if innermost.endswith(ours) else f"{ours} ({innermost})"
        frame = frame.f_back
    return innermost


# What torch asks of a device --------------------------------------------------------------------------------------


class _Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    get_rng_state_all, set_rng_state_all = get_rng_state, set_rng_state

    @contextmanager
    def device(self, index: Any) -> Iterator[None]:
        yield

    def set_device(self, device: Any) -> None: ...

    def synchronize(self, device: Any = None) -> None: ...

    def empty_cache(self) -> None: ...

    def is_bf16_supported(self) -> bool:
        return True


_casts: dict[int, tuple[Tensor, Tensor]] = {}  # of weights, until the outermost autocast is left, as torch's own
_under_autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.device.type != NAME or not x.is_floating_point() or x.dtype in (dtype, torch.float64):
        return x
    if not (x.is_leaf and x.requires_grad and torch.is_autocast_cache_enabled()):
        return x.to(dtype)
    if id(x) not in _casts:
        with torch.enable_grad():  # it may be used for training too
            _casts[id(x)] = x, x.to(dtype)
    return _casts[id(x)][1]


def _autocast(op: Any, lowered: bool, *args: Any, **kwargs: Any) -> Any:
    dtype = torch.get_autocast_dtype(NAME) if lowered else torch.float32
    with torch._C._ExcludeDispatchKeyGuard(_under_autocast):
        args, kwargs = tree_map_only(Tensor, lambda x: _cast(x, dtype), (args, kwargs))
        return op(*args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """One kernel, and one in the backward pass."""
    if options.pop("enable_gqa", False):
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    attend = aten._scaled_dot_product_flash_attention_for_cpu
    return attend(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, **options)[0]


def _save_pretrained(save: Callable[..., None], model: Any, folder: Any, **kwargs: Any) -> None:
    """safetensors reads a tensor's memory."""
    if kwargs.get("state_dict") is None:
        kwargs["state_dict"] = {name: getattr(w, "raw", w) for name, w in model.state_dict().items()}
    save(model, folder, **kwargs)


# Triton -----------------------------------------------------------------------------------------------------------

_launched = [0]  # kernels that are running on the device


def _launch(run: Callable[..., None], kernel: Any, *args: Any, **kwargs: Any) -> None:
    ours = [x for x in args if isinstance(x, VirtualTensor)]
    if ours and any(isinstance(x, Tensor) and not isinstance(x, VirtualTensor) for x in args):
        raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
    for counts in _open:
        counts.kernels += bool(ours) and all(kwargs["grid"])
    _launched[0] += bool(ours)
    try:
        run(kernel, *(getattr(x, "raw", x) for x in args), **kwargs)
    finally:
        _launched[0] -= bool(ours)


def _access(access: Callable[..., Any], mask: int, builder: Any, pointers: Any, *args: Any) -> Any:
    """A load or a store; `mask` is the index of that argument in `args`."""
    if _launched[0]:
        lanes = int(np.broadcast_to(args[mask].data, pointers.data.shape).sum())
        for counts in _open:
            counts.bytes += lanes * (pointers.get_element_ty().primitive_bitwidth // 8)
    return access(builder, pointers, *args)


def _install_triton() -> None:
    triton_interpreter.install()
    triton_kernels.ROWS = 32
    launch, builder = interpreter.InterpretedFunction.run, interpreter.InterpreterBuilder
    interpreter.InterpretedFunction.run = lambda *args, **kwargs: _launch(launch, *args, **kwargs)
    load, store = builder.create_masked_load, builder.create_masked_store
    builder.create_masked_load = lambda *args: _access(load, 0, *args)
    builder.create_masked_store = lambda *args: _access(store, 1, *args)


_libraries: list[torch.library.Library] = []


def install() -> None:
    """Make the device known to torch, in this process."""
    _setup_privateuseone_for_python_backend(NAME, _Module())
    torch.__future__.set_swap_module_params_on_conversion(True)  # tied weights stay tied
    anything, ops = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    _libraries.extend([anything, ops])
    anything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    # where torch goes past its dispatch to Python: `torch.tensor` and its like
    for name in ("empty_strided", "copy_"):
        op = getattr(aten, name).default
        ops.impl(name, lambda *args, op=op, **kwargs: _run(op, args, kwargs), "PrivateUse1")
    for name in [*_LOWERED, *_RAISED]:
        packet, _, overload = name.partition(".")
        op = getattr(getattr(aten, packet), overload or "default")
        ops.impl(name, partial(_autocast, op, name in _LOWERED), "AutocastPrivateUse1")
    ops.impl("scaled_dot_product_attention", _attention, "AutogradPrivateUse1")
    forget = torch.clear_autocast_cache
    torch.clear_autocast_cache = lambda: (_casts.clear(), forget())
    save = PreTrainedModel.save_pretrained
    PreTrainedModel.save_pretrained = lambda *args, **kwargs: _save_pretrained(save, *args, **kwargs)
    arguments.is_torch_bf16_gpu_available = training_args.is_torch_bf16_gpu_available = lambda: True
    torch.autograd.set_multithreading_enabled(False)  # Python in the device's thread of autograd can abort
    _install_triton()
    _Everywhere().__enter__()
