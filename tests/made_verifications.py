"""Verifications with made-up results, for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from vitprobe.probing.verification import Result, Verification

SHARES = {"cls": 0.6, "gap": 0.5, "abmilp": 0.75}
PARAMETERS = {"abmilp": 193, "ep": 42_000}


def made_manifest(name: str = "mae_vit_b", paradigm: str = "MIM") -> dict:
    return {
        "format_version": 2,
        "command": "verify",
        "model": {"name": name, "paradigm": paradigm, "weights_sha256": "0123456789abcdef" * 4},
        "layout": {},
        "undefined": {},
        "arguments": {"seed": 0},
        "protocol": {"name": "fast"},
        "data": {"source": "digits"},
    }


def made_verification(
    name: str = "mae_vit_b",
    paradigm: str = "MIM",
    shares: Mapping[str, float] = SHARES,
    *,
    places: Sequence[str] = ("@block11",),
    images: int = 200,
    seeds: int = 3,
) -> Verification:
    """Results that are right on about these shares of the images, the same images being hard for all."""
    rng = np.random.default_rng(3)
    hard, labels = rng.normal(size=images), rng.integers(0, 10, images)
    results = []
    for place in places:
        for aggregator, share in shares.items():
            luck = rng.normal(0, 0.3, images) + rng.normal(0, 0.1, (seeds, images))
            top1 = hard + luck < stats.norm.ppf(share) * np.sqrt(1.1)
            results.append(
                Result(
                    aggregator + place,
                    PARAMETERS.get(aggregator, 0),
                    {"optimizer": "lars", "learning_rate": 0.1},
                    top1,
                    top1 | (rng.random((seeds, images)) < 0.5),
                )
            )
    return Verification(made_manifest(name, paradigm), [f"{i}.png" for i in range(images)], labels, results)
