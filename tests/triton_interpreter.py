"""Triton's interpreter, with bfloat16 as on a GPU. Needs TRITON_INTERPRET=1 before Triton is first imported.

Triton 3.6 to 3.9 truncate float32 to bfloat16 in the interpreter; compiled kernels round to the nearest, ties to even
(`cvt.rn.bf16`, which `test_triton.py` asserts).
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _cast(cast: Any, builder: Any, source: Any, target: Any) -> Any:
    kinds = source.dtype.scalar, target.scalar
    if kinds == (tl.bfloat16, tl.float32):
        data = (source.data.astype(np.uint32) << 16).view(np.float32)
    elif kinds == (tl.float32, tl.bfloat16):
        bits = np.ascontiguousarray(source.data).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        data = np.where(np.isnan(source.data), 0x7FC0, rounded).astype(np.uint16)
    else:
        return cast(builder, source, target)
    return interpreter.TensorHandle(data, target.scalar)


def install() -> None:
    """Mend the interpreter of this process."""
    builder = interpreter.InterpreterBuilder
    if not hasattr(builder, "mended"):
        cast, builder.mended = builder.cast_impl, True
        builder.cast_impl = lambda *args: _cast(cast, *args)
