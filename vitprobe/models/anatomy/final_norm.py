"""The norm that a model applies to all tokens after its last block, by what libraries call it."""

from __future__ import annotations

from torch import nn

from vitprobe.errors import UserError
from vitprobe.models.anatomy.parts import Anatomy

_NAMES = (
    "norm",  # timm, DINO, MAE, DINOv2
    "layernorm",  # transformers
    "post_layernorm",
    "layer_norm",
    "rms_norm",
    "ln",  # torchvision
    "ln_post",  # CLIP, open_clip
    "final_norm",
    "norm_post",
    "post_norm",
    "post_trunk_norm",  # AIM
)


def find_final_norm(anatomy: Anatomy, model: str) -> nn.Module:
    """The norm of one of these names beside the blocks, or beside what holds them, the nearest part of the model first.

    Args:
        anatomy: the model's.
        model: its name, for the message.

    Raises:
        UserError: where there is none (a model that normalises the pooled tokens alone has an identity there), or
            several.
    """
    found = next((norms for part in anatomy.lineage or (anatomy.module,) if (norms := _norms(part, anatomy))), {})
    if len(found) == 1:
        return next(iter(found.values()))
    names = ", ".join(path.rpartition(".")[2] for path in found)
    came = f"several ({names})" if found else "no"
    raise UserError(
        f"{model} has {came} final norm on its tokens that could be recognised: read the block without the norm"
    )


def _norms(part: nn.Module, anatomy: Anatomy) -> dict[str, nn.Module]:
    """Path and module of each norm in a part of the model that stands beside the blocks or beside what holds them."""
    block = anatomy.blocks[0]
    holders = {path: each for path, each in part.named_modules() if each is not block and _holds(each, block)}
    return {
        f"{path}.{name}": norm
        for path, each in holders.items()
        for name, norm in each.named_children()
        if name in _NAMES and not isinstance(norm, nn.Identity)
    }


def _holds(part: nn.Module, block: nn.Module) -> bool:
    return any(inner is block for inner in part.modules())
