"""How often the intervals of `verify` hold the truth: `python -m benchmarks.verification_coverage`.

Writes the tables of `docs/verification.md` between its two marks; everything else there is prose.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from verification_simulation import CLASS_GRID, GRID, Outcome, Setting, simulate

PAGE = Path(__file__).parent.parent / "docs" / "verification.md"
BEGIN, END = "<!-- begin: python -m benchmarks.verification_coverage -->", "<!-- end -->"
RUNS = 2000
SPREADS = {0.0: "nothing", 0.05: "little", 0.2: "much"}


def main() -> None:
    """Simulate, and write the page."""
    started = time.monotonic()
    with ProcessPoolExecutor(2) as pool:
        outcomes = list(pool.map(partial(simulate, runs=RUNS), (*GRID, *CLASS_GRID)))
    print(f"{(time.monotonic() - started) / 60:.1f} minutes")
    tables = "\n".join((*_over_images(outcomes[: len(GRID)]), *_over_classes(outcomes[len(GRID) :])))
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables}\n{END}{after}", encoding="utf-8")


def _over_images(outcomes: Sequence[Outcome]) -> Iterator[str]:
    yield f"Accuracy over images, {RUNS:,} runs each:\n"
    yield "| seeds | images | seeds matter | together | accuracy | held: accuracy | held: gain | no gain, rejected |"
    yield "|---|---|---|---|---|---|---|---|"
    for setting, outcome in zip(GRID, outcomes, strict=True):
        together = "much" if setting.luck == 1 else "less"
        beta = " (easy or hard)" if setting.beta else ""
        yield _row(
            setting.seeds,
            f"{setting.images:,}",
            _matter(setting),
            together,
            f"{setting.accuracy}{beta}",
            outcome=outcome,
        )
    yield ""


def _over_classes(outcomes: Sequence[Outcome]) -> Iterator[str]:
    yield f"Mean per class, {RUNS:,} runs each:\n"
    yield "| seeds | classes | images per class | seeds matter | held: accuracy | held: gain | no gain, rejected |"
    yield "|---|---|---|---|---|---|---|"
    for setting, outcome in zip(CLASS_GRID, outcomes, strict=True):
        sizes = ", ".join(map(str, setting.sizes)) or setting.images // setting.classes
        yield _row(setting.seeds, setting.classes, sizes, _matter(setting), outcome=outcome)
    yield ""


def _matter(setting: Setting) -> str:
    return "–" if setting.seeds == 1 else SPREADS[setting.seed_spread]


def _row(*cells: object, outcome: Outcome) -> str:
    shares = (f"{share:.1%}" for share in (outcome.accuracy, outcome.gain, outcome.rejected))
    return f"| {' | '.join(map(str, (*cells, *shares)))} |"


if __name__ == "__main__":
    main()
