"""A run under way: the shard that is filling, the folder that finished ones go to, and the manifest's last word."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from vitprobe.data.batches import Batch, Key
from vitprobe.errors import UserError
from vitprobe.hooks.capture import Capture
from vitprobe.profile.profile import Profile
from vitprobe.profile.stopping import Stopper
from vitprobe.profile.values import Arrays, MemoryValues, Shard, ShardValues
from vitprobe.runs.folder import (
    check_output,
    clear_results,
    clear_run,
    clear_unfinished,
    read_manifest,
    write_manifest,
)
from vitprobe.runs.processes import World
from vitprobe.runs.same import Begun


class Run:
    """Where an analysis puts its values. Its folder is claimed when the first batch has gone well.

    Attributes:
        manifest: what the run is made of, so far.
        folder: where it goes; None for memory.
        values: the shards that this process has finished.
        stopper: with a tolerance, once the folder is claimed: what tells when the shards are enough.
    """

    def __init__(self, manifest: dict[str, Any], folder: Path | None, world: World, begun: Begun | None) -> None:
        self.manifest, self.folder, self.world, self.begun = manifest, folder, world, begun
        self.values: MemoryValues | ShardValues = MemoryValues()
        self.claimed = False
        self.stopper: Stopper | None = None
        self._began = time.perf_counter()
        self._filling: list[tuple[Batch, Arrays]] = []
        self._early: list[tuple[Key, Shard]] = []  # shards without a readable image, before any with one

    def add(self, batch: Batch, values: Arrays | None, attention: Capture) -> bool:
        """Take a batch and its values (None where no image was readable); whether a shard was finished by it."""
        if len(batch.shard) > 1 and self.manifest["arguments"]["tolerance"] is not None:
            raise UserError(
                "a stream comes in its own order, and --tolerance draws images at random: give a folder, tar or list"
            )
        if values is not None and not self.claimed:
            self._claim(attention)
        self._filling.append((batch, values or {}))
        if batch.last:
            self._close(whole=True)
        return batch.last

    def enough(self) -> bool:
        """Whether the shards finished so far, of all processes, are all that a tolerance asks for.

        Process 0 decides, and says so in the manifest; the others hear of it after the shard that they are at.
        """
        if self.stopper is None:
            return False
        if not self.world.first:
            assert self.folder is not None  # of several processes
            return "stopping" in read_manifest(self.folder)
        if self.stopper.follow(self.values) and self.world.size > 1:
            assert self.folder is not None
            write_manifest(self.folder, {**self.manifest, "stopping": self.stopper.describe()})
        return self.stopper.enough

    def finish(self) -> Profile:
        """All images have come: write what is left, and in process 0 the summary and the manifest.

        Raises:
            UserError: where no image could be read, or shards of other processes are not to be seen.
        """
        self._close(whole=True)
        if not self.claimed:
            self._claim(None)
        notes = self.world.gather(self.manifest["out_of_memory"])
        self.manifest["out_of_memory"] = [note for of_process in notes for note in of_process]
        self.world.on_first(lambda: self._conclude("complete"))
        return self.profile

    def interrupt(self) -> None:
        """Ctrl-C came: keep what is done, also of the shard in flight."""
        if not self.claimed:
            return
        self._close(whole=False)
        if self.world.first:
            self._conclude("interrupted")

    def abandon(self) -> int:
        """After an error: how many images are kept in finished shards; without any, no folder is left."""
        if self.folder is None or not self.claimed:
            return 0
        kept = len(self.values.names)
        with suppress(UserError, OSError):  # the disk may be why we are here
            if kept or self.begun or self.world.size > 1:
                if self.world.first:
                    write_manifest(self.folder, {**self.manifest, "status": "failed"})
            else:
                clear_run(self.folder)
                self.folder.rmdir()  # unless it holds something else
        return kept

    @property
    def profile(self) -> Profile:
        """The result so far."""
        return Profile(self.manifest, self.values)

    def _close(self, whole: bool) -> None:
        """The shard that is filling is full, or as full as it gets."""
        if not self._filling:
            return
        batches = [batch for batch, _ in self._filling]
        filled = [values for _, values in self._filling if values]
        shard = Shard(
            names=[name for batch in batches for name in batch.names],
            groups=[group for batch in batches for group in batch.groups],
            arrays={name: np.concatenate([values[name] for values in filled]) for name in (filled or [{}])[0]},
            skipped=[bad for batch in batches for bad in batch.skipped],
            whole=whole,
            ends=whole and batches[-1].ends,
        )
        self._filling = []
        if self.claimed:
            self.values.add(shard, batches[0].shard)
        else:
            self._early.append((batches[0].shard, shard))

    def _claim(self, attention: Capture | None) -> None:
        """From here on the run is worth keeping. Every process comes here once: some with a batch, some without."""
        said = self.world.gather((_facts(attention), [bad for _, shard in self._early for bad in shard.skipped]))
        facts: list[Mapping[str, Any]] = [fact for fact, _ in said if fact is not None]
        if self.begun is not None:
            facts.append({key: self.begun.manifest.get(key) for key in ("layout", "undefined", "signed")})
        if not facts:
            skipped = [bad for _, some in said for bad in some]
            reason = f"; the first: {skipped[0][0]} ({skipped[0][1]})" if skipped else ""
            source = self.manifest["data"]["source"]
            raise UserError(f"none of the {len(skipped)} images of {source} could be read{reason}")
        if any(fact["layout"] != facts[0]["layout"] for fact in facts):
            raise UserError(
                "images of several sizes came, to one process or another, or before --resume: give one size"
            )
        self.manifest.update(facts[0])
        self.claimed = True
        if self.folder is not None:
            self.world.on_first(self._open_folder)
            self.values = ShardValues(self.folder)
        for key, shard in self._early:
            self.values.add(shard, key)
        self.stopper = self._new_stopper()

    def _new_stopper(self) -> Stopper | None:
        arguments = self.manifest["arguments"]
        if arguments["tolerance"] is None:
            return None
        grouped, signed = self.manifest["data"]["grouped"], bool(self.manifest["signed"])
        return Stopper(arguments["tolerance"], self.profile.layout, signed, grouped)

    def _open_folder(self) -> None:
        assert self.folder is not None
        if self.begun is None:
            check_output(self.folder, overwrite=True)
            clear_results(self.folder)
        else:
            clear_unfinished(self.folder)
            before = self.begun.manifest
            self.manifest["started"] = before.get("started", self.manifest["started"])
            now = datetime.now(UTC).isoformat(timespec="seconds")
            self.manifest["resumed"] = [*before.get("resumed", []), now]
            self.manifest["out_of_memory"][:0] = before.get("out_of_memory", [])
            self._began -= before.get("wall_seconds", 0)
        write_manifest(self.folder, self.manifest)

    def _conclude(self, status: str) -> None:
        """Process 0: the manifest's last word, and the summary."""
        if self.folder is not None and self.world.size > 1:
            self.values = ShardValues(self.folder)  # with what the others wrote
        values = self.values
        if self.stopper is not None and status == "complete":
            if self.stopper.follow(values) and isinstance(values, ShardValues):
                values.keep(self.stopper.shards)
                self.manifest["data"]["shards"] = self.stopper.shards
            self.manifest["stopping"] = self.stopper.describe()
        self.manifest["status"] = status
        self.manifest["wall_seconds"] = round(time.perf_counter() - self._began, 2)
        self.manifest["data"] |= {
            "analysed": len(values.names),
            "groups": len(set(values.groups)),
            "skipped": [{"name": name, "reason": reason} for name, reason in values.skipped],
        }
        if status == "complete":
            self._say_too_few(len(values.names) + len(values.skipped))
        shards = self.manifest["data"].get("shards")
        if isinstance(values, ShardValues) and status == "complete" and shards not in (None, len(values.heads)):
            raise UserError(
                f"{len(values.heads)} of the {shards} shards are in {self.folder}: --out must be a folder that every "
                f"process sees, on a disk that the machines share"
            )
        if self.folder is not None:
            self.profile.save(self.folder)

    def _say_too_few(self, came: int) -> None:
        """A remark where fewer images came than were asked for, and not because they were enough."""
        asked = self.manifest["arguments"]["num_images"]
        if asked is not None and came < asked and not (self.stopper is not None and self.stopper.enough):
            self.manifest["remarks"] = [
                *self.manifest["remarks"],
                f"asked for {asked} images; there {'is' if came == 1 else 'are'} {came}",
            ]


def _facts(attention: Capture | None) -> dict[str, Any] | None:
    """What the manifest says of a model that only a batch can tell; None where none has come."""
    if attention is None:
        return None
    return {
        # as JSON has it, so that it equals that of a run resumed
        "layout": json.loads(json.dumps(asdict(attention.layout))) if attention.layout else None,
        "undefined": attention.undefined,
        "signed": attention.signed,
        "kernels": sorted(attention.kernels),
    }
