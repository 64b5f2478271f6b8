"""What a figure reads of profiles: one curve over blocks a model, and which models have none and why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd

from vitprobe.errors import UserError
from vitprobe.layout import TokenLayout
from vitprobe.profile.intervals import FEW, about, on_log_scale


@runtime_checkable
class ProfileLike(Protocol):
    """What figures ask of a profile (`vitprobe.Profile` has it all)."""

    @property
    def name(self) -> str:
        """The model's name."""
        ...

    @property
    def paradigm(self) -> str:
        """How it was pretrained: "MIM", "JEA", "hybrid", "supervised", "VLM", "random" or "unknown"."""
        ...

    @property
    def layout(self) -> TokenLayout:
        """Its tokens."""
        ...

    @property
    def num_blocks(self) -> int:
        """Its depth."""
        ...

    @property
    def undefined(self) -> dict[str, str]:
        """Statistic → why this model has none."""
        ...

    def bounds(self, statistic: str) -> tuple[float, float]:
        """Lowest and highest possible value of a statistic of this profile; infinite where there is none."""
        ...

    def table(self, statistics: Sequence[str] | None = None) -> pd.DataFrame:
        """Rows of block, head (<NA>: the mean over heads), statistic, center, ci_low, ci_high, interval, …."""
        ...


@dataclass(frozen=True)
class Curve:
    """One statistic of one model over its blocks.

    Attributes:
        name: the model's name, numbered where several profiles bear the same.
        paradigm: how it was pretrained.
        layout: its tokens.
        num_blocks: its depth.
        bounds: lowest and highest possible value of the statistic for this model.
        rows: the mean over heads, a row a block in the order of blocks.
        heads: head → the same for that head; empty where there is one value a block.
        unfinished: how far the run came, if it is not complete ("64 of 200 images").
    """

    name: str
    paradigm: str
    layout: TokenLayout
    num_blocks: int
    bounds: tuple[float, float]
    rows: pd.DataFrame
    heads: dict[int, pd.DataFrame]
    unfinished: str | None = None

    @property
    def has_interval(self) -> bool:
        """Whether there is an interval at any block."""
        return bool(np.isfinite(self.rows[["ci_low", "ci_high"]].to_numpy(float)).all(axis=1).any())

    @property
    def no_interval(self) -> str | None:
        """Why there is no interval at any block; None if there is one."""
        if self.has_interval:
            return None
        few = int(self.rows["n"].to_numpy(int).min()) < 2
        if few:
            return "fewer than two independent images"
        return "an image has a ratio of 0 or ∞" if "none" in set(self.rows["interval"]) else "all ratios are the same"

    @property
    def is_ratio(self) -> bool:
        """Whether its values are ratios without an upper bound, for a logarithmic axis."""
        return on_log_scale(self.bounds)

    @property
    def is_signed(self) -> bool:
        """Whether its values may lie below 0, as those of differential attention."""
        return self.bounds[0] < 0

    @property
    def few(self) -> int | None:
        """The number of independent images where its intervals rest on few; None where they do not."""
        n = int(self.rows["n"].to_numpy(int).min())
        return n if self.no_interval is None and n < FEW else None

    @property
    def is_geometric(self) -> bool:
        """Whether its centre is the geometric mean, as for unbounded ratios."""
        return "geometric mean" in {about(kind) for kind in self.rows["interval"]}


Profiles = ProfileLike | Sequence[ProfileLike]


def as_list(profiles: Profiles | object) -> list[ProfileLike]:
    """The profiles as a list, one alone too.

    Raises:
        UserError: if there is none, or something else.
    """
    several = listed(profiles, ProfileLike)
    if not several:
        raise UserError("there is no profile to draw; give one profile or several (vitprobe.Profile.load reads a run)")
    return [as_profile(profile) for profile in several]


def listed(given: object, kind: type) -> list[object]:
    """What was given as a list: one thing of this kind alone, or anything that can be gone through."""
    return list(given) if isinstance(given, Iterable) and not isinstance(given, kind | str) else [given]


def as_profile(given: object) -> ProfileLike:
    """What was given, if it is a profile.

    Raises:
        UserError: if it is none.
    """
    if not isinstance(given, ProfileLike):
        raise UserError(
            f"figures draw profiles (what vitprobe.analyze and vitprobe.Profile.load give), "
            f"not a {type(given).__name__}"
        )
    return given


def read_curves(profiles: Sequence[ProfileLike], statistic: str) -> tuple[list[Curve], list[tuple[str, str]]]:
    """The curve of each profile that has one, and `(name, reason)` of each that has none."""
    curves, missing = [], []
    for name, profile in zip(distinct([profile.name for profile in profiles]), profiles, strict=True):
        reason = profile.undefined.get(statistic)
        curve = None
        if reason is None:
            try:
                curve = _read_curve(name, profile, statistic)
                reason = "no finite value"
            except UserError as error:  # one run may lack what others have: it was not asked for there
                reason = str(error).removeprefix(f"{profile.name} has no {statistic}: ")
        if curve is None:
            missing.append((name, reason))
        else:
            curves.append(curve)
    return curves, missing


def _read_curve(name: str, profile: ProfileLike, statistic: str) -> Curve | None:
    table = profile.table([statistic]).sort_values(by="block")
    rows = _where(table, table["head"].isna())
    if not np.isfinite(rows["center"].to_numpy(float)).any():
        return None
    heads = sorted(table["head"].dropna().unique())
    of_head = {int(head): _where(table, (table["head"] == head).fillna(False)) for head in heads}
    bounds, unfinished = profile.bounds(statistic), getattr(profile, "unfinished", None)
    return Curve(name, profile.paradigm, profile.layout, profile.num_blocks, bounds, rows, of_head, unfinished)


def _where(table: pd.DataFrame, mask: Any) -> pd.DataFrame:
    return pd.DataFrame(table[mask])


def distinct(names: Sequence[str]) -> list[str]:
    """Number the names that occur more than once: two runs of one model are two lines."""
    return [
        f"{name} #{list(names[: position + 1]).count(name)}" if list(names).count(name) > 1 else name
        for position, name in enumerate(names)
    ]
