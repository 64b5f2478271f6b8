"""`Verification`: what aggregating otherwise gives, with intervals and paired differences, on disk and back."""

from __future__ import annotations

import html
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vitprobe.errors import UserError
from vitprobe.files import write_atomically
from vitprobe.probing.saved import FILES as PROBE_FILES
from vitprobe.probing.saved import FOLDER as PROBES
from vitprobe.probing.scores import mean_per_class
from vitprobe.probing.tap import Tap
from vitprobe.probing.trained import in_words, shortfalls
from vitprobe.probing.uncertainty import Components, Interval, components, holm
from vitprobe.runs.folder import RunFolder
from vitprobe.runs.kind import Kind

CORRECTNESS, ACCURACY = "correctness.safetensors", "accuracy.csv"
TRAINING, TOKENS = "training.safetensors", "tokens"
KIND = Kind(
    "verify",
    "vitprobe.Verification.load",
    results=(CORRECTNESS, ACCURACY, f"{PROBES}/{PROBE_FILES}"),
    unfinished=(TRAINING, f"{TOKENS}/train", f"{TOKENS}/test"),
)
MEASURES = ("top1", "top5", "mean_per_class")
BASELINES = ("cls", "gap")  # what gains are over: the first of them that there is

_METADATA = "vitprobe"
_AGAIN = "verify again with --overwrite"


@dataclass(frozen=True, eq=False)
class Result:
    """One aggregator, read at one place, on the test images.

    Attributes:
        name: the label `<aggregator>@<tap>`, as in `abmilp@block11+norm`.
        parameters: trained numbers of the aggregator, without the classifier.
        hyperparameters: what was selected on the held-out slice, ready for JSON.
        top1: whether it was right, with each seed, on each image.
        top5: whether the image's class was among its best five.
    """

    name: str
    parameters: int
    hyperparameters: Mapping[str, Any]
    top1: Bool[np.ndarray, "seed image"]
    top5: Bool[np.ndarray, "seed image"]

    @property
    def aggregator(self) -> str:
        """The aggregator's name, with its options."""
        return self.name.rpartition("@")[0]

    @property
    def tap(self) -> Tap:
        """Where the tokens were read."""
        return Tap.parse(self.name.rpartition("@")[2])


