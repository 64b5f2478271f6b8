"""The paper's findings on the zoo: the tables, the figure and the claims of docs/findings.md.

    python -m zoo.findings measure --test cifar10_test.tar --verified runs/cifar --out runs/zoo
    python -m zoo.findings

The first reads the bundled models, the comparison runs under `--out` and the verifications under `--verified`, and
writes `zoo/measured/*.csv` and `figures/findings.*` (10 minutes on a core). The second prints the
tables from these files.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

import vitprobe as vp
from vitprobe.figures.style import style
from vitprobe.models.loaded import LoadedModel
from vitprobe.profile.intervals import estimate
from vitprobe.profile.profile import Profile
from vitprobe.statistics import comparable, of_the_paper, select
from zoo.objectives import build_objective
from zoo.recipe import load_recipe

ROOT = Path(__file__).parent.parent
TABLES = Path(__file__).parent / "measured"
FIGURE = ROOT / "figures" / "findings"

# The paper's three, and the share of the entropy that models are compared by: the table's order.
STATISTICS = tuple(each.name for each in select([s.name for s in (*of_the_paper(), *comparable())]))
LATE = slice(8, 12)  # the last third of 12 blocks, as in a diagnosis
BUNDLED = (
    *("mae_vit_nano", "mae_xavier_vit_nano", "mae_ft_vit_nano"),
    *("mocov3_vit_nano", "supervised_vit_nano", "random_vit_nano"),
)
# Trained for the comparison and not shipped: MAE on as many views as the others had.
COMPARED = ("mae10_vit_nano",)


@dataclass(frozen=True)
class Claim:
    """One sentence of the paper as a comparison: does `one` have more of `statistic` than `other`, in late blocks?"""

    words: str
    statistic: str
    one: str
    other: str


def _claims(mae: str) -> tuple[Claim, ...]:
    share, own = "cls_entropy_share", "patch_self_attention_ratio"
    return (
        Claim("[cls] of MAE keeps more for itself than that of MoCo v3", "cls_self_attention", mae, "mocov3_vit_nano"),
        Claim("its entropy is higher than MoCo v3's", share, mae, "mocov3_vit_nano"),
        Claim("its entropy is higher than the supervised model's", share, mae, "supervised_vit_nano"),
        Claim("patches of MAE look more at themselves than MoCo v3's", own, mae, "mocov3_vit_nano"),
        Claim("patches of MAE look more at themselves than the supervised model's", own, mae, "supervised_vit_nano"),
    )


CLAIMS = (
    *_claims("mae_vit_nano"),
    *_claims("mae_xavier_vit_nano"),
    Claim("fine-tuning lowers the entropy of MAE's [cls]", "cls_entropy_share", "mae_vit_nano", "mae_ft_vit_nano"),
    *(claim for mae in COMPARED for claim in _claims(mae)),
)


def trained(name: str, out: Path) -> LoadedModel:
    """A finished run of the zoo that the package does not ship."""
    recipe = load_recipe(name)
    state = torch.load(out / name / "checkpoint.pt", map_location="cpu", weights_only=True)
    if state["epoch"] != recipe.epochs:
        raise SystemExit(f"{out / name} has run {state['epoch']} of {recipe.epochs} epochs; train it to its end first")
    objective = build_objective(recipe)
    objective.load_state_dict(state["objective"])
    model = vp.load_model("random_vit_nano")
    model.module.load_state_dict(objective.vit.state_dict())
    return replace(model, spec=replace(model.spec, name=name, method=recipe.method, paradigm="MIM"))


def curves(profile: Profile) -> pd.DataFrame:
    """Means over heads and their intervals, a row a statistic and block."""
    table = profile.table(STATISTICS).query("head.isna()")
    return table.filter(["model", "statistic", "block", "mean", "ci_low", "ci_high", "n"])


def late(profile: Profile) -> pd.DataFrame:
    """Means over heads and late blocks and their intervals, a row a statistic."""
    rows = [(name, profile.estimate(name, LATE)) for name in STATISTICS]
    return pd.DataFrame(
        [
            {"model": profile.name, "weights": profile.manifest["model"]["weights_sha256"][:12], "statistic": name}
            | {"mean": float(e.mean), "ci_low": float(e.low), "ci_high": float(e.high), "n": e.n}
            for name, e in rows
        ]
    )


def late_by_image(profile: Profile, statistic: str) -> np.ndarray:
    """One value an image: the mean over heads and late blocks."""
    return profile.values.read(statistic).astype(np.float64).mean(axis=2)[:, LATE].mean(axis=1)


def judge(claim: Claim, profiles: dict[str, Profile]) -> dict[str, object]:
    """The two means and their difference, paired by image, with its interval."""
    one, other = (late_by_image(profiles[name], claim.statistic) for name in (claim.one, claim.other))
    found = estimate(one - other, profiles[claim.one].values.groups, (-np.inf, np.inf))
    return {
        **vars(claim),
        "mean": one.mean(),
        "other_mean": other.mean(),
        "difference": float(found.mean),
        "ci_low": float(found.low),
        "ci_high": float(found.high),
        "n": found.n,
    }


def draw(profiles: list[Profile], to: Path, height: float) -> None:
    """Figures 3, 4 and 5 of the paper side by side; `height` in inches leaves room for the legend."""
    with style():
        figure = Figure(figsize=(10.2, height), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
    vp.figures.cls_self_attention(profiles, ax=left)
    vp.figures.cls_entropy(profiles, ax=middle)
    vp.figures.patch_self_attention_ratio(profiles, ax=right)
    for path in vp.figures.save_figure(figure, to):
        print(path.name)


def measure(test: Path, verified: Path, out: Path) -> None:
    """Compute everything and write the tables and the figure."""
    models = {name: name for name in BUNDLED} | {name: trained(name, out) for name in COMPARED}
    found = [  # what an earlier call has finished is read again
        vp.analyze(model, test, statistics=STATISTICS, out=out / "profiles" / name, resume=True)
        for name, model in models.items()
    ]
    profiles = {profile.name: profile for profile in found}
    TABLES.mkdir(exist_ok=True)
    pd.concat([curves(profile) for profile in found]).to_csv(TABLES / "curves.csv", index=False, float_format="%.6g")
    pd.concat([late(profile) for profile in found]).to_csv(TABLES / "late.csv", index=False, float_format="%.6g")
    claims = pd.DataFrame([judge(claim, profiles) for claim in CLAIMS])
    claims.to_csv(TABLES / "claims.csv", index=False, float_format="%.6g")
    gains = pd.concat(
        [
            vp.Verification.load(path.parent).table().assign(model=path.parent.name)
            for path in sorted(verified.glob("*/accuracy.csv"))
        ]
    )
    gains.to_csv(TABLES / "aggregation.csv", index=False, float_format="%.6g")
    draw([profiles[name] for name in BUNDLED], FIGURE, 4.7)


def stored(name: str) -> list[dict[str, Any]]:
    """The rows of one of the tables."""
    return pd.read_csv(TABLES / f"{name}.csv").to_dict("records")


def interval(row: dict[str, Any], mean: str = "mean", ends: str = "ci", sign: str = "") -> str:
    """In percent."""
    low, high = row[f"{ends}_low"], row[f"{ends}_high"]
    return f"{100 * row[mean]:{sign}.2f} [{100 * low:{sign}.2f}, {100 * high:{sign}.2f}]"


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (headings, ["---"] * len(headings), *rows))


def late_table() -> str:
    """What each model's late blocks do, in percent."""
    found = {(row["model"], row["statistic"]): interval(row) for row in stored("late")}
    headings = ("model", "[cls] self-attention", "[cls] entropy / log N", "patch self-attention / patches")
    shown = [statistic.name for statistic in comparable()]
    return markdown(headings, [[f"`{m}`", *(found[m, name] for name in shown)] for m in (*BUNDLED, *COMPARED)])


