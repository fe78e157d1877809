"""Compiles the kernels for the compute capabilities it is given and prints, as JSON, what each kernel needs.

No GPU is necessary. `test_triton.py` runs this in a process of its own:
without TRITON_INTERPRET, because the interpreter replaces the compiler, with TRITON_DUMP_PTXAS_LOG=1, and with an
empty TRITON_CACHE_DIR. ptxas comes with Triton.
"""

import io
import json
import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tsdkd import losses
from tsdkd.lm_head import triton_kernels as kernels
from tsdkd.lm_head.rows import ratio_weight

CAPPED, PLAIN = (1 / 30, 30.0), (1.0, 0.0)
DIVERGENCES = {
    "forward": losses.FORWARD_KL,
    "reverse": losses.REVERSE_KL,
    "jsd": losses.jsd(0.9),
    "skew-forward": losses.skew_forward_kl(0.1),
    "skew-reverse": losses.skew_reverse_kl(0.1),
}


def constants(divergence: losses.Divergence | None) -> dict[str, float]:
    names = ("MIXTURE", "OF_STUDENT", "OF_TEACHER", "OF_RATIO")
    values = (0.0,) * 4
    if divergence is not None:
        values = (divergence.mixture, divergence.student, divergence.teacher, ratio_weight(divergence))
    return dict(zip(names, values, strict=True))


def heads(cap: tuple[float, float]) -> dict[str, float]:
    names = ("STUDENT_FACTOR", "STUDENT_CAP", "TEACHER_FACTOR", "TEACHER_CAP")
    return dict(zip(names, cap * 2, strict=True))


def variants() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Name, kernel and compile-time constants."""
    for name, cap in (("", PLAIN), (", capped", CAPPED)):
        for top_k in (False, True):
            flags = {"FACTOR": cap[0], "CAP": cap[1], "LANE_MAXIMA": top_k}
            yield f"row_statistics{', top k' * top_k}{name}", kernels.row_statistics, flags
        for kind, divergence in DIVERGENCES.items():
            yield f"divergence, {kind}{name}", kernels.divergence, {**heads(cap), **constants(divergence)}
        for terms in ("entropy", "logps", "entropy logps", *DIVERGENCES, "jsd entropy", "jsd entropy logps"):
            words = terms.split()
            flags = {"HAS_ENTROPY": "entropy" in words, "HAS_LOGPS": "logps" in words}
            flags["HAS_DIVERGENCE"] = words[0] in DIVERGENCES
            flags |= constants(DIVERGENCES.get(words[0]))
            yield f"logits_grad, {terms}{name}", kernels.logits_grad, {**heads(cap), **flags}


def compiled(kernel: Any, flags: dict[str, Any], dtype: str, capability: int) -> Any:
    flags = {**flags, "ROWS": kernels.ROWS, "BLOCK": kernels.BLOCK}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in flags:
            signature[name] = "constexpr"
        elif name in ("logits", "student", "teacher"):
            signature[name] = f"*{dtype}"
        elif name == "ids":
            signature[name] = "*i64"
        elif name == "size" or name.endswith(("_stride", "count")):
            signature[name] = "i32"
        else:
            signature[name] = "*fp32"
        # what the launcher would find: aligned logits whose rows are too
        if name in ("logits", "student", "teacher", "size") or name.endswith("logits_stride"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, flags, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=kernels.OPTIONS)


def resources(kernel: Any, flags: dict[str, Any], dtype: str, capability: int) -> dict[str, int]:
    """Registers and spilled bytes, as ptxas says; shared memory; instructions that round, or load 16 bytes."""
    with redirect_stdout(io.StringIO()) as said:
        binary = compiled(kernel, flags, dtype, capability)
    assert binary.asm["cubin"]
    return {
        "registers": max(map(int, re.findall(r"Used (\d+) registers", said.getvalue()))),
        "spilled": sum(map(int, re.findall(r"(\d+) bytes spill", said.getvalue()))),
        "shared": binary.metadata.shared,
        "roundings": len(re.findall(r"cvt\.rn\.bf16", binary.asm["ptx"])),
        "wide loads": len(re.findall(r"ld\.global\S*\.v4\.b32", binary.asm["ptx"])),
    }


def main() -> None:
    found = {
        f"{name}, {dtype}, sm_{capability}": resources(kernel, flags, dtype, capability)
        for capability in map(int, sys.argv[1:])
        for dtype in ("bf16", "fp32")
        for name, kernel, flags in variants()
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
