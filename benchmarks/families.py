"""What one gets of each family of timm: `python -m benchmarks.families` writes `docs/families.md`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import timm
import torch

from vitprobe.errors import AttentionNotSeenError
from vitprobe.hooks.capture import Capture, capture
from vitprobe.models.anatomy.unsupported import CONVOLUTIONAL
from vitprobe.statistics import STATISTICS

_PAGE = """\
# What one gets of each family of timm

Made by `python -m benchmarks.families` with timm {timm}: a `capture` of one model of each family, its smallest, on the
meta device. A family is a module of timm (`timm.list_modules()`). A model of a family that is not seen is refused when
the capture is entered, with the reason below.

{seen} of {all} families are seen, with {models} of {all_models} models. Which of these are right to what error, model
by model: [coverage](coverage.md).

## Seen

| family | models | tried | statistics | what the others lack |
| --- | --- | --- | --- | --- |
{isotropic}

## Refused, with the reason

| family | models | tried | reason |
| --- | --- | --- | --- |
{refused}
| the {num_convolutional} convolutional ones | {convolutional_models} | {convolutional} | {convolutional_reason} |
"""


def outcome(name: str) -> Capture | str:
    """What a capture of a model saw, or why it was refused."""
    with torch.device("meta"):
        model: Any = timm.create_model(name).eval()
    try:
        with torch.no_grad(), capture(model) as attention:
            model(torch.empty(1, *model.pretrained_cfg["input_size"], device="meta"))
    except AttentionNotSeenError as error:
        return str(error)
    return attention


def smallest(family: str) -> str:
    """The model of a family with the fewest parameters."""
    sizes = {}
    for name in timm.list_models(module=family):
        with torch.device("meta"):
            sizes[name] = sum(parameter.numel() for parameter in timm.create_model(name).parameters())
    return min(sizes, key=lambda name: (sizes[name], name))


def families_page() -> str:
    """The page, by capturing."""
    count = {family: len(timm.list_models(module=family)) for family in timm.list_modules()}
    count = {family: models for family, models in count.items() if models}
    seen, refused, of_convolutions = [], [], ""
    for family in sorted(count):
        if family in CONVOLUTIONAL and of_convolutions:
            continue
        name = smallest(family)
        result = outcome(name)
        print(f"{family}: {name}", flush=True)
        if isinstance(result, Capture):
            missing = "; ".join(sorted({why for why in result.undefined.values() if " and " not in why})) or "–"
            defined = f"{len(STATISTICS) - len(result.undefined)} of {len(STATISTICS)}"
            seen.append((family, f"| {family} | {count[family]} | {name} | {defined} | {missing} |"))
            continue
        reason = result.partition("cannot be captured: ")[2].rpartition(";")[0]
        if family in CONVOLUTIONAL:
            of_convolutions, convolutional_reason = name, reason
        else:
            refused.append(f"| {family} | {count[family]} | {name} | {reason} |")
    return _PAGE.format(
        timm=timm.__version__,
        seen=len(seen),
        all=len(count),
        models=sum(count[family] for family, _ in seen),
        all_models=sum(count.values()),
        isotropic="\n".join(row for _, row in seen),
        refused="\n".join(refused),
        num_convolutional=len(CONVOLUTIONAL & set(count)),
        convolutional_models=sum(count[family] for family in CONVOLUTIONAL & set(count)),
        convolutional=of_convolutions,
        convolutional_reason=convolutional_reason,
    )


def main() -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/families.md"))
    path = parser.parse_args().out
    path.write_text(families_page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
