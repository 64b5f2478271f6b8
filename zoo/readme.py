"""Draw the README's figure, `figures/bundled.*`: `python -m zoo.readme` (half a minute on 2 cores).

Figures 3, 4 and 5 of the paper for bundled models and one of their architecture with random weights.
"""

from __future__ import annotations

from pathlib import Path

import vitprobe as vp
from zoo.findings import draw

MODELS = ("mae_vit_nano", "mae_xavier_vit_nano", "mocov3_vit_nano", "supervised_vit_nano", "random_vit_nano")
OUT = Path(__file__).parent.parent / "figures" / "bundled"


def main() -> None:
    """Draw it."""
    draw([vp.analyze(model) for model in MODELS], OUT, 4.5)


if __name__ == "__main__":
    main()
