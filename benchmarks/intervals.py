"""How often intervals of few images hold the mean: `python -m benchmarks.intervals [RUN …]`.

Writes the tables of `docs/intervals.md` between its two marks; everything else there is prose. RUN are folders of
`vitprobe analyze`, whose values per image stand for real distributions: docs/intervals.md says of which.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import special, stats

from vitprobe.profile.intervals import estimate, on_log_scale
from vitprobe.profile.profile import Profile

PAGE = Path(__file__).parent.parent / "docs" / "intervals.md"
BEGIN, END = "<!-- begin: python -m benchmarks.intervals RUN … -->", "<!-- end -->"
SIZES = (2, 3, 5, 10, 15, 30, 100)
RUNS = 10_000
REAL_RUNS = 2_000  # of each statistic and block
WITHIN = (0.92, 0.97)

Ends = tuple[np.ndarray, np.ndarray]


def _mixture(rare: float) -> tuple[Callable[[np.random.Generator, tuple[int, int]], np.ndarray], float]:
    """A share of values near 0.8, the others near 0.03."""
    return (
        lambda r, n: np.where(r.random(n) < rare, r.beta(8, 2, n), r.beta(2, 60, n)),
        rare * 0.8 + (1 - rare) * 2 / 62,
    )


def _logit_normal(mean: float, deviation: float):
    points, weights = np.polynomial.hermite_e.hermegauss(200)
    truth = float((weights * special.expit(mean + deviation * points)).sum() / weights.sum())
    return lambda r, n: special.expit(r.normal(mean, deviation, n)), truth


# Name → how shares are drawn, and their true mean.
SMOOTH = {
    "uniform": (lambda r, n: r.random(n), 0.5),
    "beta(5, 5)": (lambda r, n: r.beta(5, 5, n), 0.5),
    "beta(2, 20)": (lambda r, n: r.beta(2, 20, n), 2 / 22),
    "beta(20, 2)": (lambda r, n: r.beta(20, 2, n), 20 / 22),
    "beta(0.5, 20)": (lambda r, n: r.beta(0.5, 20, n), 0.5 / 20.5),
    "beta(20, 0.5)": (lambda r, n: r.beta(20, 0.5, n), 20 / 20.5),
    "beta(0.5, 200)": (lambda r, n: r.beta(0.5, 200, n), 0.5 / 200.5),
    "logit-normal(−3, 0.5)": _logit_normal(-3, 0.5),
    "logit-normal(−3, 1)": _logit_normal(-3, 1),
    "logit-normal(3, 1)": _logit_normal(3, 1),
    "logit-normal(−5, 1)": _logit_normal(-5, 1),
    "logit-normal(−3, 1.5)": _logit_normal(-3, 1.5),
}
RARE = {
    "30 % near 0.8, others near 0.03": _mixture(0.3),
    "10 % near 0.8, others near 0.03": _mixture(0.1),
}


def students(values: np.ndarray) -> Ends:
    """The t interval."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(axis=0, ddof=1) / np.sqrt(len(values))
    return np.clip(values.mean(axis=0) - half, 0, 1), np.clip(values.mean(axis=0) + half, 0, 1)


def logit_scale(values: np.ndarray) -> Ends:
    """The t interval on the logit scale, by the delta method."""
    mean = np.clip(values.mean(axis=0), 1e-300, 1 - 1e-16)
    error = values.std(axis=0, ddof=1) / np.sqrt(len(values)) / (mean * (1 - mean))
    half, middle = stats.t.ppf(0.975, len(values) - 1) * error, special.logit(mean)
    return special.expit(middle - half), special.expit(middle + half)


def halls(values: np.ndarray) -> Ends:
    """The t interval after Hall's transformation alone: that of values without bounds, each end where it is farther."""
    n, mean, spread = len(values), values.mean(axis=0), values.std(axis=0, ddof=1)
    a = np.where(spread > 0, ((values - mean) ** 3).mean(axis=0), 0.0)
    a = a / np.where(spread > 0, values.std(axis=0), 1.0) ** 3 / 3 / np.sqrt(n)
    a = np.where(np.abs(a) < 1e-9, 1e-9, a)
    ends = [
        mean - spread / np.sqrt(n) * (np.cbrt(1 + 3 * a * (z - a / 2)) - 1) / a
        for z in stats.t.ppf([0.975, 0.025], n - 1)
    ]
    return np.clip(ends[0], 0, 1), np.clip(ends[1], 0, 1)


