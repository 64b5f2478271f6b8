"""Accuracy with [cls] and with selective aggregation, bars a model: the teaser of "Beyond [cls]" (arXiv 2412.03215)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from vitprobe.errors import UserError
from vitprobe.figures.captions import POINTS, add_below, set_axis_labels, wrap
from vitprobe.figures.curves import distinct, listed
from vitprobe.figures.style import COLUMN_WIDTH, NOTE_SIZE, TICK_SIZE, new_axes, paradigm_look, style

SELECTIVE = ("abmilp",)  # the paper's

_GROUP_WIDTH, _MARGIN = 0.72, 0.55  # inches: a model's bars, and what stands left of the first
_FILLED = 0.85  # of the room for a model


@runtime_checkable
class VerificationLike(Protocol):
    """What this figure asks of a verification (`vitprobe.Verification` has it all)."""

    @property
    def name(self) -> str:
        """The model's name."""
        ...

    @property
    def paradigm(self) -> str:
        """How it was pretrained."""
        ...

    @property
    def protocol(self) -> str:
        """The protocol's name."""
        ...

    @property
    def data(self) -> str:
        """The labelled set's name."""
        ...

    def table(self, measure: str = "top1") -> pd.DataFrame:
        """Rows of label, aggregator, block, norm, accuracy, ci_low, ci_high, gain, gain_ci_low, …, gain_over, seeds."""
        ...


@dataclass(frozen=True)
class _Group:
    """The bars of one model: the baseline's row of the table, then those of the aggregators."""

    name: str
    paradigm: str
    rows: list[dict[str, Any]]


def selective_aggregation(
    verifications: VerificationLike | Sequence[VerificationLike] | object,
    aggregators: Sequence[str] = SELECTIVE,
    *,
    ax: Axes | None = None,
) -> Axes:
    """Draw accuracy with [cls] beside accuracy with selective aggregation, and give the axes drawn on (never shown).

    A model's first bar is what its gains are over: [cls], or gap where there is none. Lines are the 95 % intervals of
    the accuracies; under each model stands the paired gain of the last bar, with its own interval.

    Args:
        verifications: one verification or several.
        aggregators: one more bar each; labels of the tables, or without a place (`abmilp`): the deepest block's then,
            without the final norm if there is a choice. The default is the paper's, and not the best one of the table:
            that would be selected on the test images.
        ax: axes to draw on; a new figure, as wide as its models ask for, without. The legend stands under the axes, so
            give yours in a figure with `layout="constrained"`.

    Raises:
        UserError: for what is no verification, or where no model has these aggregators and a baseline.
    """
    several = _as_list(verifications)
    groups, missing = [], []
    for name, verification in zip(distinct([each.name for each in several]), several, strict=True):
        found = _read_group(name, verification, aggregators)
        if isinstance(found, _Group):
            groups.append(found)
        else:
            missing.append(f"{name} ({found})")
    if not groups:
        raise UserError(f"no model has all that is to be drawn: {'; '.join(missing)}")
    notes = _notes(several, groups, missing)
    with style():
        own = ax is None
        ax = new_axes() if ax is None else ax
        if own:
            width = max(COLUMN_WIDTH, _MARGIN + _GROUP_WIDTH * len(groups))
            ax.figure.set_size_inches(width, ax.figure.get_figheight())  # pyright: ignore
        _draw(ax, groups, aggregators, notes, own)
    return ax


def _as_list(given: object) -> list[VerificationLike]:
    several = listed(given, VerificationLike)
    if not several:
        raise UserError(
            "there is no verification to draw; give one or several (vitprobe.Verification.load reads a run)"
        )
    for each in several:
        if not isinstance(each, VerificationLike):
            raise UserError(
                f"this figure draws verifications (what vitprobe.verify and vitprobe.Verification.load give), "
                f"not a {type(each).__name__}"
            )
    return several  # pyright: ignore


def _read_group(name: str, verification: VerificationLike, aggregators: Sequence[str]) -> _Group | str:
    """The bars of one model, or why it has none."""
    rows = {row["label"]: row for row in verification.table().to_dict("records")}
    chosen = []
    for aggregator in aggregators:
        row = _deepest(aggregator, rows)
        if row is None:
            return f"has no {aggregator}, but {', '.join(map(str, rows))}"
        chosen.append(row)
    if not chosen:
        return "has nothing beside its baseline"
    baselines = {row["gain_over"] for row in chosen}
    if len(baselines) > 1:
        return f"gains are over different baselines: {', '.join(sorted(map(str, baselines)))}"
    baseline = rows.get(baselines.pop())
    return "has neither cls nor gap" if baseline is None else _Group(name, verification.paradigm, [baseline, *chosen])


