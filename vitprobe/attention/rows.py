"""Everything a statistic asks of the rows of an attention matrix, in one pass that can give attention's output too.

For query i the logits are `s_ij = scale·q_i·k_j + b_ij`. P is the set of patch keys; the rest are prefix keys. The
patch part is normalised on its own (`Z_P = logsumexp over P`) and the prefix columns are merged in the log domain
(`Z = logaddexp(Z_P, logsumexp of the prefix logits)`). `1 − A` is never formed: where [cls] holds almost all of the
mass, that subtraction would leave nothing but rounding. The N×N matrix exists a part at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from vitprobe.attention.logits import Logits, Part
from vitprobe.attention.precision import exact_float32
from vitprobe.layout import TokenLayout

# A part's logits and weights stay in a core's share of the cache; enough rows keep the products busy. Measured with
# ViT-S/16 at 1024 px and ViT-B/16 at 224 and 448 px on two cores.
PART_BYTES = {"cpu": 2**20}
_PART_BYTES_ELSEWHERE = 2**28
_ROWS, _ROWS_BYTES = 256, 2**23


@dataclass(frozen=True, eq=False)
class RowSummary:
    """What one pass leaves of some rows R, float32 (float64 for float64 input). N patches, p prefix tokens.

    Attributes:
        log_z: log of the sum over all keys of e^s, `(B, H, R)`.
        log_z_patches: the same over the patch keys alone.
        self_logits: s_ii, `(B, H, R)`.
        prefix_logits: s_ij for the prefix keys j, `(B, H, R, p)`.
        entropy: entropy in nats of each row over the patch keys, renormalised there, `(B, H, R)`; NaN for a row that
            is masked from all of them; None where it was not asked for.
        distance: mean distance in patches from each row to the patch keys it attends to, `(B, H, R)`; NaN alike; None
            alike, and for rows of prefix tokens, which have no place on the grid.
        first: of patch rows, the same of the first row of all ([cls] where there is one) and perhaps others behind it,
            if the pass went over it too.
    """

    log_z: Float[Tensor, "batch head row"]
    log_z_patches: Float[Tensor, "batch head row"]
    self_logits: Float[Tensor, "batch head row"]
    prefix_logits: Float[Tensor, "batch head row prefix"]
    entropy: Float[Tensor, "batch head row"] | None = None
    distance: Float[Tensor, "batch head row"] | None = None
    first: RowSummary | None = None


def summarize_rows(
    logits: Logits,
    layout: TokenLayout,
    rows: slice,
    *,
    entropies: bool = True,
    value: Float[Tensor, "batch head token dim"] | None = None,
    output: Float[Tensor, "batch head token dim"] | None = None,
    part_bytes: int | None = None,
) -> RowSummary:
    """One exact pass over the logits of some rows, `part_bytes` (by default what suits the device) of them at a time.

    Args:
        logits: of one batch.
        layout: its tokens, in canonical order.
        rows: positions of the queries: patches alone, or prefix tokens alone.
        entropies: whether entropies, and of patches distances, are wanted.
        value: values, where attention's output is wanted too.
        output: where that is written, at `rows`.
        part_bytes: bytes of logits at a time.
    """
    start, stop, _ = rows.indices(logits.shape[2])
    batch, heads, count = logits.shape[0], logits.shape[1], stop - start
    prefix = layout.num_prefix_tokens
    distances = entropies and start >= prefix
    with exact_float32(logits.device):
        log_z_patches, self_logits = _new(logits, batch, heads, count), _new(logits, batch, heads, count)
        entropy = _new(logits, batch, heads, count) if entropies else None
        distance = _new(logits, batch, heads, count) if distances else None
        values = None if value is None else value[:, :, prefix:].to(logits.dtype)
        parts = list(_parts(logits, layout.num_patches, start, stop, part_bytes))
        size = max((_numel(logits, part) * layout.num_patches for part in parts), default=0)
        workspace, weights_of = _new(logits, size), _new(logits, size)
        apart, apart_rows = None, None  # rows are in the outer loop
        for part in parts:
            here = (part.images, part.heads, slice(part.rows.start - start, part.rows.stop - start))
            scores = logits.patches(part, workspace)
            weights = weights_of[: scores.numel()].view(scores.shape)
            if start >= prefix:  # of the very product that the weights come from, so that none exceeds their sum
                self_logits[here] = scores.diagonal(part.rows.start - prefix, dim1=-2, dim2=-1)
            maximum = scores.amax(dim=-1, keepdim=True)
            torch.softmax(scores, dim=-1, out=weights)
            if logits.masked:  # a row that may look at no patch has no weights there, not NaN
                weights.masked_fill_(maximum == -torch.inf, 0)
            # The largest weight is e^0 / Σ e^(s−m), so that it says what the others were divided by.
            log_total = -weights.amax(dim=-1).log()
            log_z_patches[here] = maximum[..., 0] + log_total.where(maximum[..., 0] > -torch.inf, 0)
            if output is not None and values is not None:
                seen = values[part.images, part.heads].flatten(0, 1)
                mixed = torch.bmm(weights.flatten(0, 1), seen)
                output[part.images, part.heads, part.rows] = mixed.view(*weights.shape[:3], -1)
            if entropy is not None:
                # H = log Σ e^(s−m) + Σ p·(m−s): both terms are ≥ 0, so nothing cancels.
                below = torch.sub(maximum, scores, out=scores)
                if logits.masked:  # a masked key has no weight, and 0·∞ must count as 0
                    below.masked_fill_(weights == 0, 0)
                entropy[here] = torch.mul(weights, below, out=scores).sum(dim=-1) + log_total
            if distance is not None:
                if apart is None or part.rows != apart_rows:
                    apart, apart_rows = _distances(layout, part.rows, logits), part.rows
                distance[here] = torch.mul(weights, apart, out=scores).sum(dim=-1)
        if logits.masked:
            nowhere = log_z_patches == -torch.inf
            for undefined in (entropy, distance):
                if undefined is not None:
                    undefined.masked_fill_(nowhere, torch.nan)

        prefix_logits = logits.prefixes(rows)
        if start < prefix:
            self_logits = prefix_logits.diagonal(start, dim1=-2, dim2=-1)
        log_z = torch.logaddexp(log_z_patches, prefix_logits.logsumexp(dim=-1))
        if output is not None and value is not None:
            merge_prefix(output[:, :, rows], value, log_z_patches, log_z, prefix_logits)
        return RowSummary(log_z, log_z_patches, self_logits, prefix_logits, entropy, distance)


def patch_rows(layout: TokenLayout) -> slice:
    """Positions of the patches in canonical order."""
    return slice(layout.num_prefix_tokens, layout.num_tokens)


def join_heads(summaries: Sequence[RowSummary]) -> RowSummary:
    """One summary of the heads of several, in their order; it has what all of them have."""
    firsts = [summary.first for summary in summaries if summary.first is not None]
    found: dict[str, Tensor] = {}
    for name in (field.name for field in fields(RowSummary) if field.name != "first"):
        parts = [getattr(summary, name) for summary in summaries]
        if not any(part is None for part in parts):
            found[name] = torch.cat(parts, dim=1)
    return RowSummary(**found, first=join_heads(firsts) if len(firsts) == len(summaries) else None)


def merge_prefix(
    output: Float[Tensor, "batch head row dim"],
    value: Float[Tensor, "batch head token dim"],
    log_z_patches: Float[Tensor, "batch head row"],
    log_z: Float[Tensor, "batch head row"],
    prefix_logits: Float[Tensor, "batch head row prefix"],
) -> None:
    """Makes attention's output over the patch keys alone, in place, that over all keys."""
    if prefix_logits.shape[-1] == 0:
        return
    weights = torch.exp(prefix_logits - log_z[..., None])
    output *= torch.exp(log_z_patches - log_z)[..., None]
    for column, of_token in enumerate(weights.split(1, dim=-1)):  # in place: their product takes as much memory again
        output.addcmul_(of_token, value[:, :, column : column + 1].to(weights.dtype))


