"""Everything a statistic asks of the rows of an attention matrix, in one pass over blocks of rows.

For query i the logits are `s_ij = scale·q_i·k_j + b_ij`. P is the set of patch keys; the rest are prefix keys. The
patch part is normalised on its own (`Z_P = logsumexp over P`) and the prefix columns are merged in the log domain
(`Z = logaddexp(Z_P, logsumexp of the prefix logits)`). `1 − A` is never formed: where [cls] holds almost all of the
mass, that subtraction would leave nothing but rounding. The N×N matrix exists for `ROW_BLOCK_BYTES` at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vitprobe.attention.precision import exact_float32
from vitprobe.models.tokens import TokenLayout

# Small enough for a block of logits to stay in a core's share of the cache, large enough to keep matmul busy.
ROW_BLOCK_BYTES = 4 * 2**20


@dataclass(frozen=True, eq=False)
class RowSummary:
    """What one pass over the rows leaves, float32 (float64 for float64 input). T tokens, N patches, p prefix tokens.

    Attributes:
        log_z: log of the sum over all keys of e^s, `(B, H, T)`.
        log_z_patches: the same over the patch keys alone.
        self_logits: s_ii, `(B, H, T)`.
        prefix_logits: s_ij for the prefix keys j, `(B, H, T, p)`.
        entropy: entropy in nats of each row over the patch keys, renormalised there, `(B, H, T)`; NaN for a row that
            is masked from all of them.
        distance: mean distance in patches from each patch row to the patch keys it attends to, `(B, H, N)`; NaN alike.
    """

    log_z: Float[Tensor, "batch head token"]
    log_z_patches: Float[Tensor, "batch head token"]
    self_logits: Float[Tensor, "batch head token"]
    prefix_logits: Float[Tensor, "batch head token prefix"]
    entropy: Float[Tensor, "batch head token"]
    distance: Float[Tensor, "batch head patch"]


@dataclass(frozen=True, eq=False)
class Logits:
    """The logits of one batch, computed some rows at a time.

    Attributes:
        rows: a slice of query positions → the logits of these rows, `(B, H, rows, T)`, in `dtype`.
        shape: `(B, H, T)`.
        device: where they are.
        dtype: float32, or float64 for float64 input.
        masked: whether some may be −∞.
    """

    rows: Callable[[slice], Tensor]
    shape: tuple[int, int, int]
    device: torch.device
    dtype: torch.dtype
    masked: bool


def product_logits(query: Tensor, key: Tensor, scale: float, bias: Tensor | None) -> Logits:
    """The logits `scale·q·kᵀ + bias` of `(B, H, T, d)` queries and keys; of float16 and bfloat16 in float32.

    The bias is broadcastable to `(B, H, T, T)`.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    keys = key.to(wide).transpose(-2, -1)

    def rows(wanted: slice) -> Tensor:
        logits = scale * (query[:, :, wanted].to(wide) @ keys)
        if bias is not None:
            logits += bias[..., wanted, :].to(wide)
        return logits

    batch, heads, tokens, _ = query.shape
    return Logits(rows, (batch, heads, tokens), query.device, wide, bias is not None)


def given_logits(logits: Tensor) -> Logits:
    """Logits `(B, H, T, T)` that are there already."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    batch, heads, tokens, _ = logits.shape
    return Logits(lambda wanted: logits[:, :, wanted].to(wide), (batch, heads, tokens), logits.device, wide, True)


def summarize_rows(logits: Logits, layout: TokenLayout, row_block_bytes: int | None = None) -> RowSummary:
    """One exact pass over the attention logits, `row_block_bytes` (default `ROW_BLOCK_BYTES`) of them at a time."""
    wide, (batch, heads, tokens) = logits.dtype, logits.shape
    prefix, budget = layout.num_prefix_tokens, row_block_bytes or ROW_BLOCK_BYTES
    rows_at_once = max(1, budget // (batch * heads * tokens * wide.itemsize))
    centers = layout.centers.to(logits.device, wide)

    log_z_prefix, log_z_patches, self_logits, prefix_logits, entropies, distances = ([] for _ in range(6))
    with exact_float32(logits.device):
        for start in range(0, tokens, rows_at_once):
            rows = slice(start, min(start + rows_at_once, tokens))
            block = logits.rows(rows)
            count = block.shape[-2]
            self_logits.append(block.diagonal(offset=start, dim1=-2, dim2=-1).clone())
            prefix_logits.append(block[..., :prefix].clone())
            log_z_prefix.append(prefix_logits[-1].logsumexp(dim=-1))

            patch_logits = block[..., prefix:]
            maximum = patch_logits.amax(dim=-1, keepdim=True)
            if logits.masked:  # a row that may look at no patch has a mass of e^(−inf) there, not NaN
                maximum = maximum.clamp(min=torch.finfo(wide).min)
            below = maximum - patch_logits  # m − s ≥ 0
            weights = torch.exp(-below)
            total = weights.sum(dim=-1)
            if logits.masked:  # a masked key (s = −inf) has no weight, and 0·inf must count as 0
                below = below.masked_fill(patch_logits == -torch.inf, 0)
            log_z_patches.append(maximum[..., 0] + total.log())
            # H = log Σ e^(s−m) + Σ p·(m−s): both terms are ≥ 0, so nothing cancels.
            entropies.append(total.log() + (weights * below).sum(dim=-1) / total)

            first = max(0, prefix - rows.start)  # rows before this one are prefix rows, which have no place on the grid
            if first < count:
                patch_rows = slice(rows.start + first - prefix, rows.stop - prefix)
                apart = torch.cdist(centers[patch_rows], centers, compute_mode="donot_use_mm_for_euclid_dist")
                distances.append((weights[..., first:, :] * apart).sum(dim=-1) / total[..., first:])

        patches_z = torch.cat(log_z_patches, dim=-1)
        return RowSummary(
            log_z=torch.logaddexp(patches_z, torch.cat(log_z_prefix, dim=-1)),
            log_z_patches=patches_z,
            self_logits=torch.cat(self_logits, dim=-1),
            prefix_logits=torch.cat(prefix_logits, dim=-2),
            entropy=torch.cat(entropies, dim=-1),
            distance=torch.cat(distances, dim=-1),
        )
