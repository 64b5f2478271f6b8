"""Going on with a run that was broken off: what is there, and whether it is the same run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitprobe.data.batches import Key
from vitprobe.errors import UserError
from vitprobe.profile.values import ShardValues
from vitprobe.runs.folder import is_run, read_manifest

# They change where or how fast numbers are made, not which.
FREE_ARGUMENTS = frozenset({"workers", "out", "overwrite", "resume", "distributed"})


@dataclass(frozen=True)
class Begun:
    """What an earlier sitting left.

    Attributes:
        manifest: its manifest.
        done: the shards that are there whole.
        ended: of a stream, the parts of which every shard is.
        images: read by the sittings before, good or bad.
    """

    manifest: dict[str, Any]
    done: frozenset[Key]
    ended: frozenset[int]
    images: int

    @property
    def complete(self) -> bool:
        """Whether there is nothing left to do."""
        return self.manifest.get("status") == "complete"


def read_begun(folder: Path) -> Begun | None:
    """What there is of a run in a folder; None where none was begun.

    Raises:
        UserError: for a run of a newer format, or a broken shard.
    """
    if not is_run(folder):
        return None
    manifest = read_manifest(folder)
    whole = {key: head for key, head in ShardValues(folder).heads.items() if head.whole}
    ends = {key[0]: key[1] for key, head in whole.items() if head.ends}
    return Begun(
        manifest,
        frozenset(whole),
        frozenset(part for part, end in ends.items() if all((part, piece) in whole for piece in range(end))),
        sum(len(head.names) + len(head.skipped) for head in whole.values()),
    )


def require_same(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Returns where two manifests are of one run: the same arguments, weights, transform and data.

    Raises:
        UserError: naming the first thing that differs.
    """
    for what, first, second in _pairs(before, now):
        if first != second:
            raise UserError(
                f"{folder} was begun with {what} {_shown(first)}, not {_shown(second)}, so --resume cannot go on; "
                f"give the same again, --overwrite to start anew, or another --out"
            )


def _pairs(before: dict[str, Any], now: dict[str, Any]):
    """Name and both values of everything that must be equal, most telling first."""
    for key, value in now["arguments"].items():
        if key not in FREE_ARGUMENTS:
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
