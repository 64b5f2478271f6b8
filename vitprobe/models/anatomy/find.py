"""`find_anatomy`: which part of a model is the Vision Transformer, and which way of writing one it follows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from vitprobe.errors import AttentionNotSeenError, UserError
from vitprobe.layout import TokenLayout
from vitprobe.models.anatomy import own_vit, timm_vit, transformers_vit
from vitprobe.models.anatomy.block_lists import BlockList, block_lists, likely, opened
from vitprobe.models.anatomy.copies import why_copy
from vitprobe.models.anatomy.measured import Watched, noise_for, run_once
from vitprobe.models.anatomy.parts import Anatomy, channels_of, read_images, unwrapped
from vitprobe.models.anatomy.towers import Tower, find_towers, runs_alone

# Where models of images and texts keep the part for images.
_TOWERS = ("visual", "vision_model", "vision_tower", "trunk")


def find_anatomy(
    module: nn.Module, layout: TokenLayout | None = None, blocks: Sequence[nn.Module] | None = None
) -> Anatomy:
    """The anatomy of a Vision Transformer: timm's, torchvision's, open_clip's, transformers', or one's own.

    Args:
        module: the model, or one of images and texts, whose image tower is taken, or one that holds a Vision
            Transformer at any depth; compiled or not.
        layout: its tokens, where they are not found or found wrongly.
        blocks: its blocks, likewise.

    Raises:
        AttentionNotSeenError: for a model whose blocks or patch grid are not found, or whose kind of attention is not
            supported; says why and what to do.
        UserError: for a layout that contradicts what the model is known to have, or a model with several Vision
            Transformers of which none can be told from the others; names them.
    """
    module = unwrapped(module)
    reason = why_copy(module)
    if reason is not None:
        raise AttentionNotSeenError(reason)
    path, lineage = _image_tower(module)
    tower = lineage[0]
    if isinstance(getattr(tower, "module", None), nn.Module) and timm_vit.recognise(tower) is None:
        raise AttentionNotSeenError(
            f"{type(tower).__name__} wraps the model and may run copies of it, whose attention cannot be seen; pass "
            f"model.module, and call that inside the capture"
        )
    found = find_towers(lineage, path)
    if blocks is not None:
        return _of_blocks(module, lineage, found.towers, layout, opened(blocks))
    towers = found.towers
    if not towers:
        if found.refusals:
            raise AttentionNotSeenError(found.refusals[0])
        transformers_vit.recognise(tower)  # which says what a model of transformers takes instead of images
        lists = tuple(block_lists(tower))
        if not lists:
            own_vit.recognise(tower, layout)  # which says what is missing
        towers = (Tower(path, lineage, lists, known=False),)  # without a patch embedding that could be recognised
    candidates = [_Candidate(each, blocks) for each in towers for blocks in each.lists]
    if not candidates:
        own_vit.recognise(tower, layout, ())  # which says that there are none
    chosen, remarks = _choose(module, lineage, candidates, layout)
    anatomy = _recognise(chosen.tower, chosen.blocks, layout)
    return _placed(anatomy, chosen.tower.lineage, lineage, remarks)


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A list of blocks that may be the image encoder's, and the part of the model that feeds it."""

    tower: Tower
    blocks: BlockList

    @property
    def paths(self) -> list[str]:
        """Where its lists stand in the model."""
        return [_joined(self.tower.path, path) for path in self.blocks.paths]

    @property
    def expression(self) -> str:
        """Python for its blocks, of `model`."""
        paths = [_spelled(path) for path in self.paths]
        return f"list({paths[0]})" if len(paths) == 1 else f"[{', '.join(f'*{path}' for path in paths)}]"


def _image_tower(module: nn.Module) -> tuple[str, tuple[nn.Module, ...]]:
    """The path of the part of a model of images and texts that takes images, and that part with what holds it.

    Any other model is this part itself, with the path "".
    """
    path, lineage = "", (module,)
    while True:
        parts: list[tuple[str, Any]] = [(name, getattr(lineage[0], name, None)) for name in _TOWERS]
        name, part = next((each for each in parts if isinstance(each[1], nn.Module)), ("", None))
        if part is None:
            return path, lineage
        path, lineage = _joined(path, name), (unwrapped(part), *lineage)


def _choose(
    module: nn.Module, lineage: tuple[nn.Module, ...], candidates: list[_Candidate], layout: TokenLayout | None
) -> tuple[_Candidate, tuple[str, ...]]:
    """The list of blocks that the patch embedding feeds: by where it stands, then by what runs on images.

    Raises:
        UserError: where several cannot be told apart; names them and says how to choose.
    """
    numbers = likely([each.blocks for each in candidates], [each.paths[0] for each in candidates])
    rivals = [candidates[number] for number in numbers]
    if len(rivals) == 1:
        return rivals[0], ()
    runner = runs_alone(lineage) if len({each.tower for each in rivals}) == 1 else _runs_all(lineage)
    ran = [] if runner is None else _running(runner, rivals, layout)
    if len(ran) == 1:
        others = [each for each in rivals if each is not ran[0]]
        named = ", ".join(_spelled(each.paths[0]) for each in others)
        return ran[0], (
            f"{type(module).__name__} has several lists of transformer blocks; {_spelled(ran[0].paths[0])} is taken, "
            f"which its forward pass feeds with the images, not {named} (which {_how_to_choose(others[0], ran[0])[0]} "
            f"takes)",
        )
    names = ", ".join(f"{_spelled(each.paths[0])} ({len(each.blocks.blocks)})" for each in rivals)
    how = _how_to_choose(rivals[0], rivals[1])
    if runner is not None and not ran:  # only the part itself is known to run
        how = how[:1]
    raise UserError(
        f"{type(module).__name__} has several lists of transformer blocks that may be meant (and how many): {names}; "
        f"choose one, such as the first with {' or '.join(how)}"
    )


