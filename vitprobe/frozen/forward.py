"""One batch through the model: its statistics, checked; in halves where memory runs out."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float32
from numpy import ndarray
from torch import Tensor

from vitprobe.data.batches import Batch
from vitprobe.errors import OUT_OF_MEMORY, UserError
from vitprobe.frozen.dtype import MEASURED_IMAGES, ForwardDtype, own_dtype, weights_dtype
from vitprobe.hooks.capture import Capture
from vitprobe.models.loaded import LoadedModel
from vitprobe.statistics import STATISTICS


class Measurement:
    """What a model's attention is on batch after batch.

    Attributes:
        forward: what the forward pass runs in; the weights' own precision at first.
        most: images a forward pass; halved for good where memory runs out.
        halvings: takes note of each time that it did: the shard, and the sizes before and after.
    """

    def __init__(
        self, model: LoadedModel, attention: Capture, device: torch.device, most: int, halvings: list[dict[str, Any]]
    ) -> None:
        self.model, self.attention, self.device, self.most, self.halvings = model, attention, device, most, halvings
        self._dtype = weights_dtype(model.module)
        self.forward = own_dtype(model.module)

    def __call__(self, batch: Batch) -> dict[str, Float32[ndarray, "image block head"]]:
        """`(n, blocks, heads)` of each statistic.

        Raises:
            UserError: for images of a size that the model cannot take, activations that are NaN or infinite, or where
                the memory does not hold one image.
        """
        values = self._run(batch)
        self._require_finite(values, batch.names)
        return {name: value.numpy() for name, value in values.items()}

    def trial(self, batch: Batch, forward: ForwardDtype) -> dict[str, Tensor]:
        """The statistics of a batch's first images under a dtype, whatever they are; none of a batch without images."""
        if not len(batch):
            return {}
        self.forward = forward
        return self._run(replace(batch, pixels=batch.pixels[:MEASURED_IMAGES]))

    def _run(self, batch: Batch) -> dict[str, Tensor]:
        while True:
            try:
                pieces = [self._forward(pixels) for pixels in batch.pixels.split(self.most)]
                break
            except (RuntimeError, MemoryError) as error:
                if not isinstance(error, MemoryError) and not re.search(OUT_OF_MEMORY, str(error)):
                    raise
                tried = min(self.most, len(batch.pixels))
            self._halve(tried, batch)  # out here: the error would keep the failed pass's tensors
        return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}

    def _forward(self, pixels: Tensor) -> dict[str, Tensor]:
        try:
            with self.forward.autocast(self.device):
                self.model.module(pixels.to(self.device, self._dtype, non_blocking=True))
        except AssertionError as error:  # timm's way to say that an input has the wrong size
            height, width = pixels.shape[-2:]
            raise UserError(f"{self.model.spec.name} cannot take images of {height}x{width} pixels: {error}") from None
        return {name: value.float().cpu() for name, value in self.attention.statistics().items()}

    def _halve(self, tried: int, batch: Batch) -> None:
        if tried == 1:
            raise UserError(
                f"out of memory on {self.device} with one image a batch; give a smaller --img-size, a smaller model or "
                f"another --device"
            )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.most = tried // 2
        self.halvings.append({"shard": list(batch.shard), "from": tried, "to": self.most})

    def _require_finite(self, values: dict[str, Tensor], names: list[str]) -> None:
        bad = [
            (value.isnan() if STATISTICS[key].infinite else ~value.isfinite()).any(dim=2)
            for key, value in values.items()
        ]
        images, blocks = torch.stack(bad).any(dim=0).nonzero(as_tuple=True)
        if len(blocks):
            first = int(blocks.argmin())
            advice = "check its weights and the images' preprocessing"
            if self.forward.taken == "float16":
                advice += ", or take bfloat16, whose range is float32's"
            raise UserError(
                f"the activations of {self.model.spec.name} are NaN or infinite from block {blocks[first]} on (image "
                f"{names[int(images[first])]}); {advice}"
            )
