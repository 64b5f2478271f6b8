"""One guarded forward pass of a model that is not trained: precision, images of a wrong size, NaN, memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from vitprobe.errors import OUT_OF_MEMORY, UserError
from vitprobe.frozen.dtype import ForwardDtype, own_dtype, weights_dtype
from vitprobe.models.loaded import LoadedModel

Result = TypeVar("Result")
_NAMED = 5  # images that an error names at most


class Forward:
    """A model's forward pass on its device.

    Attributes:
        dtype: what it runs in; the weights' own precision without.
        most: images a pass; None for as many as come. Halved for good where memory runs out.
    """

    def __init__(
        self,
        model: LoadedModel,
        device: torch.device,
        dtype: ForwardDtype | None = None,
        most: int | None = None,
    ) -> None:
        self.dtype, self.most = dtype or own_dtype(model.module), most
        self._model, self._device, self._weights = model, device, weights_dtype(model.module)

    def __call__(self, images: Tensor) -> Any:
        """What the model gives for images `(B, C, H, W)`, without gradients.

        Raises:
            UserError: for images of a size that the model cannot take.
        """
        try:
            with torch.inference_mode(), self.dtype.autocast(self._device):
                return self._model.module(images.to(self._device, self._weights, non_blocking=True))
        except AssertionError as error:  # timm's way to say that an input has the wrong size
            height, width = images.shape[-2:]
            name = self._model.spec.name
            raise UserError(f"{name} cannot take images of {height}x{width} pixels: {error}") from None

    def part(self, module: torch.nn.Module, tensor: Tensor) -> Tensor:
        """What a part of the model gives, in the same precision, as float32."""
        with torch.no_grad(), self.dtype.autocast(self._device):
            return module(tensor.to(self._weights)).float()

    def in_pieces(
        self, run: Callable[[Tensor], Result], images: Tensor, halved: Callable[[int, int], None] = lambda *_: None
    ) -> list[Result]:
        """What `run` gives for as many images at once as the memory holds.

        Args:
            run: a pass and what is read of it.
            images: `(B, C, H, W)`.
            halved: called with the sizes before and after, where memory ran out.

        Raises:
            UserError: where it does not hold one image.
        """
        while True:
            size = len(images) if self.most is None else self.most
            try:
                return [run(piece) for piece in images.split(size)]
            except (RuntimeError, MemoryError) as error:
                if not isinstance(error, MemoryError) and not re.search(OUT_OF_MEMORY, str(error)):
                    raise
            # out here: the error would keep the failed pass's tensors
            tried = min(size, len(images))
            if tried == 1:
                raise UserError(
                    f"out of memory on {self._device} with one image a batch; give a smaller --img-size, a smaller "
                    f"model or another --device"
                )
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            self.most = tried // 2
            halved(tried, self.most)

    def advice(self, what: str) -> str:
        """What to do about numbers that are NaN or infinite."""
        return what + (", or take bfloat16, whose range is float32's" if self.dtype.taken == "float16" else "")


def named(images: Sequence[int], names: Sequence[str] | None) -> str:
    """A few of some images by name, or by their positions."""
    words = [str(index if names is None else names[index]) for index in images[:_NAMED]]
    return ", ".join(words) + (", …" if len(images) > _NAMED else "")
