"""How far profiles lie apart, for the bound of "resembles": `python -m benchmarks.resemblance RUN …`.

Prints the mean difference of the three curves between all shipped references, and of each run to the reference of its
own weights. docs/verdict.md quotes it.
"""

from __future__ import annotations

import itertools
import sys

from vitprobe.profile.profile import Profile
from vitprobe.profile.references import COMPARED, distance, load_references


def main(runs: list[str]) -> None:
    """Print both lists, nearest first."""
    references = load_references()
    pairs = [(distance(a.curves, b.curves), a.name, b.name) for a, b in itertools.combinations(references, 2)]
    print("different weights, packaged photographs:")
    for away, one, other in sorted(pairs):
        print(f"  {away:.3f}  {one}, {other}")
    if runs:
        print("the same weights, packaged photographs and these images:")
    for run in runs:
        profile = Profile.load(run)
        curves = {name: profile.estimate(name).center.tolist() for name in COMPARED}
        for reference in references:
            if reference.weights_sha256 == profile.manifest["model"]["weights_sha256"]:
                print(f"  {distance(curves, reference.curves):.3f}  {reference.name}, {profile.num_images} images")


if __name__ == "__main__":
    main(sys.argv[1:])
