"""Statistics of the attention weights: how a row shares its attention among [cls], registers and patches.

A is the attention matrix of one head, row = query; P the N patch keys; S_i the mass that row i puts on P. Every
function takes an `AttentionView` and gives `(B, H)`. Masses are `e^(s − Z)`, shares among patches `e^(s − Z_P)`: no
subtraction from 1 and no epsilon anywhere. Definitions: "Beyond [cls]" (arXiv 2412.03215), Figures 3 to 5; those the
paper's script does not have are marked with their source.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from vitprobe.attention.rows import RowSummary
from vitprobe.attention.view import AttentionView
from vitprobe.layout import TokenLayout
from vitprobe.statistics.table import enter

PerHead = Float[Tensor, "batch head"]


def _share(layout: TokenLayout) -> tuple[float, float]:
    return 0.0, 1.0


def _entropy(layout: TokenLayout) -> tuple[float, float]:
    return 0.0, math.log(layout.num_patches)


def _in_nats(layout: TokenLayout) -> str:
    return f"log {layout.num_patches}"


def _in_words(layout: TokenLayout) -> str:
    return "uniform over the patches"


def _one_of_tokens(layout: TokenLayout) -> float:
    return 1 / layout.num_tokens


def _one_of_patches(layout: TokenLayout) -> float:
    return 1 / layout.num_patches


def _registers_of_tokens(layout: TokenLayout) -> float:
    return layout.num_registers / layout.num_tokens


def _mean_distance(layout: TokenLayout) -> float:
    """Mean distance between two patches of the grid, each drawn from all, in patches."""
    offsets = [torch.arange(1 - edge, edge, dtype=torch.float64) for edge in layout.grid]
    often = [(edge - offset.abs()) / edge**2 for edge, offset in zip(layout.grid, offsets, strict=True)]
    return float((often[0][:, None] * often[1] * torch.hypot(offsets[0][:, None], offsets[1])).sum())


def _pixels(layout: TokenLayout) -> float:
    """Pixels an edge of a patch, the geometric mean where it is no square."""
    height, width = layout.patch_size
    return math.sqrt(height * width)


def _entropies(rows: RowSummary) -> Tensor:
    assert rows.entropy is not None
    return rows.entropy


def _clamp_entropy(entropy: Tensor, layout: TokenLayout) -> Tensor:
    """Bring rounding back into [0, log N]; what lies further out than rounding explains is left to be seen."""
    maximum = math.log(layout.num_patches)
    tolerance = 1e-4 * max(1.0, maximum)
    inside = entropy.clamp(0.0, maximum)
    return torch.where((entropy - inside).abs() <= tolerance, inside, entropy)


@enter(
    "cls_self_attention",
    "[cls] self-attention",
    "share",
    _share,
    "cls",
    figure=3,
    released_name="cls_cls_attention",
    asks="cls",
    uniform=_one_of_tokens,
    heading="[cls] self-attention",
)
def cls_self_attention(view: AttentionView) -> PerHead:
    """A_00: the share of its attention that [cls] gives to itself, 0 to 1 (the paper's Figure 3)."""
    rows = view.cls_row
    return torch.exp(rows.self_logits[..., 0] - rows.log_z[..., 0])


@enter(
    "cls_self_attention_ratio",
    "[cls] self-attention / its attention to patches",
    "ratio",
    lambda layout: (0.0, math.inf),
    "cls distribution",
    released_name="cls_cls_attention_adj_for_cls",
    asks="cls",
    uniform=_one_of_patches,
    infinite=True,  # where [cls] gives the patches less than float32 can hold
)
def cls_self_attention_ratio(view: AttentionView) -> PerHead:
    """A_00 / S_0: what [cls] gives itself per unit that it gives the patches, 0 to ∞ (an odds, not a share)."""
    rows = view.cls_row
    return torch.exp(rows.self_logits[..., 0] - rows.log_z_patches[..., 0])


@enter(
    "cls_to_patches",
    "[cls] attention to a patch, mean",
    "share",
    lambda layout: (0.0, 1 / layout.num_patches),
    "cls",
    released_name="cls_pos_attention",
    asks="cls",
    uniform=_one_of_tokens,
)
def cls_to_patches(view: AttentionView) -> PerHead:
    """(1/N) Σ_P A_0j: what [cls] gives one patch on average, 0 to 1/N."""
    rows = view.cls_row
    return torch.exp(rows.log_z_patches[..., 0] - rows.log_z[..., 0]) / view.layout.num_patches


@enter(
    "cls_to_registers",
    "[cls] attention to registers",
    "share",
    _share,
    "cls registers",
    asks="cls",
    uniform=_registers_of_tokens,
)
def cls_to_registers(view: AttentionView) -> PerHead:
    """Σ over registers of A_0j: what [cls] gives all registers together, 0 to 1."""
    rows = view.cls_row
    logits = rows.prefix_logits[:, :, 0, view.layout.canonical.registers]
    return torch.exp(logits.logsumexp(dim=-1) - rows.log_z[..., 0])


@enter(
    "cls_entropy",
    "[cls] attention entropy over patches",
    "nats",
    _entropy,
    "cls distribution",
    figure=4,
    released_name="cls_pos_entropy",
    asks="cls",
    uniform=lambda layout: math.log(layout.num_patches),
    maximum=_in_nats,
    from_zero=False,  # the distance to the maximum is what is read off
)
def cls_entropy(view: AttentionView) -> PerHead:
    """Entropy in nats of the [cls] row over the patches, renormalised there, 0 to log N (the paper's Figure 4)."""
    return _clamp_entropy(_entropies(view.cls_row)[..., 0], view.layout)


@enter(
    "cls_entropy_share",
    "[cls] attention entropy / log N",
    "share",
    _share,
    "cls patches distribution",
    asks="cls",
    uniform=lambda layout: 1.0,
    maximum=_in_words,
    share_of="cls_entropy",
    heading="[cls] entropy / log N",
)
def cls_entropy_share(view: AttentionView) -> PerHead:
    """`cls_entropy` as a share of its maximum log N, 0 to 1: comparable between grids."""
    return cls_entropy(view) / math.log(view.layout.num_patches)


@enter(
    "patch_self_attention",
    "patch self-attention",
    "share",
    _share,
    released_name="pos_self_attention",
    asks="sums",
    uniform=_one_of_tokens,
)
def patch_self_attention(view: AttentionView) -> PerHead:
    """(1/N) Σ_t∈P A_tt: the share of its attention that a patch gives to itself, 0 to 1."""
    rows = view.patch_sums
    return torch.exp(rows.self_logits - rows.log_z).mean(dim=-1)


@enter(
    "patch_self_attention_ratio",
    "patch self-attention / attention to patches",
    "share",
    _share,
    "distribution",
    figure=5,
    released_name="pos_self_attention_adj_for_cls",
    asks="sums",
    uniform=_one_of_patches,
    heading="patch self-attention",
)
def patch_self_attention_ratio(view: AttentionView) -> PerHead:
    """(1/N) Σ_t∈P A_tt / S_t: a patch's own share of what it gives to patches, 0 to 1 (the paper's Figure 5)."""
    rows = view.patch_sums
    return torch.exp(rows.self_logits - rows.log_z_patches).mean(dim=-1)


@enter(
    "patches_to_cls",
    "patches' attention to [cls]",
    "share",
    _share,
    "cls",
    released_name="pos_cls_attention",
    asks="sums",
    uniform=_one_of_tokens,
)
def patches_to_cls(view: AttentionView) -> PerHead:
    """(1/N) Σ_t∈P A_t0: the share of its attention that a patch gives to [cls], 0 to 1."""
    rows = view.patch_sums
    return torch.exp(rows.prefix_logits[..., 0] - rows.log_z).mean(dim=-1)


@enter(
    "patches_to_registers",
    "patches' attention to registers",
    "share",
    _share,
    "registers",
    asks="sums",
    uniform=_registers_of_tokens,
)
def patches_to_registers(view: AttentionView) -> PerHead:
    """(1/N) Σ_t∈P Σ over registers of A_tj: what a patch gives to all registers together, 0 to 1."""
    rows = view.patch_sums
    logits = rows.prefix_logits[..., view.layout.canonical.registers]
    return torch.exp(logits.logsumexp(dim=-1) - rows.log_z).mean(dim=-1)


@enter(
    "patch_entropy",
    "patch attention entropy over patches",
    "nats",
    _entropy,
    "distribution",
    released_name="pos_pos_entropy",
    asks="rows",
    uniform=lambda layout: math.log(layout.num_patches),
    maximum=_in_nats,
    from_zero=False,
)
def patch_entropy(view: AttentionView) -> PerHead:
    """Mean over patch rows of their entropy in nats over the patches, itself included, 0 to log N."""
    return _clamp_entropy(_entropies(view.patch_rows).mean(dim=-1), view.layout)


@enter(
    "patch_entropy_share",
    "patch attention entropy / log N",
    "share",
    _share,
    "patches distribution",
    asks="rows",
    uniform=lambda layout: 1.0,
    maximum=_in_words,
    share_of="patch_entropy",
    heading="patch entropy / log N",
)
def patch_entropy_share(view: AttentionView) -> PerHead:
    """`patch_entropy` as a share of its maximum log N, 0 to 1."""
    return patch_entropy(view) / math.log(view.layout.num_patches)


@enter(
    "attention_distance",
    "attention distance",
    "patches",
    lambda layout: (0.0, layout.diagonal),
    "distribution",
    asks="rows",
    uniform=_mean_distance,
    heading="distance in patches",
)
def attention_distance(view: AttentionView) -> PerHead:
    """Mean over patch rows of the distance on the grid to the patches attended to, in patches, 0 to the diagonal.

    The mean attention distance of Dosovitskiy et al. (arXiv 2010.11929, Figure 7), with each row renormalised over
    the patches.
    """
    distance = view.patch_rows.distance
    assert distance is not None
    return distance.mean(dim=-1)


@enter(
    "attention_distance_px",
    "attention distance",
    "px",
    lambda layout: (0.0, layout.diagonal * _pixels(layout)),
    "distribution",
    asks="rows",
    uniform=lambda layout: _mean_distance(layout) * _pixels(layout),
)
def attention_distance_px(view: AttentionView) -> PerHead:
    """`attention_distance` times the patch size (its geometric mean where a patch is no square), in pixels."""
    return attention_distance(view) * _pixels(view.layout)
