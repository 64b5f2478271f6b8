"""The layouts by the names that the table's entries give them."""

from __future__ import annotations

from vitprobe.models.official import beit, capi, data2vec2, franca, maskfeat, moco_v3, plain
from vitprobe.models.official.layout import Layout

LAYOUTS: dict[str, Layout] = {
    "plain": plain.LAYOUT,
    "moco-v3": moco_v3.LAYOUT,
    "maskfeat": maskfeat.LAYOUT,
    "beit": beit.LAYOUT,
    "simmim": beit.SIMMIM,
    "data2vec2": data2vec2.LAYOUT,
    "capi": capi.LAYOUT,
    "franca": franca.LAYOUT,
}
