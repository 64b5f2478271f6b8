"""MAE, fine-tuned MAE and iBOT: timm's own names; iBOT's token for masked patches is dropped."""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer

from vitprobe.models.official.layout import Layout, State, without


def convert(state: State) -> State:
    """Return the weights without iBOT's token for masked patches."""
    return without(state, "masked_embed")


LAYOUT = Layout(
    words="timm's names (cls_token, pos_embed, blocks.0.attn.qkv.weight …)", convert=convert, build=VisionTransformer
)
