"""Figures of profiles, the paper's (arXiv 2412.03215) and any statistic's; nothing is computed here, only drawn."""

from vitprobe.figures.bars import selective_aggregation
from vitprobe.figures.heatmap import heads
from vitprobe.figures.lines import (
    cls_entropy,
    cls_self_attention,
    patch_self_attention,
    patch_self_attention_ratio,
    statistic,
)
from vitprobe.figures.own import draw
from vitprobe.figures.saving import save_figure, save_paper_figures

__all__ = [
    "cls_entropy",
    "cls_self_attention",
    "draw",
    "heads",
    "patch_self_attention",
    "patch_self_attention_ratio",
    "save_figure",
    "save_paper_figures",
    "selective_aggregation",
    "statistic",
]
