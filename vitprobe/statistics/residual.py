"""Statistics of the residual stream: how much attention changes a token, and how unequal tokens' norms are.

One number a block: `(B, 1)`. The paper's released script (its `cls_magnitude` and `pos_magnitude`) measures the
update before LayerScale; what really enters the residual stream is after it. Both are given.
"""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

from vitprobe.attention.view import AttentionView
from vitprobe.layout import TokenLayout
from vitprobe.statistics.table import enter

PerBlock = Float[Tensor, "batch 1"]


def _unbounded(layout: TokenLayout) -> tuple[float, float]:
    return 0.0, math.inf


def _ratio(update: Tensor | None, residual: Tensor | None) -> Float[Tensor, "batch token"]:
    assert update is not None and residual is not None  # `needs` has been checked
    return update / residual


@enter(
    "cls_update_ratio", "[cls]: attention update / residual", "ratio", _unbounded, "cls residual update", per_head=False
)
def cls_update_ratio(view: AttentionView) -> PerBlock:
    """‖attention update‖ / ‖residual‖ of [cls], after LayerScale, 0 to ∞."""
    return _ratio(view.update_norms, view.residual_norms)[:, view.layout.cls, None]


@enter(
    "cls_update_ratio_unscaled",
    "[cls]: attention update before LayerScale / residual",
    "ratio",
    _unbounded,
    "cls residual update",
    per_head=False,
    released_name="cls_magnitude",
)
def cls_update_ratio_unscaled(view: AttentionView) -> PerBlock:
    """`cls_update_ratio` before LayerScale, as the paper's released script has it."""
    return _ratio(view.unscaled_update_norms, view.residual_norms)[:, view.layout.cls, None]


@enter(
    "patch_update_ratio", "patches: attention update / residual", "ratio", _unbounded, "residual update", per_head=False
)
def patch_update_ratio(view: AttentionView) -> PerBlock:
    """Mean over patches of ‖attention update‖ / ‖residual‖, after LayerScale, 0 to ∞."""
    return _ratio(view.update_norms, view.residual_norms)[:, view.layout.patches].mean(dim=1, keepdim=True)


@enter(
    "patch_update_ratio_unscaled",
    "patches: attention update before LayerScale / residual",
    "ratio",
    _unbounded,
    "residual update",
    per_head=False,
    released_name="pos_magnitude",
)
def patch_update_ratio_unscaled(view: AttentionView) -> PerBlock:
    """`patch_update_ratio` before LayerScale, as the paper's released script has it."""
    return _ratio(view.unscaled_update_norms, view.residual_norms)[:, view.layout.patches].mean(dim=1, keepdim=True)


@enter(
    "patch_norm_max_ratio",
    "largest / median patch norm",
    "ratio",
    lambda layout: (1.0, math.inf),
    "residual",
    per_head=False,
)
def patch_norm_max_ratio(view: AttentionView) -> PerBlock:
    """Largest over median norm of the patches leaving the block, 1 to ∞.

    High-norm tokens are the artefacts that registers remove (Darcet et al., arXiv 2309.16588).
    """
    assert view.output_norms is not None  # `needs` has been checked
    norms = view.output_norms[:, view.layout.patches]
    return (norms.amax(dim=1) / norms.quantile(0.5, dim=1))[:, None]
