"""Compiles the fused kernel for GPUs that need not be there; prints a line for each kind of call.

python tests/compile_fused.py        # not under TRITON_INTERPRET=1, which leaves nothing to compile
"""

from __future__ import annotations

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vitprobe.attention.fused import _padded, suitable_blocks
from vitprobe.attention.triton_rows import attend

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# Compute capability → bytes of shared memory that a program may take.
GPUS = {86: 99 * 1024, 90: 227 * 1024}


def shared_bytes(dtype: torch.dtype, dim: int, biased: bool, capability: int) -> int:
    """Shared memory of one program, as `fused` would launch it with distances."""
    blocks = suitable_blocks(dtype, dim)
    constants = {
        "PREFIX": 1, "PREFIXES": _padded(1), "DIM": dim, "DIMS": _padded(dim), "VALUE_DIM": dim,
        "VALUE_DIMS": _padded(dim), "ROWS": blocks.rows, "KEYS": blocks.keys, "BIAS": biased, "DISTANCES": True,
        "PRECISION": "tf32x3" if dtype == torch.float32 else "ieee", "WIDE": False,
    }  # fmt: skip
    kinds = dict.fromkeys(attend.arg_names, "i32") | dict.fromkeys(constants, "constexpr")
    kinds |= dict.fromkeys(("query", "key", "value", "output"), f"*{TYPES[dtype]}")
    kinds |= dict.fromkeys(("sums", "prefix_logits", "bias"), "*fp32") | {"scale": "fp32"}
    if not biased:
        constants["bias"], kinds["bias"] = None, "constexpr"
    free = ("heads", "token_count", "width", "field")  # all else is a multiple of 16, as it is with 16 dimensions
    multiples = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(attend.arg_names)
        if kinds[name].startswith("*") or (kinds[name] == "i32" and name not in free)
    }
    places = {(attend.arg_names.index(name),): value for name, value in constants.items()}
    compiled = triton.compile(
        ASTSource(attend, kinds, places, multiples),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": blocks.warps, "num_stages": blocks.stages, "enable_fp_fusion": True},
    )
    return compiled.metadata.shared


if __name__ == "__main__":
    for capability, most in GPUS.items():
        for dtype, dim, biased in (
            (torch.bfloat16, 64, False),
            (torch.float16, 80, True),
            (torch.float32, 64, True),
        ):
            taken = shared_bytes(dtype, dim, biased, capability)
            verdict = "fits" if taken <= most else "does not fit"
            print(f"sm_{capability} {TYPES[dtype]} {dim} {'biased' if biased else 'plain'}: {taken} bytes, {verdict}")
