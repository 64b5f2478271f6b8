"""Lists of transformer blocks in a module tree, and which of them can be an image encoder's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from vitprobe.models.anatomy.parts import unwrapped

_USUAL = ("blocks", "layers", "layer", "resblocks", "encoder_layers", "transformer_blocks")
_CONTAINERS = nn.ModuleList | nn.Sequential
# Words in a path for what comes behind an image encoder, or stands beside it.
_NOT_THE_ENCODER = frozenset(
    {
        *("decoder", "dec", "predictor", "projector", "projection", "head", "heads", "pooler", "neck"),
        *("text", "txt", "language", "lm", "llm", "audio"),
    }
)


@dataclass(frozen=True, eq=False)
class BlockList:
    """Transformer blocks that stand in one list, or in a list of lists.

    Attributes:
        paths: where the lists stand in the module tree.
        blocks: the blocks, without what torch.compile and the like wrap them in.
    """

    paths: tuple[str, ...]
    blocks: tuple[nn.Module, ...]

    @property
    def usual(self) -> bool:
        """Whether the list is called as nearly everybody calls it."""
        return self.paths[0].rpartition(".")[2] in _USUAL

    @property
    def attends(self) -> bool:
        """Whether a class in every block is called after attention."""
        return all(_names_attention(block) for block in self.blocks)


def block_lists(module: nn.Module) -> list[BlockList]:
    """Every list of alike blocks in a module that lies in no other such list, the likeliest first."""
    containers = ((path, part) for path, part in module.named_modules() if isinstance(part, _CONTAINERS))
    lists = {path: list(part) for path, part in containers if _alike(list(part))}
    outermost = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists if other != path)]
    if "" in lists:
        outermost = [""]
    found = [_of_group(path, {p: b for p, b in lists.items() if _inside(p, path)}) for path in outermost]
    return sorted(found, key=lambda each: (each.attends, each.usual, len(each.blocks)), reverse=True)


def likely(lists: Sequence[BlockList], names: Sequence[str]) -> list[int]:
    """Numbers of the lists that can be an image encoder's, by their classes and their paths, the `names`.

    Lists whose blocks name attention outrank those that do not, and decoders, text towers and heads come last.
    """
    kept = list(range(len(lists)))
    kept = [number for number in kept if lists[number].attends] or kept
    return [number for number in kept if not _words(names[number]) & _NOT_THE_ENCODER] or kept


def opened(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """Blocks, each without its wrapper; of lists of parts, which are never called themselves, what stands for a block.

    Chunks of blocks (DINOv2's training code) are joined. Of a list of a block's parts, such as [attention, MLP], the
    attention is taken: it is the part whose class says so, otherwise the first.
    """
    found = [unwrapped(block) for block in blocks]
    if all(type(block).forward is nn.Module.forward for block in found):
        found = _attending_parts(found)
    while found and all(_is_list(block) for block in found):
        found = _attending_parts(found)
    return found


def _attending_parts(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    parts = [[part for part in one.children() if not isinstance(part, nn.Identity)] for one in blocks]
    attending = [[part for part in of_one if _names_attention(part)] for of_one in parts]
    chosen = attending if all(attending) else [of_one[:1] for of_one in parts]
    return [unwrapped(part) for of_one in chosen for part in of_one]


def _of_group(outer: str, group: dict[str, list[nn.Module]]) -> BlockList:
    """The blocks of a list and the lists inside its elements.

    These are the elements of the outer list, unless they are stages, each with a usual list of blocks inside.
    """
    stages = _stages(outer, group)
    if stages:
        return BlockList(tuple(stages), tuple(block for path in stages for block in opened(group[path])))
    whole = BlockList((outer,), tuple(opened(group[outer])))
    if whole.attends or whole.usual:
        return whole
    inner = [BlockList((path,), tuple(opened(blocks))) for path, blocks in group.items()]
    return max(inner, key=lambda each: (each.usual, len(each.blocks)))


def _stages(outer: str, group: dict[str, list[nn.Module]]) -> list[str]:
    """Paths of one usual list of attending blocks in every element of a list; none where some element has none."""
    paths = []
    for number in range(len(group[outer])):
        start = f"{outer}.{number}." if outer else f"{number}."
        inside = [
            path
            for path, blocks in group.items()
            if path.startswith(start) and path.rpartition(".")[2] in _USUAL and all(map(_names_attention, blocks))
        ]
        if not inside or any(_is_list(block) for block in group[outer]):
            return []
        paths.append(min(inside, key=len))
    return paths


def _inside(path: str, outer: str) -> bool:
    return path == outer or not outer or path.startswith(f"{outer}.")


def _words(path: str) -> set[str]:
    return set(re.split(r"[^a-z]+", path.lower()))


def _is_list(module: nn.Module) -> bool:
    """Whether a module only keeps others, and is not called itself unless a class of its own says how."""
    return isinstance(module, nn.ModuleList | nn.ModuleDict)


def _names_attention(module: nn.Module) -> bool:
    """Whether a class in a module is called after attention."""
    return any("att" in type(part).__name__.lower() for part in module.modules())


def _alike(parts: list[nn.Module]) -> bool:
    """Whether these can be transformer blocks: each with a linear map inside, of one class or all with attention."""
    parts = [unwrapped(part) for part in parts]
    return (
        bool(parts)
        and all(not _is_linear(part) and any(map(_is_linear, part.modules())) for part in parts)
        and (len({type(part) for part in parts}) == 1 or all(map(_names_attention, parts)))
    )


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map, quantised or not."""
    return isinstance(module, nn.Linear) or type(module).__name__.lower().endswith("linear")
