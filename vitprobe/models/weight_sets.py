"""The sets of weights in the content of a checkpoint: nested dictionaries that hold tensors by name somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from vitprobe.models.pickles import BadFileError, Foreign, TensorRecord, one_line
from vitprobe.models.roles import AVERAGED, PLAIN, role, said
from vitprobe.models.weight_names import prefixes_of_blocks, without_wrappers

# Where training checkpoints keep the weights, the likeliest first.
HOLDERS = (
    *("model", "state_dict", "teacher", "student", "model_state", "model_state_dict", "model_ema", "state_dict_ema"),
    *("module", "net", "network", "target_encoder", "encoder", "backbone", "ema"),
)
_DEPTH = 4
_NO_WEIGHTS = re.compile(r"optim|exp_avg|scaler|scheduler|momentum_buffer", re.IGNORECASE)
Records = dict[str, TensorRecord]
Value = TypeVar("Value")


@dataclass(frozen=True)
class WeightSet:
    """One set of weights of a file.

    Attributes:
        records: its tensors, by name.
        key: where it lies, names joined by points; "" at the top.
        others: keys of comparable sets in the file.
        remarks: what must be said of the choice.
    """

    records: Records
    key: str
    others: tuple[str, ...]
    remarks: tuple[str, ...]


def find_weights(content: Any, first: tuple[str, ...] = (), asked: str | None = None) -> WeightSet:
    """The set of weights to take: under the key that is asked for, else averaged ones before others.

    Args:
        content: of the file.
        first: names to look under before all others.
        asked: a key, `teacher.backbone`: names of dictionaries, then the beginning of the names in one.

    Raises:
        BadFileError: where there are no weights, none under that key, or several sets that no rule chooses from.
    """
    if not isinstance(content, dict):
        kind = "single tensor" if isinstance(content, TensorRecord) else type(content).__name__
        raise BadFileError(f"holds no weights by name but a {kind}")
    everything = dict(_sets(content))
    if asked is None:
        key, records = _choose(content, first)
    else:
        key, records = _asked(content, everything, first, asked)
    others = tuple(
        other
        for other, found in everything.items()
        if other != key and len(found) >= len(records) / 2 and not _NO_WEIGHTS.search(other)
    )
    if asked is not None:
        return WeightSet(records, asked, others, said(asked, others, asked=True))
    return WeightSet(records, key, others, said(key, others) + _unread(content, key))


def _is_weight(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, TensorRecord)


def _sets(content: Any, path: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, Records]]:
    """Every dictionary that holds tensors by name, with its key."""
    if not isinstance(content, dict) or depth == 0:
        return
    records = {name: value for name, value in content.items() if _is_weight(name, value)}
    if records:
        yield path, records
    for name, value in content.items():
        if isinstance(name, str):
            yield from _sets(value, f"{path}.{name}" if path else name, depth - 1)


def _size(content: Any) -> int:
    """Tensors of the largest set in it."""
    return max((len(records) for _, records in _sets(content)), default=0)


def _choose(content: Any, first: tuple[str, ...], path: str = "") -> tuple[str, Records]:
    """The set to take of a dictionary and those in it."""
    records = {name: value for name, value in content.items() if _is_weight(name, value)}
    inside = {name: size for name, value in content.items() if isinstance(name, str) and (size := _size(value))}
    known = [
        name
        for name in inside
        if name in (*first, *HOLDERS) or (role(name, inside) != PLAIN and not _NO_WEIGHTS.search(name))
    ]
    if not known and not records:
        if len(inside) > 1:
            raise BadFileError(f"holds several sets of weights ({_some(inside)}): choose one with --weights-key KEY")
        known = list(inside)
    # What merely accompanies an average (a count of its updates) is far smaller than what was averaged.
    largest = max([inside[name] for name in known] + [len(records)], default=0)
    holders = [name for name in known if 2 * inside[name] >= largest] if len(known) > 1 or records else known
    if not holders:
        if not records:
            raise BadFileError(f"holds no weights{': only ' + _some(map(str, content)) if content else ''}")
        return path, records
    if "message_hub" in content and "ema_state_dict" in holders:
        first = ("state_dict", *first)  # MMEngine exchanges the two when it saves
    order = (*first, *HOLDERS)

    def likelihood(name: str) -> tuple[int, int, int]:
        kind = role(name, inside)
        return (name not in first, kind, order.index(name) if name in order else len(order))

    name = min(holders, key=likelihood)
    return _choose(content[name], first, f"{path}.{name}" if path else name)


def _asked(content: dict, everything: dict[str, Records], first: tuple[str, ...], asked: str) -> tuple[str, Records]:
    """The set under a key, or the part of one whose names begin with it."""
    holders = {place.rpartition(".")[0] for place in everything} | set(everything)
    for place in sorted((place for place in holders if place), key=lambda place: (len(place), place)):
        if place == asked or place.endswith(f".{asked}"):
            return _choose(_at(content, place), first, place)
    return under_prefix(everything, asked)


def under_prefix(sets: Mapping[str, dict[str, Value]], asked: str) -> tuple[str, dict[str, Value]]:
    """The key of the first of some sets in which names begin with what is asked for, and these without it.

    Raises:
        BadFileError: where none do; names what there is.
    """
    places = sorted(sets, key=len)
    for place in places:
        rest = asked.removeprefix(f"{place}.") if place else asked
        part = {
            name[len(rest) + 1 :]: value
            for name, value in without_wrappers(sets[place], ()).items()
            if name.startswith(f"{rest}.")
        }
        if part:
            return place, part
    known = [place for place in places if place]
    for place in places:
        known += [f"{place}.{prefix}" if place else prefix for prefix in prefixes_of_blocks(sets[place])]
    known = [name for name in dict.fromkeys(known) if not _NO_WEIGHTS.search(name)]
    what = f"holds no weights under the key {one_line(asked, 60)}"
    if not known:
        raise BadFileError(f"{what}: it has one set, without a key; leave --weights-key out")
    raise BadFileError(f"{what}: there are {', '.join(one_line(name, 60) for name in known[:12])}")


def _at(content: Any, place: str) -> Any:
    """What lies at a place of `_sets`; names may hold points themselves."""
    if not place:
        return content
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, dict):
            if name == place:
                return value
            if place.startswith(f"{name}.") and (found := _at(value, place[len(name) + 1 :])) is not None:
                return found
    return None


def _unread(content: dict, key: str) -> tuple[str, ...]:
    """The remark on averaged weights that are there, but not by name."""
    if role(key, content) == AVERAGED:
        return ()
    for name, value in content.items():
        if isinstance(name, str) and role(name, content) == AVERAGED and "target" not in name:
            lists = [value, *(value.values() if isinstance(value, dict) else ())]
            if isinstance(value, Foreign) or any(
                isinstance(each, list) and len(each) > 1 and all(isinstance(item, TensorRecord) for item in each)
                for each in lists
            ):
                kind = "a pickled object" if isinstance(value, Foreign) else "without names"
                return (
                    f"took the weights {key or 'without a key'}; the averaged ones under {one_line(name, 60)} are "
                    f"{kind}, which is not read: save their state_dict() to take them",
                )
    return ()


def _some(names: Any) -> str:
    names = list(names)
    return ", ".join(one_line(name, 80) for name in names[:3]) + (", …" if len(names) > 3 else "")