def _deepest(aggregator: str, rows: Mapping[Any, dict[str, Any]]) -> dict[str, Any] | None:
    """The row of this label, or that of the deepest place at which this aggregator was read."""
    if aggregator in rows:
        return rows[aggregator]
    places = [row for row in rows.values() if row["aggregator"] == aggregator]
    return max(places, key=lambda row: (row["block"], not row["norm"]), default=None)


def _draw(ax: Axes, groups: Sequence[_Group], aggregators: Sequence[str], notes: Sequence[str], own: bool) -> None:
    count = len(aggregators) + 1
    width = _FILLED / count
    fills = [0.25 + 0.75 * rank / (count - 1) for rank in range(count)]
    for position, group in enumerate(groups):
        color = paradigm_look(group.paradigm).color
        for rank, (row, fill) in enumerate(zip(group.rows, fills, strict=True)):
            x = position + (rank - (count - 1) / 2) * width
            accuracy, low, high = (100 * float(row[column]) for column in ("accuracy", "ci_low", "ci_high"))
            ax.bar(x, accuracy, 0.94 * width, color=(color, fill), edgecolor=color, linewidth=0.7, label="_bar")
            ax.vlines(x, low, high, color="#222222", linewidth=1.0, label="_interval")
            ax.annotate(
                f"{accuracy:.1f}", xy=(x, high), xytext=(0, 1.5), textcoords="offset points", ha="center", va="bottom",
                fontsize=NOTE_SIZE,
            )  # fmt: skip
    ax.set_xlim(-0.5, len(groups) - 0.5)
    ax.set_ylim(0, min(112, 1.12 * ax.dataLim.y1))
    ax.figure.canvas.figure.draw_without_rendering()  # so that the axes have their width
    room = ax.get_window_extent().width * POINTS / ax.figure.dpi / len(groups)
    ax.set_xticks(range(len(groups)), [_label(group, room) for group in groups])
    ax.tick_params(axis="x", length=0)
    set_axis_labels(ax, "", "accuracy (%)")
    handles = [
        Line2D([], [], linestyle="", marker="s", markersize=7, markerfacecolor=("#444444", fill),
               markeredgecolor="#444444", label=words)
        for words, fill in zip([_baselines(groups), *aggregators], fills, strict=True)
    ]  # fmt: skip
    height = add_below(ax, handles, notes)
    if own:
        ax.figure.set_size_inches(ax.figure.get_figwidth(), ax.figure.get_figheight() + height)  # pyright: ignore


def _label(group: _Group, room: float) -> str:
    """The model's name, broken at its underscores where it is too long, and the gain of its last bar under it."""
    words = paradigm_look(group.paradigm).words
    full = f"{group.name} ({words})" if words else group.name
    name = wrap(full, room, TICK_SIZE)
    if any(len(word) > len(max(name.split("\n"), key=len)) for word in full.split()):
        name = wrap(full.replace("_", "_ "), room, TICK_SIZE).replace("_ ", "_")
    gain, low, high = (100 * float(group.rows[-1][column]) for column in ("gain", "gain_ci_low", "gain_ci_high"))
    return f"{name}\n{gain:+.1f}\n[{low:.1f}, {high:.1f}]"


def _is_cls(group: _Group) -> bool:
    return group.rows[0]["aggregator"] == "cls"


def _baselines(groups: Sequence[_Group]) -> str:
    return " or ".join(words for words, cls in (("[cls]", True), ("gap", False)) if cls in map(_is_cls, groups))


def _notes(several: Sequence[VerificationLike], groups: Sequence[_Group], missing: Sequence[str]) -> list[str]:
    """What a reader must know: what lines and numbers are, and what they are conditional on."""
    data, protocols = ("; ".join(dict.fromkeys(getattr(v, what) for v in several)) for what in ("data", "protocol"))
    one_seed = [group.name for group in groups if group.rows[0]["seeds"] == 1]
    varied = "test images alone (one seed)" if len(one_seed) == len(groups) else "test images and seeds"
    last = groups[0].rows[-1]["aggregator"]
    notes = [
        f"lines: 95 % intervals over {varied}; under the names: paired gain of {last} in points, with its interval",
        f"conditional on these backbone weights; {data}, protocol {protocols}",
    ]
    if 0 < len(one_seed) < len(groups):
        notes.append(f"one seed, so intervals are over test images alone: {', '.join(one_seed)}")
    without = [group.name for group in groups if not _is_cls(group)]
    if 0 < len(without) < len(groups):
        notes.append(f"first bar is gap, not [cls]: {', '.join(without)}")
    if missing:
        notes.append(f"not shown: {'; '.join(missing)}")
    return notes
