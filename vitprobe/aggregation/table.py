"""Every aggregator by its name: the package's own, and those that were registered."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from vitprobe.aggregation.abmilp import AbMilp
from vitprobe.aggregation.attended import CenterAttention, ClsAttention, ClsAttentionMinEntropy
from vitprobe.aggregation.base import Aggregator
from vitprobe.aggregation.blocks import Cait, VitBlock, VJepa
from vitprobe.aggregation.convolutional import Cbam, Dolg
from vitprobe.aggregation.language import Clip, Coca, Siglip
from vitprobe.aggregation.queries import Aim, Cae, Capi, EfficientProbing, SimPool
from vitprobe.aggregation.simple import Center, Cls, ClsGap, Gap, Gem, Max
from vitprobe.aggregation.tokencut import TokenCut

AGGREGATORS: dict[str, Callable[..., Aggregator]] = {
    "cls": Cls,
    "gap": Gap,
    "cls+gap": ClsGap,
    "max": Max,
    "gem": Gem,
    **{f"center{size}": partial(Center, size=size) for size in range(1, 5)},
    **{f"center_attention{size}": partial(CenterAttention, size=size) for size in range(1, 5)},
    "cls_attention": ClsAttention,
    "cls_attention_min_entropy": ClsAttentionMinEntropy,
    "tokencut": TokenCut,
    "abmilp": AbMilp,
    "ep": EfficientProbing,
    "simpool": SimPool,
    "aim": Aim,
    "capi": Capi,
    "cae": Cae,
    "clip": Clip,
    "siglip": Siglip,
    "vjepa": VJepa,
    "coca": Coca,
    "cait": Cait,
    "vit_block": VitBlock,
    "cbam": Cbam,
    "dolg": Dolg,
}
