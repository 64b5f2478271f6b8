"""The tables of docs/verification.md, from finished runs of `vitprobe verify`.

python -m benchmarks.verification RUN RUN …
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vitprobe.probing.verification import Verification

HEADINGS = (
    "aggregator",
    "parameters",
    "accuracy, %",
    "gain, points",
    "p (Holm)",
    "top 5, %",
    "mean per class, %",
    "selected rate",
    "held-out, %",
)


def rows(found: Verification) -> list[list[str]]:
    """The cells of a verification's table, in percent, with 95 % intervals in brackets."""
    lines = []
    for row in found.table().to_dict("records"):
        baseline = row["label"] == row["gain_over"]
        accuracy, low, high, gain, gain_low, gain_high = (
            100 * row[name] for name in ("accuracy", "ci_low", "ci_high", "gain", "gain_ci_low", "gain_ci_high")
        )
        edge = " (edge of the grid)" if row.get("rate_at_edge") else ""
        lines.append(
            [
                f"`{row['label']}`",
                f"{row['parameters']:,}",
                f"{accuracy:.2f} [{low:.2f}, {high:.2f}]",
                "–" if baseline else f"{gain:+.2f} [{gain_low:+.2f}, {gain_high:+.2f}]",
                "–" if baseline else f"{row['p_holm']:.2g}",
                f"{100 * row['top5']:.2f}",
                f"{100 * row['mean_per_class']:.2f}",
                f"{row['learning_rate']:g}{edge}" if "learning_rate" in row else "–",
                f"{100 * row['heldout_accuracy']:.2f}",
            ]
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    for run in parser.parse_args().runs:
        found = Verification.load(run)
        print(f"### `{found.name}` ({found.paradigm})\n")
        for line in (list(HEADINGS), ["---"] * len(HEADINGS), *rows(found)):
            print(f"| {' | '.join(line)} |")
        diverged = found.manifest["diverged"]
        print(
            f"\n{found.conditions} Protocol hash {found.manifest['protocol']['hash']}; probes that diverged: ", end=""
        )
        print(f"{len(diverged)}.\n")


if __name__ == "__main__":
    main()
