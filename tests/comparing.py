"""Captured statistics held to the float64 reference."""

from __future__ import annotations

import numpy as np

from helpers import assert_all_close
from reference import BlockTokens, largest_logit, reference_attention, reference_statistics
from vitprobe.attention.view import AttentionView
from vitprobe.hooks.capture import Capture


def reference_of(view: AttentionView, A: np.ndarray, tokens: BlockTokens | None) -> dict[str, np.ndarray]:
    """The reference of attention `A` with the layout of `view`."""
    layout = view.layout
    return reference_statistics(
        A,
        grid=layout.grid,
        prefix=layout.num_prefix_tokens,
        has_cls=layout.has_cls,
        registers=layout.num_registers,
        patch_size=layout.patch_size,
        tokens=tokens,
    )


def reference_of_factors(view: AttentionView) -> dict[str, np.ndarray]:
    """The reference from the same queries and keys; residual norms stand in for one-dimensional tokens."""
    tokens = None
    if view.residual_norms is not None:
        norms = (view.residual_norms, view.output_norms, view.update_norms, view.unscaled_update_norms)
        tokens = BlockTokens(*[None if n is None else n.double().numpy()[..., None] for n in norms])
    return reference_of(view, reference_attention(view.query, view.key, view.scale, view.bias), tokens)


def assert_matches_reference(attention: Capture, **how: float) -> None:
    values = attention.statistics()
    for view in attention:
        bound = {"max_logit": largest_logit(view.query, view.key, view.scale, view.bias)} | how
        assert_all_close(
            {name: value[:, view.block] for name, value in values.items()}, reference_of_factors(view), **bound
        )
