"""Attention's output and every row's sums from our own Triton kernel, where there is a GPU that runs it."""

from __future__ import annotations

import math
import warnings
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vitprobe.attention.rows import RowSummary, patch_rows
from vitprobe.layout import TokenLayout

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MOST_DIMS = 128  # of a head; wider ones do not fit beside their sums
_LEAST_DIMS = 16  # of a product of blocks


class Blocks(NamedTuple):
    """How the kernel cuts its work: rows and keys at a time (powers of two), warps a program, stages of loading."""

    rows: int
    keys: int
    warps: int = 4
    stages: int = 2


_refused: set[tuple[object, ...]] = set()  # kinds of calls that Triton could not compile here


def attend_with_rows(
    query: Float[Tensor, "batch head token dim"],
    key: Float[Tensor, "batch head token dim"],
    value: Float[Tensor, "batch head token value_dim"],
    scale: float,
    bias: Tensor | None,
    layout: TokenLayout,
    *,
    distances: bool = True,
    blocks: Blocks | None = None,
) -> tuple[Float[Tensor, "batch head token value_dim"], RowSummary] | None:
    """Attention's output, and of the patch rows all that statistics ask for, with that of the first row in `first`.

    The bias, also −∞ as a mask, is anything broadcastable to `(B, H, T, T)`. Under autocast inputs are rounded as
    torch's own attention rounds them. Products are those of the inputs' precision with sums in float32 (of float32
    inputs each as three of TF32, which has float32's accuracy); memory is O(B·H·T).

    Args:
        query: `(B, H, T, d)`.
        key: the same.
        value: `(B, H, T, e)`.
        scale: of the logits.
        bias: what is added to them, or None.
        layout: the T tokens.
        distances: whether the patch rows' entropies and distances are wanted.
        blocks: how the work is cut; as suits the tensors without.

    Returns:
        None where this kernel is not for these tensors: not on a GPU, without Triton, of float64, of heads wider than
        128; or where Triton cannot compile it here, of which a warning says so once.
    """
    if torch.is_autocast_enabled(query.device.type):
        narrow = torch.get_autocast_dtype(query.device.type)
        query, key, value = (tensor.to(narrow) for tensor in (query, key, value))
    widths = query.shape[-1], value.shape[-1]
    kind = (query.device, query.dtype, *widths, bias is None, distances)
    if not (
        _runs_on(query.device)
        and query.dtype == key.dtype == value.dtype
        and query.dtype in _DTYPES
        and max(widths) <= _MOST_DIMS
        and kind not in _refused
    ):
        return None
    blocks = blocks or suitable_blocks(query.dtype, max(widths))
    try:
        return _launch(query, key, value, scale, bias, layout, distances, blocks)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no C compiler, too little shared memory, a Triton that knows no such GPU, …
        _refused.add(kind)
        warnings.warn(
            f"vitprobe's fused kernel does not run on {query.device}, so slower ones do its work: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    bias: Tensor | None,
    layout: TokenLayout,
    distances: bool,
    blocks: Blocks,
) -> tuple[Tensor, RowSummary]:
    from vitprobe.attention import triton_rows

    query, key, value = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value))
    batch, heads, tokens, dim = query.shape
    prefix, value_dim = layout.num_prefix_tokens, value.shape[-1]
    # Laid out as torch's kernels do it, so that joining the heads behind it is no copy.
    output = query.new_empty(batch, tokens, heads, value_dim).transpose(1, 2)
    sums = query.new_empty(5 if distances else 4, batch, heads, tokens, dtype=torch.float32)
    prefix_logits = query.new_empty(batch, heads, tokens, prefix, dtype=torch.float32)
    added = None if bias is None else bias.expand(batch, heads, tokens, tokens)
    kernel: Any = triton_rows.attend
    on_device = torch.cuda.device(query.device) if query.is_cuda else nullcontext()
    with on_device:
        kernel[(math.ceil(tokens / blocks.rows) * batch * heads,)](
            query, key, value, added, output, sums, prefix_logits,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
            *((0, 0, 0, 0) if added is None else added.stride()), *output.stride()[:3],
            heads, tokens, layout.grid[1], sums.stride(0), scale / math.log(2),
            PREFIX=prefix, PREFIXES=_padded(prefix), DIM=dim, DIMS=_padded(dim),
            VALUE_DIM=value_dim, VALUE_DIMS=_padded(value_dim), ROWS=blocks.rows, KEYS=blocks.keys,
            BIAS=added is not None, DISTANCES=distances,
            PRECISION="tf32x3" if query.dtype == torch.float32 else "ieee",
            WIDE=not query.is_cuda,  # Triton's interpreter multiplies no bfloat16
            num_warps=blocks.warps, num_stages=blocks.stages,
            enable_fp_fusion=True,  # Triton's own default is about to change, and warns of it
        )  # fmt: skip
    log_z, log_z_patches, self_logits, entropy = sums[:4]
    first, patches = (slice(None), slice(None), slice(0, 1)), (slice(None), slice(None), patch_rows(layout))
    of_first = RowSummary(log_z[first], log_z_patches[first], self_logits[first], prefix_logits[first], entropy[first])
    return output, RowSummary(
        log_z[patches],
        log_z_patches[patches],
        self_logits[patches],
        prefix_logits[patches],
        entropy[patches] if distances else None,
        sums[4][patches] if distances else None,
        of_first,
    )


def _runs_on(device: torch.device) -> bool:
    """Whether this is a GPU that Triton compiles for."""
    return device.type == "cuda" and _has_triton() and torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _padded(count: int) -> int:
    """The next power of two, at least what a product of blocks takes."""
    return max(_LEAST_DIMS, 1 << (count - 1).bit_length()) if count else _LEAST_DIMS


def suitable_blocks(dtype: torch.dtype, dims: int) -> Blocks:
    """What fits into registers and shared memory for heads of this many dimensions, by the compiler's own account."""
    if dtype != torch.float32:
        return Blocks(128, 64, warps=8, stages=3 if dims <= 64 else 2)
    return Blocks(32, 32) if dims <= 64 else Blocks(16, 32)
