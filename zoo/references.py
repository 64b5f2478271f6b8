"""Write the profiles that a diagnosis compares with: `python -m zoo.references` (a minute on 2 cores).

The bundled models, and one of their architecture with random weights (seed 0), on the sample photographs.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

import vitprobe as vp
from vitprobe.profile.profile import Profile
from vitprobe.profile.references import COMPARED

REFERENCES = Path(vp.__file__).parent / "profile" / "references.json"
MODELS = ("mae_vit_nano", "supervised_vit_nano")


def entry(profile: Profile, name: str, paradigm: str) -> dict:
    """One reference: the curves over blocks, and what a run must share to be compared with it."""
    model = profile.manifest["model"]
    return {
        "name": name,
        "paradigm": paradigm,
        "architecture": model["signature"],
        "num_tokens": profile.layout.num_tokens,
        "weights_sha256": model["weights_sha256"],
        "curves": {name: [round(x, 6) for x in profile.estimate(name).mean.tolist()] for name in COMPARED},
    }


def main() -> None:
    """Write `references.json`."""
    entries = []
    for name in MODELS:
        profile = vp.analyze(name)
        entries.append(entry(profile, name, profile.paradigm))
    torch.manual_seed(0)
    random = vp.analyze(vp.load_model("mae_vit_nano", pretrained=False))
    entries.append(entry(random, "random_vit_nano", "random"))
    REFERENCES.write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    main()
