"""A Triton kernel: attention's output and what the statistics ask of every row, from one pass over the keys.

It is flash attention (Dao et al., arXiv 2205.14135) over the patch keys with two sums more in its loop, and the few
prefix keys merged in the log domain at its end, as in `rows.py`. Logits are in units of log 2, so that a power of two
is all that a weight takes. A maximum m that grows to m' leaves Σ e^(s−m)·(m−s) behind by e^(m−m')·(m'−m)·Σ e^(s−m),
which is ≥ 0 like every term: nothing cancels.

Imported where Triton is; `fused.py` launches it.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LEAST = tl.constexpr(-2e38)  # times LOG2E it is a float32 still


@triton.jit
@no_type_check
def _bias(bias, rows, columns, bias_row, bias_column, known):
    """The bias of some rows and columns in units of log 2; −∞ stays, and the least number does not become it."""
    places = bias + rows.to(tl.int64)[:, None] * bias_row + columns[None, :] * bias_column
    given = tl.load(places, mask=known, other=0.0).to(tl.float32)
    return tl.where(given == float("-inf"), given, tl.maximum(given, LEAST) * LOG2E)


@triton.jit
@no_type_check
def _logits(
    q, key, columns, key_row, token_count, bias, rows, bias_row, bias_column,
    scale, DIM: tl.constexpr, DIMS: tl.constexpr, BIAS: tl.constexpr, CUT: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Logits of rows over the keys at some positions, in units of log 2; with CUT −∞ from `token_count` on."""
    dims = tl.arange(0, DIMS)
    known = (columns < token_count)[None, :] & (dims < DIM)[:, None]
    k = tl.load(key + columns[None, :] * key_row + dims[:, None], mask=known, other=0.0)
    if WIDE:
        k = k.to(tl.float32)
    logits = tl.dot(q, k, input_precision=PRECISION) * scale
    if BIAS:
        known = (rows < token_count)[:, None] & (columns < token_count)[None, :]
        logits += _bias(bias, rows, columns, bias_row, bias_column, known)
    if CUT:
        logits = tl.where((columns < token_count)[None, :], logits, float("-inf"))
    return logits


