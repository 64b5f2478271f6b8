"""Names of models: finding one, listing all, and what was probably meant. Imports neither torch nor timm."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple
from difflib import get_close_matches
from typing import TYPE_CHECKING

from vitprobe.errors import UserError
from vitprobe.models.entries import ENTRIES, PARADIGMS, ModelSpec
from vitprobe.models.hub import is_downloaded
from vitprobe.models.official.entries import OFFICIAL, find_official

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("name", "method", "paradigm", "architecture", "source", "licence", "status")

_SPECS = (*ENTRIES, *(entry.spec for entry in OFFICIAL.values()))
_BY_NAME = {spec.name: spec for spec in _SPECS} | {spec.source: spec for spec in _SPECS}


def all_specs() -> tuple[ModelSpec, ...]:
    """Every entry of the registry, the bundled models first."""
    return _SPECS


def find_spec(name: str) -> ModelSpec | None:
    """The entry of an alias ("mae_vit_b") or of a tagged timm name ("vit_base_patch16_224.mae"), or None."""
    return _BY_NAME.get(name) or _BY_NAME.get(f"timm:{name}")


def nearest(name: str, candidates: Iterable[str]) -> list[str]:
    """Up to 5 of the candidates that `name` may have been meant for, the likeliest first; maybe none."""
    known = {candidate.casefold(): candidate for candidate in candidates}
    wanted = name.casefold()
    likely = get_close_matches(wanted, known, n=5, cutoff=0.6)
    likely += sorted((key for key in known if wanted and wanted in key and key not in likely), key=len)
    return [known[key] for key in likely[:5]]


def status(spec: ModelSpec) -> str:
    """What it takes to have a model's weights; asks no network.

    "bundled" (they are in the package, or made from a seed), "downloaded" (they are in a local cache), "" (they can be
    downloaded), "by hand" (no program can download them) or "no source" (nobody offers them).
    """
    if spec.source.startswith(("bundled:", "seed:")):
        return "bundled"
    entry = find_official(spec.source)
    if entry is not None and not entry.address:
        return "by hand" if entry.by_hand else "no source"
    return "downloaded" if is_downloaded(spec) else ""


def list_models(filter: str | None = None, *, paradigm: str | None = None) -> pd.DataFrame:
    """A table of the models known by name, one row each.

    Columns: name, method, paradigm, architecture, source, licence, and status (see `status`).

    Args:
        filter: words; each must occur in some field of an entry (the citation and the notes too), in any case.
        paradigm: keep this one only ("MIM", "JEA", "hybrid", "supervised", "VLM").

    Raises:
        UserError: for an unknown paradigm.

    Example:
        >>> list_models("mae nano")["name"].tolist()
        ['mae_vit_nano', 'mae_xavier_vit_nano', 'mae_ft_vit_nano']
    """
    import pandas as pd  # takes most of a second; `vitprobe --help` does without

    paradigms = {known.casefold(): known for known in PARADIGMS}
    if paradigm is not None and paradigm.casefold() not in paradigms:
        raise UserError(f"unknown paradigm {paradigm!r}: use one of {', '.join(PARADIGMS)}")
    words = (filter or "").casefold().split()
    rows = []
    for spec in _SPECS:
        if paradigm is not None and spec.paradigm != paradigms[paradigm.casefold()]:
            continue
        state = status(spec)
        text = " ".join((*astuple(spec), state)).casefold()
        if all(word in text for word in words):
            rows.append([state if column == "status" else getattr(spec, column) for column in COLUMNS])
    return pd.DataFrame(rows, columns=list(COLUMNS))
