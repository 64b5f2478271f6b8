"""MoCo v3: a Vision Transformer behind `module.base_encoder.`, whose ViT-S has twice the usual number of heads."""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitprobe.errors import UserError
from vitprobe.models.anatomy.find import find_anatomy
from vitprobe.models.official.layout import Layout, State, behind, without

# Heads of its Vision Transformers by width.
_HEADS = {384: 12, 768: 12, 1024: 16, 1280: 16}


def convert(state: State) -> State:
    """Return the base encoder, without its projection head, the momentum encoder, and the predictor."""
    return without(behind(state, "module.base_encoder."), "head.")


def require_heads(state: State, module: nn.Module, source: str) -> None:
    """Raise `UserError` for MoCo v3's weights in a model of another number of heads than they were trained with.

    Names and shapes are the same for any number of heads, and the attention of another number is another model's.

    Args:
        state: the weights by the file's keys; those of another family are accepted.
        module: the model they are meant for.
        source: what the message calls the file.

    Raises:
        UserError: for another number of heads; says which alias to use.
    """
    if not any("base_encoder.blocks." in name for name in state):
        return
    anatomy = find_anatomy(module)
    found, wanted = anatomy.num_heads, _HEADS.get(anatomy.width or 0)
    if found is None or wanted is None or found == wanted:
        return
    name = (getattr(module, "pretrained_cfg", None) or {}).get("architecture") or type(module).__name__
    raise UserError(
        f"{source} is MoCo v3's (module.base_encoder.), whose ViT of width {anatomy.width} has {wanted} heads; "
        f"{name} has {found}: give --arch mocov3_vit_s"
    )


LAYOUT = Layout(
    words="timm's names behind module.base_encoder., beside module.momentum_encoder. and module.predictor.",
    convert=convert,
    build=VisionTransformer,
)
