"""What an earlier sitting of an analysis left, to be gone on with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vitprobe.data.batches import Key
from vitprobe.data.shards import Share
from vitprobe.profile.values import ShardValues
from vitprobe.runs.folder import RunFolder


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

    def rest(self, rank: int, size: int) -> Share:
        """What of the work is left for one of several processes."""
        return Share(rank, size, self.done, self.ended)


def read_begun(folder: RunFolder) -> Begun | None:
    """What there is of a run in a folder; None where none was begun.

    Raises:
        UserError: for a run of a newer format, or a broken shard.
    """
    if not folder.holds_run:
        return None
    manifest = folder.read()
    whole = {key: head for key, head in ShardValues(folder.path).heads.items() if head.whole}
    ends = {key[0]: key[1] for key, head in whole.items() if head.ends}
    return Begun(
        manifest,
        frozenset(whole),
        frozenset(part for part, end in ends.items() if all((part, piece) in whole for piece in range(end))),
        sum(len(head.names) + len(head.skipped) for head in whole.values()),
    )
