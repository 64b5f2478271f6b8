"""Whether a run that is to be gone on with is the same run, and the line that says what differs."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from vitprobe.errors import UserError


def require_same(folder: Path, before: dict[str, Any], now: dict[str, Any], free: Collection[str]) -> None:
    """Returns where two manifests are of one run: the same arguments, weights, transform and data.

    Args:
        folder: where the run is.
        before: its manifest.
        now: the manifest of what is asked for.
        free: arguments that may differ.

    Raises:
        UserError: naming the first thing that differs.
    """
    for what, first, second in _pairs(before, now, free):
        if first != second:
            raise UserError(
                f"{folder} was begun with {what} {_shown(first)}, not {_shown(second)}, so --resume cannot go on; "
                f"give the same again, --overwrite to start anew, or another --out"
            )


def _pairs(before: dict[str, Any], now: dict[str, Any], free: Collection[str]) -> Iterator[tuple[str, Any, Any]]:
    """Name and both values of everything that must be equal, most telling first."""
    for key, value in now["arguments"].items():
        if key not in free:
            yield key, before["arguments"].get(key), value
    yield "weights of SHA-256", before["model"].get("weights_sha256"), now["model"]["weights_sha256"]
    yield "dtype", before.get("dtype"), now["dtype"]
    yield "transform", before.get("transform"), now["transform"]
    for key, name in (("fingerprint", "images of fingerprint"), ("groups_sha256", "groups of SHA-256")):
        yield name, before.get("data", {}).get(key), now["data"][key]


def _shown(value: Any) -> str:
    """A value in a few words."""
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:12]}…"
