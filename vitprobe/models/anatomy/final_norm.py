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
    """The norm of one of these names beside the blocks, or beside what holds them.

    Args:
        anatomy: the model's.
        model: its name, for the message.

    Raises:
        UserError: where there is none (a model that normalises the pooled tokens alone has an identity there), or
            several.
    """
    block = anatomy.blocks[0]
    holders = [part for part in anatomy.module.modules() if part is not block and _holds(part, block)]
    found = {
        id(part): (name, part)
        for holder in holders
        for name, part in holder.named_children()
        if name in _NAMES and not isinstance(part, nn.Identity)
    }
    if len(found) == 1:
        return next(part for _, part in found.values())
    came = f"several ({', '.join(name for name, _ in found.values())})" if found else "no"
    raise UserError(
        f"{model} has {came} final norm on its tokens that could be recognised: read the block without the norm"
    )


def _holds(part: nn.Module, block: nn.Module) -> bool:
    return any(inner is block for inner in part.modules())
