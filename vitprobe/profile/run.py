"""A run under way: the shard that is filling, the folder that finished ones go to, and the manifest's last word."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import numpy as np

from vitprobe.data.batches import Batch, Key
from vitprobe.errors import UserError
from vitprobe.hooks.capture import Capture
from vitprobe.profile.begun import Begun
from vitprobe.profile.options import AnalyzeOptions
from vitprobe.profile.profile import Profile
from vitprobe.profile.stopping import Stopper
from vitprobe.profile.values import Arrays, Shard, ShardValues
from vitprobe.runs.folder import RunFolder
from vitprobe.runs.manifest import now
from vitprobe.runs.processes import World


class Run:
    """Where an analysis puts its values. Its folder is claimed when the first batch has gone well.

    Attributes:
        options: what is asked for.
        manifest: what the run is made of, so far.
        folder: where it goes.
        values: the shards finished so far, once the folder is claimed.
        stopper: with a tolerance, from then on: what tells when the shards are enough.
    """

    def __init__(
        self, options: AnalyzeOptions, manifest: dict[str, Any], folder: RunFolder, world: World, begun: Begun | None
    ) -> None:
        self.options, self.manifest, self.folder, self.world, self.begun = options, manifest, folder, world, begun
        self.values: ShardValues | None = None
        self.stopper: Stopper | None = None
        self._began = time.perf_counter()
        self._filling: list[tuple[Batch, Arrays]] = []
        self._early: list[tuple[Key, Shard]] = []  # shards without a readable image, before any with one

    def add(self, batch: Batch, values: Arrays | None, attention: Capture) -> bool:
        """Take a batch and its values (None where no image was readable); whether a shard was finished by it."""
        if len(batch.shard) > 1 and self.options.tolerance is not None:
            raise UserError(
                "a stream comes in its own order, and --tolerance draws images at random: give a folder, tar or list"
            )
        if values is not None and self.values is None:
            self._claim(attention)
        self._filling.append((batch, values or {}))
        if batch.last:
            self._close(whole=True)
        return batch.last

    def enough(self) -> bool:
        """Whether the shards finished so far, of all processes, are all that a tolerance asks for.

        Process 0 decides, and says so in the manifest; the others hear of it after the shard that they are at.
        """
        if self.stopper is None or self.values is None:
            return False
        if not self.world.first:
            return "stopping" in self.folder.read()
        if self.stopper.follow(self.values) and self.world.size > 1:
            self.folder.write_manifest({**self.manifest, "stopping": self.stopper.describe()})
        return self.stopper.enough

    def finish(self) -> Profile:
        """All images have come: write what is left, and in process 0 the summary and the manifest.

        Raises:
            UserError: where no image could be read, or shards of other processes are not to be seen.
        """
        self._close(whole=True)
        values = self._claim(None) if self.values is None else self.values
        notes = self.world.gather(self.manifest["out_of_memory"])
        self.manifest["out_of_memory"] = [note for of_process in notes for note in of_process]
        self.world.on_first(lambda: self._conclude("complete", values))
        return Profile(self.manifest, self.values or values)

    def interrupt(self) -> None:
        """Ctrl-C came: keep what is done, also of the shard in flight."""
        if self.values is None or self.folder.temporary:
            return
        self._close(whole=False)
        if self.world.first:
            self._conclude("interrupted", self.values)

    def abandon(self) -> int:
        """After an error: how many images are kept in finished shards; without any, no folder is left."""
        if self.values is None or self.folder.temporary:
            return 0
        kept = len(self.values.names)
        with suppress(UserError, OSError):  # the disk may be why we are here
            if kept or self.begun or self.world.size > 1:
                if self.world.first:
                    self.folder.write_manifest({**self.manifest, "status": "failed"})
            else:
                self.folder.leave()
        return kept

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
        if self.values is None:
            self._early.append((batches[0].shard, shard))
        else:
            self.values.add(shard, batches[0].shard)

    def _claim(self, attention: Capture | None) -> ShardValues:
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
        self.world.on_first(self._open_folder)
        self.values = values = self._on_disk()
        for key, shard in self._early:
            values.add(shard, key)
        if self.options.tolerance is not None:
            grouped, signed = self.manifest["data"]["grouped"], bool(self.manifest["signed"])
            self.stopper = Stopper(self.options.tolerance, Profile(self.manifest, values).layout, signed, grouped)
        return values

    def _on_disk(self) -> ShardValues:
        """What is in the folder, of all processes."""
        return ShardValues(self.folder.path, self.folder.keeper)

    def _open_folder(self) -> None:
        if self.begun is None:
            self.folder.check(overwrite=True)
        else:
            before = self.begun.manifest
            self.manifest["started"] = before.get("started", self.manifest["started"])
            self.manifest["resumed"] = [*before.get("resumed", []), now()]
            self.manifest["out_of_memory"][:0] = before.get("out_of_memory", [])
            self._began -= before.get("wall_seconds", 0)
        self.folder.begin(self.manifest, go_on=self.begun is not None)
        self.folder.claim()

    def _conclude(self, status: str, values: ShardValues) -> None:
        """Process 0: the manifest's last word, and the summary."""
        if self.world.size > 1:
            values = self._on_disk()  # with what the others wrote
        if self.stopper is not None and status == "complete":
            if self.stopper.follow(values):
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
        if status == "complete" and shards not in (None, len(values.heads)):
            raise UserError(
                f"{len(values.heads)} of the {shards} shards are in {self.folder.path}: --out must be a folder that "
                f"every process sees, on a disk that the machines share"
            )
        self.values = values
        Profile(self.manifest, values).save(self.folder.path)

    def _say_too_few(self, came: int) -> None:
        """A remark where fewer images came than were asked for, and not because they were enough."""
        asked = self.options.num_images
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