def _parts(logits: Logits, patches: int, start: int, stop: int, part_bytes: int | None) -> Iterator[Part]:
    """Parts of at most about `part_bytes` over the patch keys: rows in the outer loop, then images and heads."""
    batch, heads, _ = logits.shape
    row_bytes = patches * logits.dtype.itemsize
    least = 1
    if part_bytes is None:
        part_bytes = PART_BYTES.get(logits.device.type, _PART_BYTES_ELSEWHERE)
        # So few rows of so many keys that products suffer: rather a part somewhat larger.
        least = max(1, min(_ROWS, _ROWS_BYTES // row_bytes))
    affordable = max(1, part_bytes // row_bytes)  # rows, of any image and head
    rows = min(stop - start, max(affordable // (batch * heads), least))
    if not rows:
        return
    rows = math.ceil((stop - start) / math.ceil((stop - start) / rows))  # parts alike in size
    at_once = max(1, affordable // rows)  # images and heads
    for first in range(start, stop, rows):
        these = slice(first, min(first + rows, stop))
        if at_once >= heads:
            images = at_once // heads
            for image in range(0, batch, images):
                yield Part(slice(image, min(image + images, batch)), slice(0, heads), these)
            continue
        for image in range(batch):
            for head in range(0, heads, at_once):
                yield Part(slice(image, image + 1), slice(head, min(head + at_once, heads)), these)


def _numel(logits: Logits, part: Part) -> int:
    """Rows in a part, of all its images and heads."""
    return math.prod(place.stop - place.start for place in part)


def _new(logits: Logits, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=logits.dtype, device=logits.device)


def _distances(layout: TokenLayout, rows: slice, logits: Logits) -> Float[Tensor, "row patch"]:
    """Distance on the grid between the patches at some positions and all patches.

    A grid row of patches sees windows of one table of offsets, each a column further to the left than the one before:
    copies of them take a small part of the time of N roots for each patch.
    """
    height, width = layout.grid
    table = _offsets(layout.grid).to(logits.device, logits.dtype)
    start, stop = rows.start - layout.num_prefix_tokens, rows.stop - layout.num_prefix_tokens
    distances = _new(logits, stop - start, height, width)
    for y in range(start // width, (stop - 1) // width + 1):
        first, last = max(start, y * width), min(stop, (y + 1) * width)
        windows = table[height - 1 - y : 2 * height - 1 - y].unfold(1, width, 1).transpose(0, 1)  # by offset
        seen = windows[(y + 1) * width - last : (y + 1) * width - first]
        distances[first - start : last - start] = seen.flip(0)
    return distances.flatten(1)


@lru_cache(maxsize=8)
def _offsets(grid: tuple[int, int]) -> Float[Tensor, "offset_y offset_x"]:
    """The length of every offset between two patches: of (y, x) at `[height − 1 + y, width − 1 + x]`, float64."""
    down, right = (torch.arange(1 - side, side, dtype=torch.float64) for side in grid)
    return torch.hypot(down[:, None], right)