def ours(values: np.ndarray) -> Ends:
    """The interval of `vitprobe.profile.intervals`."""
    found = estimate(values, [str(image) for image in range(len(values))], (0.0, 1.0))
    return found.low, found.high


INTERVALS = {"t": students, "t on the logit scale": logit_scale, "Hall's t": halls, "skew-t": ours}


def held(ends: Ends, truth: float) -> float:
    """The share of the intervals that hold the truth."""
    return float(((ends[0] <= truth) & (truth <= ends[1])).mean())


def main(runs: list[str]) -> None:
    """Simulate, and write the page."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    tables = "\n".join([_populations(), _intervals(), *([_real(runs)] if runs else [])])
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables}\n{END}{after}", encoding="utf-8")


def _head(first: str) -> list[str]:
    return [f"| {first} | {' | '.join(f'n = {n}' for n in SIZES)} |", "|---" * (len(SIZES) + 1) + "|"]


def _populations() -> str:
    lines = [f"Percent of {RUNS:,} intervals that hold the true mean, t interval → `skew-t`:\n", *_head("shares")]
    for name, (draw, truth) in {**SMOOTH, **RARE}.items():
        rng, cells = np.random.default_rng(0), []
        for n in SIZES:
            values = draw(rng, (n, RUNS))
            cells.append(" → ".join(f"{100 * held(f(values), truth):.1f}" for f in (students, ours)))
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def _intervals() -> str:
    lines = [
        "Lowest and highest of these percentages over the uniform, beta and logit-normal shares, and the\nwidth "
        "relative to the t interval's (median), of the candidates:\n",
        *_head("interval"),
    ]
    rows: dict[str, list[str]] = {name: [] for name in INTERVALS}
    for n in SIZES:
        shares: dict[str, list[float]] = {name: [] for name in INTERVALS}
        widths: dict[str, list[float]] = {name: [] for name in INTERVALS}
        rng = np.random.default_rng(0)
        for draw, truth in SMOOTH.values():
            values = draw(rng, (n, RUNS))
            of_t = students(values)
            for name, interval in INTERVALS.items():
                low, high = interval(values)
                shares[name].append(100 * held((low, high), truth))
                widths[name].append(float(np.median((high - low) / (of_t[1] - of_t[0]))))
        for name in INTERVALS:
            cell = f"{min(shares[name]):.1f} to {max(shares[name]):.1f} (×{np.median(widths[name]):.2f})"
            rows[name].append(cell)
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    print("\n".join(lines), flush=True)
    return "\n".join(lines) + "\n"


def _real(runs: list[str]) -> str:
    """Coverage of the mean of real values per image, of which n are drawn with replacement."""
    shares: dict[tuple[str, int], list[float]] = {}
    names, images = [], set()
    for run in runs:
        profile = Profile.load(run)
        names.append(f"`{profile.name}`")
        images.add(profile.num_images)
        rng = np.random.default_rng(0)
        for statistic in profile.statistics:
            low, high = profile.bounds(statistic)
            if on_log_scale((low, high)):
                continue
            for column in (profile.values.read(statistic).astype(float).mean(axis=2).T - low) / (high - low):
                if column.std() < 1e-6 * column.mean():  # the same for every image, up to rounding
                    continue
                for n in SIZES:
                    values = column[rng.integers(0, len(column), (n, REAL_RUNS))]
                    for name in ("t", "skew-t"):
                        shares.setdefault((name, n), []).append(held(INTERVALS[name](values), column.mean()))
    count = len(shares["t", SIZES[0]])
    lines = [
        f"The same of real values: {' and '.join(map(str, sorted(images)))} images each through {', '.join(names)},\n"
        f"{count} combinations of model, bounded statistic and block, {REAL_RUNS:,} draws of n images each. Percent "
        f"held, mean over\nthe combinations (and the 5th percentile of them):\n",
        *_head("interval"),
    ]
    for name in ("t", "skew-t"):
        of_n = [100 * np.array(shares[name, n]) for n in SIZES]
        lines.append(f"| {name} | {' | '.join(f'{x.mean():.1f} ({np.quantile(x, 0.05):.1f})' for x in of_n)} |")
    lines += ["", f"Of them, percent that held at least {100 * WITHIN[0]:.0f} % of the time:\n", *_head("interval")]
    for name in ("t", "skew-t"):
        of_n = [100 * np.mean(np.array(shares[name, n]) >= WITHIN[0]) for n in SIZES]
        lines.append(f"| {name} | {' | '.join(f'{x:.0f}' for x in of_n)} |")
    print("\n".join(lines), flush=True)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
