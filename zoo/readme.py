"""Draw the README's figure, `figures/bundled.*`: `python -m zoo.readme` (half a minute on 2 cores).

Figures 3, 4 and 5 of the paper for bundled models and one of their architecture with random weights.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

import vitprobe as vp
from vitprobe.figures.style import style

MODELS = ("mae_vit_nano", "mae_xavier_vit_nano", "mocov3_vit_nano", "supervised_vit_nano", "random_vit_nano")
OUT = Path(__file__).parent.parent / "figures" / "bundled"


def main() -> None:
    """Draw it."""
    profiles = [vp.analyze(model) for model in MODELS]
    with style():
        figure = Figure(figsize=(10.2, 4.5), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
    vp.figures.cls_self_attention(profiles, ax=left)
    vp.figures.cls_entropy(profiles, ax=middle)
    vp.figures.patch_self_attention(profiles, ax=right)
    for path in vp.figures.save_figure(figure, OUT):
        print(path.name)


if __name__ == "__main__":
    main()
