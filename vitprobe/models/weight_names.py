"""Names of weights in a file as a model has them: without what wrappers put before them or in their midst."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from vitprobe.models.roles import role

Value = TypeVar("Value")

# What wrappers of torch, DeepSpeed and PEFT put between the parts of a name.
_WRAPPERS = ("module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_ADAPTED = re.compile(
    r"(^|\.)(lora_[A-Za-z_]+|base_layer|hada_w\w*|lokr_w\w*|oft_\w+|boft_\w+|ia3_l|vera_lambda_\w+|modules_to_save)(\.|$)"
)
_NEARLY = 0.9  # the share of the best set's names that another has to have
_DEEPEST = 10  # parts of a prefix


@dataclass(frozen=True)
class Named:
    """Weights under a model's own names.

    Attributes:
        state: by name.
        taken: the prefix that they had, without the last point.
        others: of other sets in the file that would match as well.
    """

    state: dict
    taken: str = ""
    others: tuple[str, ...] = ()


def find_adapter(names: Iterable[str]) -> str | None:
    """The first name of an adapter's (LoRA and its kin) that was not merged into the weights; None without one."""
    return next((name for name in names if _ADAPTED.search(name)), None)


def as_named(state: Mapping[str, Value], names: Collection[str]) -> Named:
    """The weights under the names of a model: wrappers' words go, chunks of blocks are joined, the prefix goes.

    Where a prefix goes, so does what does not carry it (a projection head beside the backbone). Of several sets that
    match, averaged ones are taken before others (`roles`).

    Args:
        state: by the file's names.
        names: the model's.
    """
    plain = _joined(without_wrappers(state, names), names)
    matches = Counter[str]()
    for key in plain:
        parts = key.split(".")
        for count in range(min(len(parts), _DEEPEST)):
            if ".".join(parts[count:]) in names:
                matches["".join(f"{part}." for part in parts[:count])] += 1
    if not matches:
        return Named(plain)
    most = max(matches.values())
    stem = {name for name in names if "patch_embed" in name}
    sets = [prefix for prefix, count in matches.items() if count >= _NEARLY * most]
    whole = [prefix for prefix in sets if all(f"{prefix}{name}" in plain for name in stem)] or sets

    def likelihood(prefix: str) -> tuple[int, int, int]:
        return role(prefix, whole), -matches[prefix], len(prefix)

    best, *others = sorted(whole, key=likelihood)
    return Named(
        {key[len(best) :]: value for key, value in plain.items() if key.startswith(best)},
        best.rstrip("."),
        tuple(other.rstrip(".") for other in others),
    )


def strip_prefix(state: Mapping[str, Value], names: Iterable[str]) -> dict[str, Value]:
    """The weights of `as_named` alone."""
    return as_named(state, set(names)).state


def without_wrappers(state: Mapping[str, Value], names: Collection[str]) -> dict[str, Value]:
    """The weights without the words that wrappers put into names, but for those that a model's own `names` have."""
    own = {part for name in names for part in name.split(".")}
    dropped = {word for word in _WRAPPERS if word not in own}

    def plain(name: str) -> str:
        if "base_model" not in own:
            name = re.sub(r"(^|\.)base_model\.model\.", r"\1", name)
        parts = name.split(".")
        return ".".join([part for part in parts[:-1] if part not in dropped] + parts[-1:])

    renamed = {plain(name): value for name, value in state.items()}
    return renamed if len(renamed) == len(state) else dict(state)


def _joined(state: Mapping[str, Value], names: Collection[str]) -> dict[str, Value]:
    """The weights with blocks out of their chunks, as DINOv2 saves them: `blocks.0.3.` is the model's `blocks.3.`"""
    nested = {found[1] for name in names for found in re.finditer(r"(\w+)\.\d+\.\d+\.", name)}
    lists = {found[1] for name in names for found in re.finditer(r"(\w+)\.\d+\.", name)} - nested
    if not lists:
        return dict(state)
    chunked = re.compile(rf"(^|.*\.)({'|'.join(map(re.escape, sorted(lists)))})\.(\d+)\.(\d+)\.(.+)$")
    found = {name: match for name in state if (match := chunked.match(name))}
    places: dict[str, set[tuple[int, int]]] = {}  # chunk and number in it, of each list
    for match in found.values():
        places.setdefault(match[1] + match[2], set()).add((int(match[3]), int(match[4])))
    numbers = {}
    for head, pairs in places.items():
        through = len({number for _, number in pairs}) == len(pairs)  # numbered through all chunks, or anew in each
        numbers |= {(head, *pair): pair[1] if through else place for place, pair in enumerate(sorted(pairs))}
    renamed = {}
    for name, value in state.items():
        if match := found.get(name):
            number = numbers[match[1] + match[2], int(match[3]), int(match[4])]
            name = f"{match[1]}{match[2]}.{number}.{match[5]}"
        renamed[name] = value
    return renamed if len(renamed) == len(state) else dict(state)


def prefixes_of_blocks(names: Iterable[str]) -> list[str]:
    """What precedes the lists of blocks in some names, where there are several such prefixes; [] otherwise."""
    counts = Counter[str]()
    for name in without_wrappers(dict.fromkeys(names), ()):
        parts = name.split(".")
        place = next((number for number, part in enumerate(parts) if part.isdigit()), 0)
        if place:
            counts[".".join(parts[: place - 1])] += 1
    most = max(counts.values(), default=0)
    large = [prefix for prefix, count in counts.items() if 2 * count >= most and prefix]
    return large if len(large) > 1 else []
