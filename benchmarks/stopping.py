"""How often intervals hold the truth where the data decide when to stop: `python -m benchmarks.stopping`.

Writes the tables of `docs/stopping.md` between its two marks; everything else there is prose.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stopping_simulation import MOST, POPULATIONS, Outcome, simulate

PAGE = Path(__file__).parent.parent / "docs" / "stopping.md"
BEGIN, END = "<!-- begin: python -m benchmarks.stopping -->", "<!-- end -->"
TOLERANCES = (0.5, 0.2, 0.1, 0.05)
RUNS = 10_000
ALWAYS_RUNS = 2_000


def main() -> None:
    """Simulate, and write the page."""
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{_at_the_stop()}\n{_at_every_look()}\n{END}{after}", encoding="utf-8")


def _at_the_stop() -> str:
    lines = [
        f"Held the true mean at the stop, of {RUNS:,} runs each (and the median n at which they stopped):\n",
        "| values | T | confidence sequence | t interval, checked after each shard |",
        "|---|---|---|---|",
    ]
    for name, population in POPULATIONS.items():
        for tolerance in TOLERANCES:
            cells = [_cell(simulate(population, tolerance, RUNS, rule)) for rule in ("cs", "t")]
            lines.append(f"| {name} | {tolerance} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def _cell(outcome: Outcome) -> str:
    share = f"{outcome.covered.mean():.1%}"
    ran_out = np.median(outcome.used) >= MOST
    return f"{share} ({'ran out at ' if ran_out else ''}{np.median(outcome.used):,.0f})"


def _at_every_look() -> str:
    lines = [
        f"Held it at every look up to {MOST:,} images, of {ALWAYS_RUNS:,} runs each:\n",
        "| values | confidence sequence | t interval |",
        "|---|---|---|",
    ]
    for name, population in POPULATIONS.items():
        cells = [f"{simulate(population, 1e-9, ALWAYS_RUNS, rule).always.mean():.1%}" for rule in ("cs", "t")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
