"""Options of a run: frozen, checked when made, and as a manifest holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import nn

from vitprobe.data.images import printable
from vitprobe.data.transforms import check_normalisation
from vitprobe.errors import UserError
from vitprobe.models.building import pair
from vitprobe.models.loaded import LoadedModel, with_transform
from vitprobe.models.loading import load_model
from vitprobe.models.paradigms import find_paradigm

ModelLike = str | Path | nn.Module | LoadedModel
ImageSize = int | tuple[int, int]
Numbers = float | int | Sequence[float | int]
if TYPE_CHECKING:
    Dtype = Literal["float32", "bfloat16", "float16"]
    DtypeOrAuto = Literal["float32", "bfloat16", "float16", "auto"]
    Kernel = Literal["auto", "torch", "model"]
    ProtocolName = Literal["fast", "cached", "knn", "logistic"]
    Transform = Literal["model", "paper"]
else:  # any text, of which a wrong one is an error of ours, in one line
    Dtype = DtypeOrAuto = Kernel = ProtocolName = Transform = str
TRANSFORMS = ("model", "paper")


@dataclass(frozen=True, kw_only=True, eq=False)
class RunOptions:
    """What every command takes that runs a model on images; commands add their own.

    Attributes:
        model: anything that `load_model` takes.
        data: the images.
        checkpoint: as for `load_model`.
        arch: as for `load_model`.
        weights_key: as for `load_model`.
        name: what figures call the model.
        paradigm: its place on the paper's axis.
        transform: the model's own preprocessing, or the paper's.
        img_size: a side or (height, width); the model's own without.
        mean: subtracted from each channel.
        std: what each channel is divided by.
        dtype: of the forward pass.
        device: where it runs.
        workers: processes that read images.
        seed: of all that is drawn.
        out: the run's folder.
        overwrite: replace the run that is there.
        resume: go on with it.
    """

    # What changes where or how fast numbers are made, not which: a resumed run may have others.
    free: ClassVar[frozenset[str]] = frozenset({"workers", "out", "overwrite", "resume"})

    model: Any
    data: Any = None
    checkpoint: str | Path | None = None
    arch: str | None = None
    weights_key: str | None = None
    name: str | None = None
    paradigm: str | None = None
    transform: Transform = "model"
    img_size: ImageSize | None = None
    mean: Numbers | None = None
    std: Numbers | None = None
    dtype: str | None = None
    device: str | torch.device | None = None
    workers: int | None = None
    seed: int = 0
    out: str | Path | None = None
    overwrite: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        """Raises a UserError for the first option that makes no sense, before anything is loaded."""
        if self.transform not in TRANSFORMS:
            raise UserError(f"transform is {self.transform!r}; it must be 'model' or 'paper'")
        size = tuple(self.img_size) if isinstance(self.img_size, list) else self.img_size  # as JSON holds a pair
        if size is not None:
            pair(size)
        object.__setattr__(self, "img_size", size)
        for name in ("mean", "std"):
            object.__setattr__(self, name, check_normalisation(name, getattr(self, name)))
        if self.paradigm is not None:
            object.__setattr__(self, "paradigm", find_paradigm(self.paradigm))
        check_whole(workers=(self.workers, 0), seed=(self.seed, 0))
        if self.resume and (self.overwrite or self.out is None):
            reason = (
                "--overwrite starts anew: give one of the two"
                if self.overwrite
                else "that needs its folder: give --out too"
            )
            raise UserError(f"--resume goes on with a run, and {reason}")

    def load(self) -> LoadedModel:
        """The model, with the transform that is asked for.

        Raises:
            UserError: as `load_model`.
        """
        loaded = load_model(
            self.model,
            checkpoint=self.checkpoint,
            arch=self.arch,
            weights_key=self.weights_key,
            img_size=self.img_size,
            name=self.name,
            paradigm=self.paradigm,
        )
        mean, std = cast(list[list[float] | None], [self.mean, self.std])  # lists since they were checked
        return with_transform(loaded, self.transform, self.img_size or loaded.transform.size, mean, std)

    def describe(self) -> dict[str, Any]:
        """Every option by its name, as JSON holds it: of what is no plain value, words or its type."""
        found = {field.name: shown(getattr(self, field.name)) for field in fields(self)}
        if isinstance(self.data, list | tuple):  # a pair of places, or images one by one
            two = len(self.data) == 2 and all(isinstance(part, str | PathLike) for part in self.data)
            found["data"] = ", ".join(str(shown(part)) for part in self.data) if two else type(self.data).__name__
        return found


def check_whole(**numbers: tuple[Any, int]) -> None:
    """Returns where every number is None or a whole number of at least its least.

    Args:
        **numbers: by the argument's name, its value and the least.

    Raises:
        UserError: for the first that is not.
    """
    for name, (number, least) in numbers.items():
        if number is not None and not (isinstance(number, Integral) and int(number) >= least):
            raise UserError(f"{name} is {number!r}; it must be a whole number of at least {least}")


def shown(thing: Any) -> Any:
    """An option as a manifest holds it: plain values as they are, text made printable, of anything else its type."""
    if thing is None or isinstance(thing, bool | int | float):
        return thing
    if isinstance(thing, Integral):
        return int(thing)
    if isinstance(thing, str | PathLike):
        return printable(str(thing))
    if isinstance(thing, torch.device):
        return str(thing)
    if isinstance(thing, list | tuple) and all(isinstance(part, str | int | float | Path) for part in thing):
        return [shown(part) for part in thing]
    return type(getattr(thing, "module", thing)).__name__