class Verification:
    """Accuracies of ways to aggregate the tokens of one frozen model, on the same images and seeds.

    Attributes:
        manifest: all that the run was made of, ready for JSON: model and weights, data, protocol, versions.
        images: names of the test images.
        labels: their classes.
        results: one an aggregator and place.

    Example:
        >>> import vitprobe as vp
        >>> found = vp.verify("random_vit_nano", aggregators=["gap"], protocol="knn", blocks=[0], progress=False)
        >>> again = vp.Verification.load(found.save("run"))
        >>> [result.name for result in again.results], again.num_images
        (['gap@block0', 'gap@block0+norm'], 599)
    """

    def __init__(
        self,
        manifest: dict[str, Any],
        images: Sequence[str],
        labels: Int[np.ndarray, " image"],
        results: Sequence[Result],
    ) -> None:
        shapes = {right.shape for result in results for right in (result.top1, result.top5)}
        assert len(shapes) == 1 and next(iter(shapes))[1] == len(images) == len(labels), "results of several runs"
        self.manifest = {**manifest, "command": KIND.command}
        self.images = list(images)
        self.labels = labels
        self.results = list(results)
        self._components = lru_cache(maxsize=None)(self._estimate)

    @property
    def name(self) -> str:
        """The model's name."""
        return self.manifest["model"]["name"]

    @property
    def paradigm(self) -> str:
        """How the model was trained: MIM, JEA, hybrid, supervised, VLM, random or unknown."""
        return self.manifest["model"]["paradigm"]

    @property
    def protocol(self) -> str:
        """The protocol's name."""
        return self.manifest["protocol"]["name"]

    @property
    def data(self) -> str:
        """The labelled set's name."""
        return self.manifest["data"]["source"]

    @property
    def num_images(self) -> int:
        """Test images."""
        return len(self.images)

    @property
    def num_seeds(self) -> int:
        """Seeds that every aggregator was trained with."""
        return len(self.results[0].top1)

    @property
    def sampled(self) -> str:
        """What was sampled, and intervals are therefore over: "images and seeds"; "images" where there is one seed."""
        return "images and seeds" if self.num_seeds > 1 else "images"

    @property
    def conditions(self) -> str:
        """What every number here is conditional on, and what its interval is over, in a sentence each."""
        digest = self.manifest["model"]["weights_sha256"]
        weights = "weights without a digest" if digest is None else f"sha256 {digest[:12]}…"
        seeds = f" and {self.num_seeds} seeds" if self.num_seeds > 1 else " (one seed: nothing is said about others)"
        varied = f"{self.num_images} test images{seeds}"
        return (
            f"Conditional on these backbone weights ({self.name}, {weights}), on the training images of "
            f"{self.data} and on the protocol {self.protocol}. 95 % intervals over {varied}; "
            f"differences are paired, p-values two-sided, p_holm adjusted for all rows."
        )

    @property
    def warnings(self) -> list[str]:
        """Which probes are not trained to their end, a line each; see `vitprobe.probing.trained`."""
        return [line for result in self.results for line in shortfalls(result.name, *self._training(result))]

    def anchor(self, name: str) -> float | None:
        """The accuracy of logistic regression on the vectors of a trained result; None where there is none."""
        found = self.manifest.get("anchors", {}).get(name)
        return None if found is None else found["accuracy"]

    def _training(self, result: Result) -> tuple[float, float | None, Mapping[str, Any]]:
        return float(result.top1.mean()), self.anchor(result.name), result.hyperparameters

    def _estimate(self, measure: str) -> Components:
        if measure not in MEASURES:
            raise UserError(f"no measure {measure!r}; give one of {', '.join(MEASURES)}")
        top = "top5" if measure == "top5" else "top1"
        right = np.stack([getattr(result, top) for result in self.results])
        return components(right, self.labels if measure == "mean_per_class" else None)

    def table(self, measure: str = "top1") -> pd.DataFrame:
        """The results, tidy: a row a result, in the order in which they were asked for.

        Columns: label (aggregator and place, as in `abmilp@block11+norm`), aggregator, block (its number), norm
        (whether the model's final norm was applied), parameters (of the aggregator, without the classifier), accuracy
        (a share), ci_low, ci_high (95 %), gain, gain_ci_low, gain_ci_high (paired, over [cls] at the same place, or
        over gap where there is none; NaN without either), top5, mean_per_class, gain_over (label of what gains are
        over), p_value (two-sided, of no gain), p_holm (adjusted for all gains of the table), seeds, images, interval
        (what intervals are over: "images and seeds"; "images" where there is one seed), one column per selected
        hyperparameter, anchor (accuracy of logistic regression on the same vectors, where the aggregator has no
        weights; of trained protocols), loss_fall and converged (of learned aggregators; see
        `vitprobe.probing.trained`), model, weights (the first digits of their sha256: all numbers are conditional on
        them).

        Args:
            measure: what accuracy and gain are of: "top1", "top5" or "mean_per_class".

        Raises:
            UserError: for another measure.
        """
        found = self._components(measure)
        accuracy = found.accuracies()
        baselines = [self._baseline(result) for result in self.results]
        known = [row for row, baseline in enumerate(baselines) if baseline is not None]
        gain = _rows(found.differences(known, [b for b in baselines if b is not None]), known, len(self.results))
        itself = [row for row, baseline in enumerate(baselines) if row == baseline]
        gain.low[itself] = gain.high[itself] = 0.0
        gain.p_value[itself] = np.nan
        table = pd.DataFrame(
            {
                "label": [result.name for result in self.results],
                "aggregator": [result.aggregator for result in self.results],
                "block": [result.tap.block for result in self.results],
                "norm": [result.tap.norm for result in self.results],
                "parameters": [result.parameters for result in self.results],
                "accuracy": accuracy.value,
                "ci_low": accuracy.low,
                "ci_high": accuracy.high,
                "gain": gain.value,
                "gain_ci_low": gain.low,
                "gain_ci_high": gain.high,
                "top5": [result.top5.mean() for result in self.results],
                "mean_per_class": [mean_per_class(result.top1, self.labels).mean() for result in self.results],
                "gain_over": [None if row is None else self.results[row].name for row in baselines],
                "p_value": gain.p_value,
                "p_holm": holm(gain.p_value),
                "seeds": self.num_seeds,
                "images": self.num_images,
                "interval": self.sampled,
            }
        )
        selected = pd.DataFrame([dict(result.hyperparameters) for result in self.results], index=table.index)
        table = pd.concat([table, selected], axis=1)
        if self.manifest.get("anchors"):
            table["anchor"] = np.array([self.anchor(result.name) for result in self.results], dtype=float)
        table["model"], table["weights"] = self.name, (self.manifest["model"]["weights_sha256"] or "")[:12]
        return table

    def _baseline(self, result: Result) -> int | None:
        """The position of the result that a gain is over: at the same place, so that it is the aggregator's alone."""
        names = [other.name for other in self.results]
        wanted = [f"{baseline}@{result.tap}" for baseline in BASELINES]
        return next((names.index(baseline) for baseline in wanted if baseline in names), None)

    def differences(self, measure: str = "top1") -> pd.DataFrame:
        """Every two results against each other, on the same images and seeds.

        Columns: first, second, difference (accuracy of the first less that of the second), ci_low, ci_high (95 %),
        p_value (two-sided), p_holm (adjusted for all pairs), interval (what intervals are over, as in `table`).

        Raises:
            UserError: for another measure than those of `table`.
        """
        pairs = list(itertools.combinations(range(len(self.results)), 2))
        first, second = [one for one, _ in pairs], [other for _, other in pairs]
        found = self._components(measure).differences(first, second)
        return pd.DataFrame(
            {
                "first": [self.results[row].name for row in first],
                "second": [self.results[row].name for row in second],
                "difference": found.value,
                "ci_low": found.low,
                "ci_high": found.high,
                "p_value": found.p_value,
                "p_holm": holm(found.p_value),
                "interval": self.sampled,
            }
        )

    # On disk ----------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write `manifest.json`, `correctness.safetensors` and `accuracy.csv` into a folder of their own.

        Raises:
            UserError: where the folder holds something already (another run without `overwrite`), or cannot be
                written.
        """
        place = RunFolder(folder, KIND)
        place.check(overwrite)
        with place:
            place.begin(self.manifest)
            place.claim()
            self._write_results(place.path)
        return place.path

    def write(self, folder: RunFolder) -> None:
        """Write the same files into a run's own folder, whatever else is in it.

        Raises:
            UserError: where they cannot be written.
        """
        folder.write_manifest(self.manifest)
        self._write_results(folder.path)

    def _write_results(self, folder: Path) -> None:
        arrays, said = {"labels": np.ascontiguousarray(self.labels)}, []
        for result in self.results:
            said.append([result.name, result.parameters, dict(result.hyperparameters)])
            arrays[f"{result.name}/top1"] = np.ascontiguousarray(result.top1)
            arrays[f"{result.name}/top5"] = np.ascontiguousarray(result.top5)
        metadata = {_METADATA: json.dumps({"images": self.images, "results": said})}
        write_atomically(folder / CORRECTNESS, save(arrays, metadata=metadata))
        write_atomically(folder / ACCURACY, self.table().to_csv(index=False).encode())

    @classmethod
    def load(cls, folder: str | Path) -> Verification:
        """Read a verification's folder.

        Raises:
            UserError: where the folder is no verification, is of a newer format, or is not finished.
        """
        place = RunFolder(folder, KIND)
        manifest = place.read()
        path = place.path / CORRECTNESS
        if not path.is_file():
            raise UserError(f"{folder} is not finished (there is no {CORRECTNESS}); go on with --resume, or {_AGAIN}")
        try:
            with safe_open(path, framework="numpy") as file:
                said = json.loads(file.metadata()[_METADATA])
                results = [
                    Result(name, parameters, chosen, *(file.get_tensor(f"{name}/{top}") for top in ("top1", "top5")))
                    for name, parameters, chosen in said["results"]
                ]
                return cls(manifest, said["images"], file.get_tensor("labels"), results)
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"{path} cannot be read ({error}); {_AGAIN}") from None

    # In words ---------------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        """Name, aggregators, data."""
        return f"Verification({self.name!r}, {len(self.results)} aggregators, {self.num_images} images)"

    def __str__(self) -> str:
        """The table in percent, what it is conditional on, and which probes are not trained to their end."""
        warnings = "".join(f"\nwarning: {warning}" for warning in self.warnings)
        return f"{self._percents().to_string(index=False)}\n\n{self.conditions}{warnings}"

    def _repr_html_(self) -> str:
        """For notebooks: the same."""
        title, words = html.escape(self.name), html.escape(self.conditions)
        warnings = "".join(f"<p>warning: {html.escape(warning)}</p>" for warning in self.warnings)
        return f"<h4>{title}</h4>{self._percents().to_html(index=False, border=0)}<p>{words}</p>{warnings}"

    def _percents(self) -> pd.DataFrame:
        table = self.table()
        intervals = [
            [f"{value:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]" for value, low, high in rows]
            for sign, rows in (
                ("", 100 * table[["accuracy", "ci_low", "ci_high"]].to_numpy(float)),
                ("+", 100 * table[["gain", "gain_ci_low", "gain_ci_high"]].to_numpy(float)),
            )
        ]
        is_baseline = (table["label"] == table["gain_over"]).to_numpy() | table["gain"].isna().to_numpy()
        gains = ["–" if without else words for without, words in zip(is_baseline, intervals[1], strict=True)]
        p_holm = ["–" if np.isnan(value) else f"{value:.2g}" for value in table["p_holm"]]
        return pd.DataFrame(
            {
                "aggregator": table["label"],
                "parameters": table["parameters"].map("{:,}".format),
                "accuracy, % [95 %]": intervals[0],
                "gain, points [95 %]": gains,
                "p (Holm)": p_holm,
                "mean per class, %": (100 * table["mean_per_class"]).map("{:.2f}".format),
                **self._trained(),
            }
        )

    def _trained(self) -> dict[str, list[str]]:
        """A column that says which probes are not trained to their end, where there is one."""
        words = [in_words(*self._training(result)) for result in self.results]
        return {"trained": [word or "yes" for word in words]} if any(words) else {}


def _rows(found: Interval, rows: Sequence[int], count: int) -> Interval:
    """An interval's values put at these of `count` rows, NaN elsewhere."""

    def spread(values: np.ndarray) -> np.ndarray:
        placed = np.full(count, np.nan)
        placed[list(rows)] = values
        return placed

    return Interval(spread(found.value), spread(found.low), spread(found.high), spread(found.p_value))
