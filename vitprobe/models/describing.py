"""What a user says of a model: its name, its place on the paper's axis, how its images are normalized."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vitprobe.errors import UserError
from vitprobe.models.loaded import LoadedModel, with_transform
from vitprobe.models.normalization import NONE, Normalization
from vitprobe.models.remembered import remember


def check_name(name: Any) -> str | None:
    """Return the name that a user gives a model, or None for none.

    Raises:
        UserError: for what is no text, is empty, or is more than one line.
    """
    if name is None:
        return None
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise UserError(f"the name of a model is {name!r}: give a word or a few, in one line")
    return name.strip()


def described(model: LoadedModel, **said: str | None) -> LoadedModel:
    """Return the model with what is said of it in place of what was known.

    Args:
        model: the model.
        said: fields of `ModelSpec`, such as `name` and `paradigm`; None leaves one as it is.
    """
    said = {field: value for field, value in said.items() if value is not None}
    if all(getattr(model.spec, field) == value for field, value in said.items()):
        return model
    model = replace(model, spec=replace(model.spec, **said))
    if model.spec.source != "module":
        remember(model.anatomy.tower, model.spec)
    return model


def normalized(model: LoadedModel, normalization: Normalization | None) -> LoadedModel:
    """Return the model with the normalization that a user gives for it; None leaves it as it is.

    Raises:
        UserError: for a number of values that is not the model's number of channels, and for a model that normalizes
            its images itself.
    """
    if normalization is None:
        return model
    if model.anatomy.normalizer and normalization.name != NONE:
        raise UserError(
            f"{model.spec.name} normalizes its images itself ({model.anatomy.normalizer}): leave normalization out"
        )
    channels, count = model.anatomy.channels, len(normalization.mean)
    if normalization.name == "other" and count not in (1, channels):
        raise UserError(
            f"normalization has {count} values, and {model.spec.name} takes {channels} channel{'s' * (channels > 1)}: "
            f"give one value for each, or one for all"
        )
    model = described(model, normalisation=normalization.name)
    return with_transform(replace(model, normalization=normalization), model.transform.mode, model.transform.size)
