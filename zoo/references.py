"""Write the profiles that a diagnosis compares with: `python -m zoo.references` (a minute on 2 cores).

The bundled models, and the one with random weights, on the sample photographs.
"""

from __future__ import annotations

import json
from pathlib import Path

import vitprobe as vp
from vitprobe.profile.profile import Profile
from vitprobe.profile.references import COMPARED
from zoo.findings import BUNDLED

REFERENCES = Path(vp.__file__).parent / "profile" / "references.json"


def entry(profile: Profile) -> dict:
    """One reference: the curves over blocks, and what a run must share to be compared with it."""
    model = profile.manifest["model"]
    return {
        "name": model["name"],
        "paradigm": profile.paradigm,
        "architecture": model["signature"],
        "num_tokens": profile.layout.num_tokens,
        "weights_sha256": model["weights_sha256"],
        "curves": {name: [round(x, 6) for x in profile.estimate(name).mean.tolist()] for name in COMPARED},
    }


def main() -> None:
    """Write `references.json`."""
    entries = [entry(vp.analyze(name)) for name in BUNDLED]
    REFERENCES.write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    main()
