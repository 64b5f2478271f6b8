"""Recipes of the zoo in miniature; importing this makes `zoo` importable."""

import sys
from pathlib import Path
from typing import Any

# zoo/ is beside the package, not in it; at the end, so that the installed vitprobe wins
sys.path.append(str(Path(__file__).parent.parent))

from zoo.recipe import Recipe

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}


def tiny(method: str, **changes) -> Recipe:
    architecture = dict(TINY)
    if method in ("ibot", "ijepa"):
        architecture["patch_size"] = 4  # the least number of patches that they mask in one block is 4
    if method == "ijepa":
        architecture |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
    small: dict[str, Any] = {"decoder_dim": 24, "head_hidden": 8, "head_dim": 8, "prototypes": 16}
    return Recipe(
        name=f"tiny_{method}", method=method, epochs=3, batch_size=4, architecture=architecture, **small | changes
    )
