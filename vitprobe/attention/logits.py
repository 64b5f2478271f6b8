"""The logits of attention, computed a part at a time: some images, heads and rows over the patch keys."""

from __future__ import annotations

import math
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

# Masks are additive: −∞, or the least number there is, to which a logit may be added.
_MASKED = -1e30


class Part(NamedTuple):
    """Some images, heads and rows (queries) of a batch; several images only with all their heads."""

    images: slice
    heads: slice
    rows: slice


class ProductLogits:
    """`scale·q·kᵀ + bias` of `(B, H, T, d)` queries and keys; of float16 and bfloat16 in float32.

    The bias is broadcastable to `(B, H, T, T)`. The products want autocast off.

    Attributes:
        shape: images, heads, tokens `(B, H, T)`.
        prefix: prefix tokens, the first of the T keys.
        device: where they are.
        dtype: float32, or float64 for float64 input.
    """

    def __init__(self, query: Tensor, key: Tensor, scale: float, bias: Tensor | None, prefix: int) -> None:
        batch, heads, tokens, _ = query.shape
        self.shape, self.prefix, self.device = (batch, heads, tokens), prefix, query.device
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        self._query, self._key, self._scale, self._bias = query, key, scale, bias

    @cached_property
    def masked(self) -> bool:
        """Whether the bias masks a key."""
        return self._bias is not None and _masks(self._bias)

    @cached_property
    def _wide(self) -> tuple[Tensor, Tensor]:
        """Queries and keys in the precision of the logits; contiguous, as products of strided ones are slow."""
        return self._query.to(self.dtype).contiguous(), self._key.to(self.dtype).contiguous()

    def patches(self, part: Part, buffer: Tensor) -> Tensor:
        """Logits of a part over the patch keys, `(images, heads, rows, N)`, in the flat `buffer`."""
        query, key = self._wide
        queries = query[part.images, part.heads, part.rows]
        keys = key[part.images, part.heads, self.prefix :]
        shape = (*queries.shape[:3], keys.shape[2])
        logits = buffer[: math.prod(shape)].view(shape)
        flat = logits.flatten(0, 1)
        # What is in the buffer counts for nothing (beta); the scale costs nothing here.
        torch.baddbmm(flat, queries.flatten(0, 1), keys.flatten(0, 1).mT, beta=0, alpha=self._scale, out=flat)
        if self._bias is not None:
            logits += self._bias_of(part)[..., self.prefix :]
        return logits

    def prefixes(self, rows: slice) -> Tensor:
        """Logits of some rows over the prefix keys, `(B, H, rows, prefix)`."""
        query, key = self._wide
        logits = self._scale * (query[:, :, rows] @ key[:, :, : self.prefix].mT)
        everything = Part(slice(None), slice(None), rows)
        return logits if self._bias is None else logits + self._bias_of(everything)[..., : self.prefix]

    def own(self) -> Tensor:
        """Logits of each token for itself, without any bias, `(B, H, T)`."""
        return self._scale * torch.linalg.vecdot(*self._wide)

    def whole(self) -> Tensor:
        """All of them, `(B, H, T, T)`."""
        query, key = self._wide
        logits = self._scale * (query @ key.mT)
        return logits if self._bias is None else logits + self._bias.to(self.dtype)

    def _bias_of(self, part: Part) -> Tensor:
        """The bias of a part over all keys, broadcastable to it."""
        assert self._bias is not None
        bias = self._bias[(None,) * (4 - self._bias.ndim)]
        places = [place if size > 1 else slice(None) for place, size in zip(part, bias.shape[:3], strict=True)]
        return bias[tuple(places)].to(self.dtype)


class GivenLogits:
    """Logits `(B, H, T, T)` that are there already; attributes as of `ProductLogits`."""

    def __init__(self, logits: Tensor, prefix: int) -> None:
        batch, heads, tokens, _ = logits.shape
        self.shape, self.prefix, self.device = (batch, heads, tokens), prefix, logits.device
        self.dtype = torch.promote_types(logits.dtype, torch.float32)
        self._logits = logits

    @cached_property
    def masked(self) -> bool:
        """Whether a key is masked somewhere."""
        return _masks(self._logits)

    def patches(self, part: Part, buffer: Tensor) -> Tensor:
        """Logits of a part over the patch keys, `(images, heads, rows, N)`: a copy in the flat `buffer`, to work in."""
        logits = self._logits[part.images, part.heads, part.rows, self.prefix :]
        return buffer[: logits.numel()].view(logits.shape).copy_(logits)

    def prefixes(self, rows: slice) -> Tensor:
        """Logits of some rows over the prefix keys, `(B, H, rows, prefix)`."""
        return self._logits[:, :, rows, : self.prefix].to(self.dtype)

    def whole(self) -> Tensor:
        """All of them, `(B, H, T, T)`."""
        return self._logits.to(self.dtype)


Logits = ProductLogits | GivenLogits


def _masks(logits: Tensor) -> bool:
    """Whether a number is so low that it is a mask; of tensors without numbers, that may be."""
    return logits.is_meta or bool((logits < _MASKED).any())
