"""Which position of a token sequence is what: [cls], distillation, registers, patches on their grid."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitprobe.errors import AttentionNotSeenError


@dataclass(frozen=True)
class TokenLayout:
    """The order of tokens in a Vision Transformer: prefix tokens first, then the patches row by row.

    Attributes:
        grid: rows and columns of the patch grid, `(height, width)`.
        has_cls: whether position 0 is a [cls] token (a register at position 0 is not one).
        num_distillation: distillation tokens; they follow [cls].
        num_registers: registers; they are the last prefix tokens.
        patch_size: pixels an edge of one patch, `(height, width)`.
    """

    grid: tuple[int, int]
    has_cls: bool
    num_distillation: int = 0
    num_registers: int = 0
    patch_size: tuple[int, int] = field(default=(16, 16))

    @property
    def num_prefix_tokens(self) -> int:
        """[cls], distillation and register tokens together."""
        return int(self.has_cls) + self.num_distillation + self.num_registers

    @property
    def num_patches(self) -> int:
        """Patches: rows times columns of the grid."""
        return self.grid[0] * self.grid[1]

    @property
    def num_tokens(self) -> int:
        """The length of the sequence."""
        return self.num_prefix_tokens + self.num_patches

    @property
    def patches(self) -> slice:
        """Positions of the patch tokens."""
        return slice(self.num_prefix_tokens, self.num_tokens)

    @property
    def registers(self) -> slice:
        """Positions of the registers (empty where there are none)."""
        return slice(self.num_prefix_tokens - self.num_registers, self.num_prefix_tokens)

    @cached_property
    def centers(self) -> Float[Tensor, "patch 2"]:
        """Row and column of each patch on the grid, in patches."""
        rows, columns = torch.meshgrid(torch.arange(self.grid[0]), torch.arange(self.grid[1]), indexing="ij")
        return torch.stack([rows.flatten(), columns.flatten()], dim=1).float()

    @property
    def diagonal(self) -> float:
        """The largest distance between two patches of the grid, in patches."""
        return ((self.grid[0] - 1) ** 2 + (self.grid[1] - 1) ** 2) ** 0.5


def uncompiled(module: nn.Module) -> nn.Module:
    """The model that `torch.compile` was given, whose forward pass its wrapper calls; otherwise the module itself."""
    return getattr(module, "_orig_mod", module)


def is_wrapper(module: nn.Module) -> bool:
    """Whether a module has no blocks of its own but holds a model at `.module` (DataParallel and its like)."""
    return isinstance(getattr(module, "module", None), nn.Module) and _trunk(module) is None


def find_trunk(module: nn.Module) -> nn.Module:
    """The part of a model that holds its transformer blocks: the model itself, or its `.encoder`.

    Raises:
        AttentionNotSeenError: where neither has a non-empty `.blocks`.
    """
    trunk = _trunk(module)
    if trunk is not None:
        return trunk
    raise AttentionNotSeenError(
        f"{type(module).__name__} has no list of transformer blocks at .blocks or .encoder.blocks, so its attention "
        f"cannot be captured; use an isotropic Vision Transformer (vitprobe models)"
    )


def _trunk(module: nn.Module) -> nn.Module | None:
    for trunk in (module, getattr(module, "encoder", None)):
        blocks = getattr(trunk, "blocks", None)
        if isinstance(trunk, nn.Module) and isinstance(blocks, nn.Sequential | nn.ModuleList) and len(blocks):
            return trunk
    return None


def find_patch_embedding(module: nn.Module) -> nn.Module:
    """The part of a model that turns images into patch tokens: `.patch_embed` or (NaFlexVit) `.embeds` of its trunk.

    Raises:
        AttentionNotSeenError: for a model without transformer blocks or without a patch embedding that is known.
    """
    trunk = find_trunk(module)
    embedding: Any = getattr(trunk, "patch_embed", getattr(trunk, "embeds", None))
    if not hasattr(embedding, "dynamic_feat_size") and not hasattr(embedding, "patch_size"):
        raise AttentionNotSeenError(
            f"{type(module).__name__} has blocks but no .patch_embed with a patch size, so its patch grid is not "
            f"known; use an isotropic Vision Transformer of timm (vitprobe models)"
        )
    return embedding


def token_layout(module: nn.Module, image_size: tuple[int, int] | None = None) -> TokenLayout:
    """The token layout of a timm Vision Transformer for images of `(height, width)` pixels.

    Without `image_size`, the model's own default input. The rule held for all 322 isotropic models of timm 1.0.31
    (prefix first, patches row-major, `[cls]` exactly where there is a `cls_token`); capture checks it on each input.

    Raises:
        AttentionNotSeenError: for a model without transformer blocks or without a patch embedding that is known.
    """
    trunk = find_trunk(module)
    holder: Any = getattr(trunk, "embeds", trunk)  # NaFlexVit keeps its tokens in `.embeds`
    embedding: Any = find_patch_embedding(module)
    if image_size is None:
        image_size = default_image_size(module)
    if hasattr(embedding, "dynamic_feat_size"):
        rows, columns = embedding.dynamic_feat_size(image_size)
        patch = _pair(embedding.feat_ratio(as_scalar=False))
    else:
        patch = _pair(embedding.patch_size)
        rows, columns = image_size[0] // patch[0], image_size[1] // patch[1]
    has_cls = getattr(holder, "cls_token", None) is not None
    num_distillation = int(getattr(holder, "dist_token", None) is not None)
    num_prefix = int(getattr(trunk, "num_prefix_tokens", 0))
    return TokenLayout(
        grid=(int(rows), int(columns)),
        has_cls=has_cls,
        num_distillation=num_distillation,
        num_registers=num_prefix - int(has_cls) - num_distillation,
        patch_size=patch,
    )


def default_image_size(module: nn.Module) -> tuple[int, int]:
    """Height and width a model was built for: of its patch embedding, else of its pretrained config, else 224."""
    embedding = getattr(find_trunk(module), "patch_embed", None)
    size = getattr(embedding, "img_size", None)
    if size is None:
        config = getattr(module, "pretrained_cfg", None) or {}
        size = tuple(config.get("input_size", (3, 224, 224)))[-2:]
    return _pair(size)


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))
