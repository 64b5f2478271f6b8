"""What a figure reads of profiles: one curve over blocks a model, and which models have none and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import pandas as pd

from vitprobe.errors import UserError
from vitprobe.models.tokens import TokenLayout


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
        rows: the mean over heads, a row a block in the order of blocks.
        heads: head → the same for that head; empty where there is one value a block.
    """

    name: str
    paradigm: str
    layout: TokenLayout
    num_blocks: int
    rows: pd.DataFrame
    heads: dict[int, pd.DataFrame]

    @property
    def has_interval(self) -> bool:
        """Whether there is an interval at any block (it takes two independent images)."""
        return bool((self.rows["ci_low"].notna() & self.rows["ci_high"].notna()).any())

    @property
    def is_geometric(self) -> bool:
        """Whether its centre is the geometric mean, as for unbounded ratios."""
        return bool((self.rows["interval"] == "log-t").any())


def as_list(profiles: ProfileLike | Sequence[ProfileLike]) -> list[ProfileLike]:
    """The profiles as a list, one alone too.

    Raises:
        UserError: if there is none.
    """
    several = [profiles] if isinstance(profiles, ProfileLike) else list(profiles)
    if not several:
        raise UserError("there is no profile to draw; give one profile or several (vitprobe.Profile.load reads a run)")
    return several


def read_curves(profiles: Sequence[ProfileLike], statistic: str) -> tuple[list[Curve], list[tuple[str, str]]]:
    """The curve of each profile that has one, and `(name, reason)` of each that has none."""
    curves, missing = [], []
    for name, profile in zip(_distinct([profile.name for profile in profiles]), profiles, strict=True):
        reason = profile.undefined.get(statistic)
        if reason is None:
            table = profile.table([statistic])
            table = table[table["statistic"] == statistic].sort_values("block")
            rows = table[table["head"].isna()]
            if rows["center"].notna().any():
                heads = {int(head): of_head for head, of_head in table[table["head"].notna()].groupby("head")}
                curves.append(Curve(name, profile.paradigm, profile.layout, profile.num_blocks, rows, heads))
                continue
            reason = "not in its profile"
        missing.append((name, reason))
    return curves, missing


def _distinct(names: Sequence[str]) -> list[str]:
    """Number the names that occur more than once: two runs of one model are two lines."""
    return [
        f"{name} #{list(names[: position + 1]).count(name)}" if list(names).count(name) > 1 else name
        for position, name in enumerate(names)
    ]