@triton.jit
@no_type_check
def _mixed(
    weights, value, columns, value_row, token_count, total,
    VALUE_DIM: tl.constexpr, VALUE_DIMS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """`total` and the values at some positions, weighted."""
    dims = tl.arange(0, VALUE_DIMS)
    known = (columns < token_count)[:, None] & (dims < VALUE_DIM)[None, :]
    v = tl.load(value + columns[:, None] * value_row + dims[None, :], mask=known, other=0.0)
    weights = weights.to(v.dtype)
    if WIDE:
        weights, v = weights.to(tl.float32), v.to(tl.float32)
    return tl.dot(weights, v, total, input_precision=PRECISION)


@triton.jit
@no_type_check
def _place(patches, width):
    """Row and column of patches on a grid of this width, as float32."""
    numbers = patches.to(tl.float32)
    # Integers are divided slowly. (n + ½)/width is ½/width or more away from a whole number; added to a number whose
    # last bit is worth 1, it is rounded to one.
    rounder = 12582912.0
    rows = ((numbers + 0.5) / width - 0.5 + rounder) - rounder
    return rows, numbers - rows * width


@triton.jit
@no_type_check
def _step(
    maximum, total, spread, distance, mixed,
    q, key, value, start, key_row, value_row, token_count, bias, rows, bias_row, bias_column, scale, width,
    PREFIX: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_DIMS: tl.constexpr,
    KEYS: tl.constexpr, BIAS: tl.constexpr, DISTANCES: tl.constexpr, CUT: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The sums of each row with `KEYS` patch keys more, from the patch `start` on."""
    patches = start + tl.arange(0, KEYS)
    columns = PREFIX + patches
    logits = _logits(
        q, key, columns, key_row, token_count, bias, rows, bias_row, bias_column,
        scale, DIM, DIMS, BIAS, CUT, PRECISION, WIDE,
    )  # fmt: skip
    top = tl.maximum(maximum, tl.max(logits, 1))
    shift = tl.where(top == float("-inf"), 0.0, top) if BIAS else top  # nothing but masked keys so far
    below = shift[:, None] - logits
    weights = tl.exp2(-below)
    if BIAS or CUT:  # a masked key has no weight, and 0·∞ must count as 0
        below = tl.where(weights > 0, below, 0.0)
    fade = tl.exp2(maximum - shift)
    grown = tl.where(maximum == float("-inf"), 0.0, shift - maximum)
    spread = spread * fade + (total * fade) * grown + tl.sum(weights * below, 1)
    total = total * fade + tl.sum(weights, 1)
    if DISTANCES:
        own_y, own_x = _place(rows - PREFIX, width)
        y, x = _place(patches, width)
        down, right = own_y[:, None] - y[None, :], own_x[:, None] - x[None, :]
        distance = distance * fade + tl.sum(weights * tl.sqrt(down * down + right * right), 1)
    mixed = _mixed(
        weights, value, columns, value_row, token_count, mixed * fade[:, None], VALUE_DIM, VALUE_DIMS, PRECISION, WIDE
    )
    return top, total, spread, distance, mixed


@triton.jit
@no_type_check
def attend(
    query, key, value, bias, output, sums, prefix_logits,
    query_image, query_head, query_row, key_image, key_head, key_row, value_image, value_head, value_row,
    bias_image, bias_head, bias_row, bias_column, output_image, output_head, output_row,
    heads, token_count, width, field, scale,
    PREFIX: tl.constexpr, PREFIXES: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_DIMS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    BIAS: tl.constexpr, DISTANCES: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """`ROWS` rows of one image and head.

    `sums` holds, `field` numbers apart: log Z, log Z_P, s_ii, the entropy and (with DISTANCES) the distance of each
    row. DIMS, VALUE_DIMS and PREFIXES are DIM, VALUE_DIM and PREFIX padded to what a product of blocks takes. `scale`
    is that of the logits over log 2. WIDE multiplies in float32 whatever the inputs are.
    """
    row_blocks = tl.cdiv(token_count, ROWS)
    program = tl.program_id(0)
    of_head = (program // row_blocks).to(tl.int64)
    image, head = of_head // heads, of_head % heads
    query += image * query_image + head * query_head
    key += image * key_image + head * key_head
    value += image * value_image + head * value_head
    output += image * output_image + head * output_head
    if BIAS:
        bias += image * bias_image + head * bias_head

    rows = (program % row_blocks) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, DIMS)
    here = (rows < token_count)[:, None] & (dims < DIM)[None, :]
    q = tl.load(query + rows[:, None] * query_row + dims[None, :], mask=here, other=0.0)
    own = tl.load(key + rows[:, None] * key_row + dims[None, :], mask=here, other=0.0)
    self_logits = tl.sum(q.to(tl.float32) * own.to(tl.float32), 1) * scale
    if BIAS:
        places = bias + rows.to(tl.int64) * (bias_row + bias_column)
        given = tl.load(places, mask=rows < token_count, other=0.0).to(tl.float32)
        self_logits += tl.where(given == float("-inf"), given, tl.maximum(given, LEAST) * LOG2E)
    if WIDE:
        q = q.to(tl.float32)

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    spread = tl.zeros([ROWS], tl.float32)
    distance = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, VALUE_DIMS], tl.float32)
    patch_count = token_count - PREFIX
    whole = patch_count // KEYS * KEYS
    for start in range(0, whole, KEYS):
        maximum, total, spread, distance, mixed = _step(
            maximum, total, spread, distance, mixed,
            q, key, value, start, key_row, value_row, token_count, bias, rows, bias_row, bias_column, scale, width,
            PREFIX, DIM, DIMS, VALUE_DIM, VALUE_DIMS, KEYS, BIAS, DISTANCES, False, PRECISION, WIDE,
        )  # fmt: skip
    if whole < patch_count:
        maximum, total, spread, distance, mixed = _step(
            maximum, total, spread, distance, mixed,
            q, key, value, whole, key_row, value_row, token_count, bias, rows, bias_row, bias_column, scale, width,
            PREFIX, DIM, DIMS, VALUE_DIM, VALUE_DIMS, KEYS, BIAS, DISTANCES, True, PRECISION, WIDE,
        )  # fmt: skip

    seen = total > 0  # False where all patch keys are masked
    divisor = tl.where(seen, total, 1.0)
    log_z_patches = tl.where(seen, maximum + tl.log2(divisor), float("-inf"))
    log_z = log_z_patches
    mixed = mixed / divisor[:, None]
    if PREFIX > 0:
        columns = tl.arange(0, PREFIXES)
        logits = _logits(
            q, key, columns, key_row, token_count, bias, rows, bias_row, bias_column,
            scale, DIM, DIMS, BIAS, False, PRECISION, WIDE,
        )  # fmt: skip
        logits = tl.where((columns < PREFIX)[None, :], logits, float("-inf"))
        places = prefix_logits + (of_head * token_count + rows)[:, None] * PREFIX + columns[None, :]
        tl.store(places, logits * LN2, mask=(rows < token_count)[:, None] & (columns < PREFIX)[None, :])
        top = tl.maximum(log_z_patches, tl.max(logits, 1))
        top = tl.where(top == float("-inf"), 0.0, top)
        weights = tl.exp2(logits - top[:, None])
        of_patches = tl.exp2(log_z_patches - top)
        everything = of_patches + tl.sum(weights, 1)
        log_z = top + tl.log2(everything)
        everything = tl.where(everything > 0, everything, 1.0)
        mixed = _mixed(
            weights / everything[:, None], value, columns, value_row, token_count,
            mixed * (of_patches / everything)[:, None], VALUE_DIM, VALUE_DIMS, PRECISION, WIDE,
        )  # fmt: skip

    value_dims = tl.arange(0, VALUE_DIMS)
    here = (rows < token_count)[:, None] & (value_dims < VALUE_DIM)[None, :]
    places = output + rows[:, None] * output_row + value_dims[None, :]
    tl.store(places, mixed.to(output.dtype.element_ty), mask=here)
    # Two products round differently; no weight exceeds the sum that it is a part of.
    self_logits = tl.minimum(self_logits, tl.where(rows < PREFIX, log_z, log_z_patches))
    sums += of_head * token_count + rows
    tl.store(sums, log_z * LN2, mask=rows < token_count)
    tl.store(sums + field, log_z_patches * LN2, mask=rows < token_count)
    tl.store(sums + 2 * field, self_logits * LN2, mask=rows < token_count)
    entropy = (tl.log2(divisor) + spread / divisor) * LN2
    tl.store(sums + 3 * field, tl.where(seen, entropy, float("nan")), mask=rows < token_count)
    if DISTANCES:
        tl.store(sums + 4 * field, tl.where(seen, distance / divisor, float("nan")), mask=rows < token_count)