def _how_to_choose(wanted: _Candidate, other: _Candidate) -> list[str]:
    """Python that takes one of two candidates: by its part of the model, where that is not the other's; by blocks."""
    by_blocks = f"load_model(model, blocks={wanted.expression})"
    return [by_blocks] if wanted.tower is other.tower else [f"load_model({_spelled(wanted.tower.path)})", by_blocks]


def _runs_all(lineage: tuple[nn.Module, ...]) -> nn.Module | None:
    """What runs several towers: the model, or None where it does not take images alone."""
    runner = runs_alone((nn.Identity(), *lineage))
    return None if isinstance(runner, nn.Identity) else runner


def _running(module: nn.Module, rivals: list[_Candidate], layout: TokenLayout | None) -> list[_Candidate]:
    """Those that run on images: of one tower the list that runs first, of several towers those that take the images."""
    embeddings = [own_vit.embedding_of(each.tower.part) for each in rivals]
    watched = [Watched(each.blocks.blocks[0], part) for each, part in zip(rivals, embeddings, strict=True)]
    for each in rivals:
        size = layout.image_size if layout is not None else _size_of(each)
        if size is None:
            continue
        images = noise_for(module, channels_of(own_vit.embedding_of(each.tower.part)), size)
        run_once(module, images, watched)
        if any(seen.began for seen in watched):
            break
    ran = [(seen, each) for seen, each in zip(watched, rivals, strict=True) if seen.began is not None]
    first: dict[Tower, tuple[Watched, _Candidate]] = {}
    for seen, each in sorted(ran, key=lambda pair: pair[0].began or 0):
        first.setdefault(each.tower, (seen, each))
    largest = max((seen.takes for seen, _ in first.values() if seen.takes), default=None)
    # A decoder's own embedding gets features, which are smaller than the images.
    return [each for seen, each in first.values() if seen.takes in (None, largest)]


def _size_of(candidate: _Candidate) -> tuple[int, int] | None:
    try:
        return _recognise(candidate.tower, candidate.blocks, None).image_size
    except UserError:
        return None


def _recognise(tower: Tower, blocks: BlockList, layout: TokenLayout | None) -> Anatomy:
    """The anatomy of a tower, as the library that it follows has it."""
    anatomy = (transformers_vit.recognise(tower.part) or timm_vit.recognise(tower.part)) if tower.known else None
    if anatomy is None:
        return own_vit.recognise(tower.part, layout, blocks.blocks)
    return anatomy if layout is None else _with_layout(anatomy, layout)


def _of_blocks(
    module: nn.Module,
    lineage: tuple[nn.Module, ...],
    towers: Sequence[Tower],
    layout: TokenLayout | None,
    blocks: list[nn.Module],
) -> Anatomy:
    """The anatomy around blocks that the user gave."""
    inside = [tower for tower in towers if blocks and _holds(tower.part, blocks)]
    if not inside:
        return replace(own_vit.recognise(lineage[0], layout, blocks), lineage=lineage)
    tower = inside[0]
    if layout is None and tower.known:
        anatomy = replace(_recognise(tower, tower.lists[0], None), blocks=tuple(blocks))
    else:
        anatomy = own_vit.recognise(tower.part, layout, blocks)
    return _placed(anatomy, tower.lineage, lineage, ())


def _placed(
    anatomy: Anatomy, lineage: tuple[nn.Module, ...], given: tuple[nn.Module, ...], remarks: tuple[str, ...]
) -> Anatomy:
    """An anatomy of a tower within the model that holds it.

    Args:
        anatomy: the tower's.
        lineage: the tower, then what holds it, up to the model.
        given: what is run at most, then what holds that (text towers).
        remarks: lines on how the tower was chosen.
    """
    blocks = tuple(unwrapped(block) for block in anatomy.blocks)
    below = lineage[: len(lineage) - len(given) + 1]
    return replace(
        anatomy,
        blocks=blocks,
        module=runs_alone(below),
        lineage=lineage,
        others=_others(lineage[-1], blocks),
        remarks=remarks,
    )


def _others(module: nn.Module, blocks: tuple[nn.Module, ...]) -> tuple[tuple[str, nn.Module], ...]:
    """Lists of blocks in a model besides those taken."""
    taken = {id(part) for block in blocks for part in block.modules()}
    return tuple(
        (_Candidate(Tower("", (module,), (), known=False), each).expression, each.blocks[0])
        for each in block_lists(module)
        if not any(id(block) in taken for block in each.blocks)
    )


def _holds(part: nn.Module, blocks: Sequence[nn.Module]) -> bool:
    inside = {id(inner) for inner in part.modules()}
    return all(id(block) in inside for block in blocks)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def _spelled(path: str) -> str:
    """Python for a part of `model` at a path in its module tree, without the parts that torch.compile adds."""
    path = path.replace("._orig_mod", "").removeprefix("_orig_mod.")
    return "model" + re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", f".{path}" if path else "")


def _with_layout(anatomy: Anatomy, layout: TokenLayout) -> Anatomy:
    """An anatomy with the user's word on which token is what, for images of the size that its grid is of."""
    size = anatomy.image_size
    if anatomy.layout(size).grid != layout.grid and anatomy.any_size:
        _, size = own_vit.of_given(layout, own_vit.patch_convolution(anatomy.images_enter), None)

    def of_size(asked: tuple[int, int]) -> TokenLayout:
        return own_vit.for_images(layout, anatomy.layout(asked).grid, asked)

    return replace(
        anatomy,
        layout=of_size,
        image_size=size,
        read_input=read_images(of_size, type(anatomy.module).__name__),
        given=True,
    )
