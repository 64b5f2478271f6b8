"""Franca: the teacher's backbone, whose blocks lie in chunks and whose MLPs are SwiGLUs."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from timm.layers.mlp import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitprobe.models.official.layout import Layout, State, behind, without

_SWIGLU: Any = SwiGLUPacked  # timm makes it with functools.partial, and asks for a class


def convert(state: State) -> State:
    """Return the backbone, its blocks out of their chunks, its SwiGLU under timm's names."""
    state = {name.removeprefix("module."): value for name, value in state.items()}
    state = without(behind(state, "backbone."), "mask_token", "dino_head.", "ibot_head.", "rasa_head.")
    renamed: State = {}
    for name, value in state.items():
        name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)
        renamed[name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")] = value
    return renamed


LAYOUT = Layout(
    words="backbone.blocks.<chunk>.<block>.mlp.w12.weight … beside dino_head. and ibot_head.",
    convert=convert,
    build=partial(VisionTransformer, img_size=518, mlp_layer=_SWIGLU, act_layer=nn.SiLU, init_values=1e-5),
)
