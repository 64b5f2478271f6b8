"""One batch through the model: its statistics, checked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float32
from numpy import ndarray
from torch import Tensor

from vitprobe.data.batches import Batch
from vitprobe.errors import UserError
from vitprobe.frozen.dtype import MEASURED_IMAGES, ForwardDtype
from vitprobe.frozen.forward import Forward
from vitprobe.hooks.capture import Capture
from vitprobe.models.loaded import LoadedModel
from vitprobe.statistics import STATISTICS


class Measurement:
    """What a model's attention is on batch after batch.

    Attributes:
        attention: the capture that watches the model.
        forward: the model's forward pass.
        halvings: takes note of each time that memory ran out: the shard, and the sizes before and after.
    """

    def __init__(
        self, model: LoadedModel, attention: Capture, device: torch.device, most: int, halvings: list[dict[str, Any]]
    ) -> None:
        self.attention, self.forward, self.halvings = attention, Forward(model, device, most=most), halvings
        self._name = model.spec.name

    def __call__(self, batch: Batch) -> dict[str, Float32[ndarray, "image block head"]]:
        """`(n, blocks, heads)` of each statistic.

        Raises:
            UserError: for images of a size that the model cannot take, activations that are NaN or infinite, or where
                the memory does not hold one image.
        """
        values = self._run(batch)
        self._require_finite(values, batch.names)
        return {name: value.numpy() for name, value in values.items()}

    def trial(self, batch: Batch, dtype: ForwardDtype) -> dict[str, Tensor]:
        """The statistics of a batch's first images under a dtype, whatever they are; none of a batch without images."""
        if not len(batch):
            return {}
        self.forward.dtype = dtype
        return self._run(replace(batch, pixels=batch.pixels[:MEASURED_IMAGES]))

    def _run(self, batch: Batch) -> dict[str, Tensor]:
        def halved(before: int, after: int) -> None:
            self.halvings.append({"shard": list(batch.shard), "from": before, "to": after})

        pieces = self.forward.in_pieces(self._statistics, batch.pixels, halved)
        return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}

    def _statistics(self, pixels: Tensor) -> dict[str, Tensor]:
        self.forward(pixels)
        return {name: value.float().cpu() for name, value in self.attention.statistics().items()}

    def _require_finite(self, values: dict[str, Tensor], names: list[str]) -> None:
        bad = [
            (value.isnan() if STATISTICS[key].infinite else ~value.isfinite()).any(dim=2)
            for key, value in values.items()
        ]
        images, blocks = torch.stack(bad).any(dim=0).nonzero(as_tuple=True)
        if len(blocks):
            first = int(blocks.argmin())
            advice = self.forward.advice("check its weights and the images' preprocessing")
            raise UserError(
                f"the activations of {self._name} are NaN or infinite from block {blocks[first]} on (image "
                f"{names[int(images[first])]}); {advice}"
            )
