"""`Profile`: the statistics of one model on a set of images, with their intervals, on disk and back."""

from __future__ import annotations

import html
import io
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float64

from vitprobe.errors import UserError
from vitprobe.files import write_atomically
from vitprobe.layout import TokenLayout, layout_from
from vitprobe.profile.diagnosis import Diagnosis, diagnose
from vitprobe.profile.intervals import Estimate, Running, group_sizes, statistic_bounds
from vitprobe.profile.values import SHARD_FOLDER, SHARDS, ShardValues
from vitprobe.runs.folder import RunFolder
from vitprobe.runs.kind import Kind
from vitprobe.statistics import STATISTICS, comparable, is_known, select

SUMMARIES = ("summary.csv", "summary.parquet")
KIND = Kind("analyze", "vitprobe.Profile.load", results=(f"{SHARD_FOLDER}/{SHARDS}", *SUMMARIES))

# What `summary` shows: the paper's three, comparable between models, and those that explain them.
SUMMARY = (
    *(statistic.name for statistic in comparable()),
    "patches_to_cls",
    "patch_entropy_share",
    "attention_distance",
)


class Profile:
    """Statistics of a model's attention on images: one value an image, block and head.

    Attributes:
        manifest: all that the run was made of, ready for JSON: model and weights, data, transform, every argument,
            versions, device, images skipped and why.
        values: the values themselves (`.names`, `.groups`, `.read(statistic)` → `(n, blocks, heads)`).

    Example:
        >>> import vitprobe as vp
        >>> profile = vp.analyze("mae_vit_nano", num_images=4, statistics=["cls_entropy"], progress=False)
        >>> profile.values.read("cls_entropy").shape
        (4, 12, 4)
        >>> vp.Profile.load(profile.save("run"))
        Profile('mae_vit_nano', 4 images, 12 blocks)
    """

    def __init__(self, manifest: dict[str, Any], values: ShardValues) -> None:
        self.manifest = manifest
        self.values = values

    @property
    def name(self) -> str:
        """The model's name."""
        return self.manifest["model"]["name"]

    @property
    def paradigm(self) -> str:
        """How the model was trained: MIM, JEA, hybrid, supervised, VLM, random or unknown."""
        return self.manifest["model"]["paradigm"]

    @property
    def remarks(self) -> list[str]:
        """Lines that a reader must know: defaults that were assumed, which weights were taken, what was left out."""
        return self.manifest.get("remarks", [])

    @property
    def layout(self) -> TokenLayout:
        """Which token is what."""
        return layout_from(self.manifest["layout"])

    @property
    def num_blocks(self) -> int:
        """Blocks of the model."""
        return self.manifest["model"]["num_blocks"]

    @property
    def num_images(self) -> int:
        """Images analysed."""
        return len(self.values.names)

    @property
    def unfinished(self) -> str | None:
        """How far a run came that is not complete, as in "64 of 200 images"; None of a complete one."""
        if self.manifest.get("status", "complete") == "complete":
            return None
        total = self.manifest.get("data", {}).get("images")
        return f"{self.num_images} of {total} images" if total else f"{self.num_images} images of an unfinished run"

    @property
    def num_groups(self) -> int:
        """Independent groups among them: the n of every interval."""
        return len(set(self.values.groups))

    @property
    def statistics(self) -> list[str]:
        """Names of the statistics that it holds."""
        return self.values.statistics()

    @property
    def undefined(self) -> dict[str, str]:
        """Statistics that this model does not have, and why."""
        return self.manifest["undefined"]

    def estimate(self, statistic: str, blocks: slice | None = None, heads: bool = False) -> Estimate:
        """Means and intervals of one statistic: `(blocks, heads)`, or the mean over heads.

        Args:
            statistic: its name.
            blocks: average over these blocks first, image by image; the result then has no block axis.
            heads: keep heads apart.

        Raises:
            UserError: for a statistic that this profile does not hold, with the reason.
        """
        running = self._running(statistic)
        for values, groups in self._parts(statistic):
            values = values if heads else values.mean(axis=2)
            running.add(values if blocks is None else values[:, blocks].mean(axis=1), groups)
        return self._estimate(running)

    def _parts(self, statistic: str) -> Iterator[tuple[Float64[np.ndarray, "image block head"], list[str]]]:
        self._require(statistic)
        return ((values.astype(np.float64), groups) for values, groups in self.values.parts(statistic))

    def bounds(self, statistic: str) -> tuple[float, float]:
        """Return the lowest and highest possible value of a statistic of this profile; infinite where there is none.

        They depend on the token layout (1/N, log N, the grid's diagonal). Differential attention is a difference of
        two distributions, so statistics of its weights have no bounds.

        Raises:
            UserError: for a statistic that is not in the table, with the nearest ones.
        """
        select([statistic])
        return statistic_bounds(statistic, self.layout, bool(self.manifest.get("signed")))

    def _running(self, statistic: str) -> Running:
        return Running(self._group_sizes, self.bounds(statistic))

    @cached_property
    def _group_sizes(self) -> Mapping[str, int] | None:
        return group_sizes(self.values.groups)

    def _estimate(self, running: Running) -> Estimate:
        # Of a run with a tolerance the data decided n.
        return running.estimate(sequential=self.manifest["arguments"].get("tolerance") is not None)

    def table(self, statistics: Sequence[str] | None = None) -> pd.DataFrame:
        """The results, tidy: a row a statistic, block and head, and one more a block for the mean over heads.

        Columns:
            model, block, head (`<NA>` for the mean over heads), statistic.
            mean: the plain mean over images; that of an unbounded ratio may lie outside its interval.
            ci_low, ci_high: the 95 % interval of `center`.
            n: independent groups of images.
            center: the number that the interval belongs to and contains; plot and quote this one.
            about: what `center` is, "mean" or, of an unbounded ratio, "geometric mean".
            interval: how it was made: "skew-t" or, on the log scale, "log-t"; "cs" and "log-cs" of a confidence
                sequence where the run stopped itself; "none" for fewer than two groups or a ratio of 0 or ∞.
                docs/intervals.md has them all.

        Raises:
            UserError: for a statistic that this profile does not hold, with the reason.
        """
        for name in statistics or self.statistics:
            self._require(name)
        frames = [frame for name in statistics or self.statistics for frame in self._frames(name)]
        table = pd.concat(frames, ignore_index=True)
        table["head"] = table["head"].astype("Int64")
        return table

    def _frames(self, name: str) -> list[pd.DataFrame]:
        of_mean, of_heads, per_head = self._running(name), self._running(name), STATISTICS[name].per_head
        for values, groups in self._parts(name):  # read once for both
            of_mean.add(values.mean(axis=2), groups)
            if per_head:
                of_heads.add(values, groups)
        frames = [self._frame(name, self._estimate(of_mean), np.arange(self.num_blocks), [None] * self.num_blocks)]
        if per_head:
            by_head = self._estimate(of_heads)
            count = by_head.mean.shape[1]
            blocks, heads = np.repeat(np.arange(self.num_blocks), count), np.tile(np.arange(count), self.num_blocks)
            frames.append(self._frame(name, by_head, blocks, heads))
        return frames

    def _frame(self, name: str, result: Estimate, blocks: Any, heads: Any) -> pd.DataFrame:
        return pd.DataFrame(
            {
                "model": self.name,
                "block": blocks,
                "head": pd.array(heads, dtype="Int64"),
                "statistic": name,
                "mean": result.mean.ravel(),
                "ci_low": result.low.ravel(),
                "ci_high": result.high.ravel(),
                "n": result.n,
                "center": result.center.ravel(),
                "about": result.about,
                "interval": result.kind,
            }
        )

    def _require(self, name: str) -> None:
        if name in self.statistics and not is_known(name):
            raise UserError(f"{self.name} holds {name}, which is not declared here: import the module that declares it")
        select([name])
        if name not in self.statistics:
            reason = self.undefined.get(name, "was not asked for in this run")
            raise UserError(f"{self.name} has no {name}: {reason}")

    def summary(self) -> pd.DataFrame:
        """Means over heads of the main statistics (`center` of the table): a row per block, a column per statistic."""
        names = [name for name in SUMMARY if name in self.statistics]
        columns = {name: self.estimate(name).center for name in names}
        return pd.DataFrame(columns, index=pd.RangeIndex(self.num_blocks, name="block"))

    def diagnosis(self) -> Diagnosis:
        """What the numbers say in plain words, against the baselines; `print` it."""
        return diagnose(self)

    # On disk ----------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the run's folder: manifest, shards, `summary.csv` and `summary.parquet`.

        Raises:
            UserError: where the folder holds something already (another run without `overwrite`), or cannot be
                written.
        """
        place = RunFolder(folder, KIND)
        if self.values.folder.resolve() != place.path.resolve():
            place.check(overwrite)
            with place:
                place.begin(self.manifest)
                place.claim()
                written = ShardValues(place.path)
                for shard in self.values.shards():
                    written.add(shard)
        table = self.table()
        write_atomically(place.path / "summary.csv", table.to_csv(index=False).encode())
        parquet = io.BytesIO()
        table.to_parquet(parquet, index=False)
        write_atomically(place.path / "summary.parquet", parquet.getvalue())
        place.write_manifest(self.manifest)
        return place.path

    @classmethod
    def load(cls, folder: str | Path) -> Profile:
        """Read a run's folder, also one that was interrupted: what its finished shards hold.

        Raises:
            UserError: where the folder is no run, is of a newer format, or holds no finished shard.
        """
        place = RunFolder(folder, KIND)
        manifest = place.read()
        values = ShardValues(place.path)
        if not values.names:
            raise UserError(f"{folder} holds no finished shard; analyze again with --overwrite")
        return cls(manifest, values)

    def __repr__(self) -> str:
        """Name, images, blocks."""
        images = self.unfinished or f"{self.num_images} images"
        return f"Profile({self.name!r}, {images}, {self.num_blocks} blocks)"

    def _repr_html_(self) -> str:
        """For notebooks: the diagnosis and the summary table."""
        words = "".join(f"<li>{html.escape(line)}</li>" for line in self.diagnosis().lines)
        table = self.summary().to_html(float_format="{:.3f}".format, border=0)
        title = self.name if self.unfinished is None else f"{self.name} ({self.unfinished})"
        return f"<h4>{html.escape(title)}</h4><ul>{words}</ul>{table}"