def claims_table() -> str:
    """The claims, each with both means and their difference, in percent."""
    rows = []
    for row in stored("claims"):
        verdict = "yes" if row["ci_low"] > 0 else "no" if row["ci_high"] < 0 else "not told apart"
        models = f"`{row['one']}`, `{row['other']}`"
        means = f"{100 * row['mean']:.2f}, {100 * row['other_mean']:.2f}"
        rows.append([row["words"], models, means, interval(row, "difference", sign="+"), verdict])
    return markdown(("claim", "models", "late blocks, %", "difference, points", "here"), rows)


def gains_table() -> str:
    """What aggregations of the patches give over [cls], in points of accuracy."""
    found = {(row["model"], row["aggregator"]): row for row in stored("aggregation")}
    rows = [
        [
            f"`{model}`",
            interval(found[model, "cls"], "accuracy"),
            *(interval(found[model, name], "gain", "gain_ci", "+") for name in ("gap", "abmilp", "ep")),
        ]
        for model in BUNDLED
        if (model, "cls") in found
    ]
    return markdown(("model", "accuracy of [cls], %", "average", "AbMILP", "EP"), rows)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command")
    measuring = commands.add_parser("measure")
    measuring.add_argument("--test", type=Path, required=True, help="tar of <class>/<n>.jpg")
    measuring.add_argument("--verified", type=Path, required=True, help="folder of `vitprobe verify`, a model each")
    measuring.add_argument("--out", type=Path, default=Path("runs/zoo"), help="folder of the comparison runs")
    args = parser.parse_args()
    if args.command:
        measure(args.test, args.verified, args.out)
    else:
        print(late_table(), claims_table(), gains_table(), sep="\n\n")


if __name__ == "__main__":
    main()
