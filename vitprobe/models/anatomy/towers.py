"""Towers: the parts of a model that hold both a patch embedding and the blocks which it feeds, at any depth."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from vitprobe.models.anatomy import timm_vit, transformers_vit
from vitprobe.models.anatomy.block_lists import BlockList, block_lists
from vitprobe.models.anatomy.copies import why_copy
from vitprobe.models.anatomy.parts import unwrapped
from vitprobe.models.anatomy.unsupported import why_unsupported

# Beginnings of the modules in which a forward pass that every model inherits is defined: it only raises.
_INHERITED = ("torch.nn.modules.module", "lightning.", "pytorch_lightning.")
# Names of a first argument that is no batch of images.
_TEXTS = ("input_ids", "ids", "text", "texts", "caption", "captions", "prompt", "prompts")
# How own code calls a patch embedding that is no convolution.
_PATCHES = ("patch_embed", "to_patch", "patchify")


@dataclass(frozen=True, eq=False)
class Tower:
    """The smallest part of a model that holds a patch embedding and blocks.

    Attributes:
        path: where it stands in the model; "" for the model itself.
        lineage: the part, then what holds it, up to the model.
        lists: its lists of blocks.
        known: whether it follows timm or transformers; it has one list then.
    """

    path: str
    lineage: tuple[nn.Module, ...]
    lists: tuple[BlockList, ...]
    known: bool

    @property
    def part(self) -> nn.Module:
        """The part itself."""
        return self.lineage[0]


@dataclass(frozen=True, eq=False)
class Found:
    """What a search gave: the towers, and why other parts are none (families that cannot be captured, copies)."""

    towers: tuple[Tower, ...]
    refusals: tuple[str, ...]


def find_towers(lineage: Sequence[nn.Module], path: str = "") -> Found:
    """The towers in a model, none inside another.

    Args:
        lineage: where to search, then what holds that, up to the model as it was given.
        path: where the first of them stands in the last.
    """
    search = _Search()
    towers = {tower.part: tower for tower in reversed(search.towers(tuple(lineage), path))}
    return Found(tuple(reversed(towers.values())), tuple(search.refusals))


class _Search:
    """One walk through a module tree, from the inside out."""

    def __init__(self) -> None:
        self.refusals: list[str] = []
        self._refused: list[nn.Module] = []
        self._seen: dict[nn.Module, list[Tower]] = {}

    def towers(self, lineage: tuple[nn.Module, ...], path: str) -> list[Tower]:
        """The towers in the first of these; of a part that stands in two places, those of the first."""
        part = unwrapped(lineage[0])
        if part not in self._seen:
            self._seen[part] = self._towers((part, *lineage[1:]), path)
        return self._seen[part]

    def _towers(self, lineage: tuple[nn.Module, ...], path: str) -> list[Tower]:
        part = lineage[0]
        reason = why_copy(part) or why_unsupported(part)
        if reason is not None:
            self.refusals.append(reason)
            self._refused.append(part)
            return []
        if transformers_vit.is_tower(part):
            return [Tower(path, lineage, tuple(block_lists(part)[:1]), known=True)]
        if timm_vit.is_tower(part):
            return [Tower(path, lineage, (timm_vit.list_of_blocks(part),), known=True)]
        inner = [
            tower
            for name, child in part.named_children()
            for tower in self.towers((child, *lineage), f"{path}.{name}" if path else name)
        ]
        if inner:
            return inner
        lists = tuple(each for each in block_lists(part) if not self._holds_refused(each))
        return [Tower(path, lineage, lists, known=False)] if _fed(part, lists) else []

    def _holds_refused(self, blocks: BlockList) -> bool:
        """Whether a list lies in a part that was refused."""
        return any(block is part for refused in self._refused for part in refused.modules() for block in blocks.blocks)


def runs_alone(lineage: Sequence[nn.Module]) -> nn.Module:
    """The outermost of these that takes a batch of images and nothing else; the first, a tower, otherwise.

    Models of transformers with a head or a text tower around the images' are not run for their tower alone.
    """
    for part in reversed(lineage[1:]):
        if not transformers_vit.from_transformers(part) and _takes_one_tensor(part):
            return part
    return lineage[0]


def _takes_one_tensor(module: nn.Module) -> bool:
    """Whether a module has a forward pass of its own that can be called with one positional argument, not a text."""
    forward = module.forward
    if (getattr(forward, "__module__", None) or "").startswith(_INHERITED):
        return False
    try:
        arguments = inspect.signature(forward).bind(None).arguments
    except TypeError:
        return False
    return next(iter(arguments)) not in _TEXTS


def _fed(part: nn.Module, lists: Sequence[BlockList]) -> bool:
    """Whether a part holds a list of blocks and, outside its blocks, something that cuts images into patches."""
    embeddings = [inner for path, inner in part.named_modules() if _cuts_patches(path.rpartition(".")[2], inner)]
    return any(
        not any(embedding is inner for block in each.blocks for inner in block.modules())
        for each in lists
        for embedding in embeddings
    )


def _cuts_patches(name: str, part: nn.Module) -> bool:
    """Whether a part steps over its input by more than a pixel, or is called a patch embedding."""
    if isinstance(part, nn.Conv2d):
        return max(part.stride) > 1
    return any(word in name.lower() for word in _PATCHES)
