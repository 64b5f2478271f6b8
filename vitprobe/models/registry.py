"""Names of models: finding one, listing all, and what was probably meant. Imports neither torch nor timm."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple
from difflib import get_close_matches
from typing import TYPE_CHECKING

from vitprobe.models.caches import is_downloaded
from vitprobe.models.entries import ModelSpec
from vitprobe.models.official.entries import find_official
from vitprobe.models.paradigms import find_paradigm
from vitprobe.models.registered import SHIPPED, find_registration, registered_specs

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("name", "method", "paradigm", "architecture", "source", "licence", "status")

_BY_NAME = {spec.name: spec for spec in SHIPPED} | {spec.source: spec for spec in SHIPPED}


def all_specs() -> tuple[ModelSpec, ...]:
    """Return every entry of the registry: the bundled models first, those registered in this process last."""
    return (*SHIPPED, *registered_specs())


def find_spec(name: str) -> ModelSpec | None:
    """Return the entry of an alias ("mae_vit_b") or of a tagged timm name ("vit_base_patch16_224.mae"), or None."""
    registered = find_registration(name)
    return registered.spec if registered else _BY_NAME.get(name) or _BY_NAME.get(f"timm:{name}")


def nearest(name: str, candidates: Iterable[str]) -> list[str]:
    """Up to 5 of the candidates that `name` may have been meant for, the likeliest first; maybe none."""
    known = {candidate.casefold(): candidate for candidate in candidates}
    wanted = name.casefold()
    likely = get_close_matches(wanted, known, n=5, cutoff=0.6)
    likely += sorted((key for key in known if wanted and wanted in key and key not in likely), key=len)
    return [known[key] for key in likely[:5]]


def status(spec: ModelSpec) -> str:
    """Say what it takes to have a model's weights; asks no network.

    "bundled" (they are in the package, or made from a seed), "downloaded" (they are in a local cache), "" (they can be
    downloaded), "by hand" (no program can download them), "no source" (nobody offers them), and of a registered file
    or folder "local", or "missing" where it is not there.
    """
    registered = find_registration(spec.name)
    if registered is not None and registered.path is not None:
        return "local" if registered.path.exists() else "missing"
    if spec.source.startswith(("bundled:", "seed:")):
        return "bundled"
    entry = find_official(spec.source)
    if entry is not None and not entry.address:
        return "by hand" if entry.by_hand else "no source"
    return "downloaded" if is_downloaded(spec) else ""


def list_models(filter: str | None = None, *, paradigm: str | None = None) -> pd.DataFrame:
    """Return a table of the models known by name, one row each: shipped ones, then those registered in this process.

    Columns: name, method, paradigm, architecture, source, licence, and status (see `status`).

    Args:
        filter: words; each must occur in some field of an entry (the citation and the notes too), in any case.
        paradigm: keep this one only: "MIM", "JEA", "hybrid", "supervised", "VLM", "other", "random". Default: all.

    Raises:
        UserError: for an unknown paradigm.

    Example:
        >>> list_models("mae nano")["name"].tolist()
        ['mae_vit_nano', 'mae_xavier_vit_nano', 'mae_ft_vit_nano']
    """
    import pandas as pd  # takes most of a second; `vitprobe --help` does without

    wanted = None if paradigm is None else find_paradigm(paradigm)
    words = (filter or "").casefold().split()
    rows = []
    for spec in all_specs():
        if wanted is not None and spec.paradigm != wanted:
            continue
        state = status(spec)
        text = " ".join((*astuple(spec), state)).casefold()
        if all(word in text for word in words):
            rows.append([state if column == "status" else getattr(spec, column) for column in COLUMNS])
    return pd.DataFrame(rows, columns=list(COLUMNS))
