"""What a load by names and shapes does not notice: heads, a norm that should not be there, tables of positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitprobe.errors import UserError
from vitprobe.models.anatomy.find import find_anatomy
from vitprobe.models.official.entries import OfficialCheckpoint

# Heads of MoCo v3's Vision Transformers by width: its ViT-S has twice the usual number.
_MOCO_HEADS = {384: 12, 768: 12, 1024: 16, 1280: 16}
_SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"


def require_heads(state: dict[str, Tensor], module: nn.Module, source: str) -> None:
    """Returns where a file is not MoCo v3's, or the model has the heads that MoCo v3 was trained with.

    Names and shapes are the same for any number of heads, and the attention of another number is another model's.

    Args:
        state: the weights as the file names them.
        module: the model they are meant for.
        source: what the message calls the file.

    Raises:
        UserError: where the model splits its channels into other heads; says which alias to use.
    """
    if not any("base_encoder.blocks." in name for name in state):
        return
    anatomy = find_anatomy(module)
    found, wanted = anatomy.num_heads, _MOCO_HEADS.get(anatomy.width or 0)
    if found is None or wanted is None or found == wanted:
        return
    name = (getattr(module, "pretrained_cfg", None) or {}).get("architecture") or type(module).__name__
    raise UserError(
        f"{source} is MoCo v3's (module.base_encoder.), whose ViT of width {anatomy.width} has {wanted} heads; "
        f"{name} has {found}: give --arch mocov3_vit_s"
    )


def require_layout(entry: OfficialCheckpoint, state: dict[str, Tensor], source: str) -> None:
    """Returns where nothing in converted weights speaks against an official checkpoint.

    Args:
        entry: what the weights are meant to be.
        state: the weights after the layout's converter.
        source: what the message calls the file.

    Raises:
        UserError: for a final norm where the release has none (MaskFeat), tables of relative positions in every block,
            or a shared one of other heads or of another image size (BEiT and its kin).
    """
    if entry.layout == "maskfeat":
        _refuse_norm(entry, state, source)
    if entry.layout in ("beit", "simmim"):
        _require_table(entry, state, source)


def _refuse_norm(entry: OfficialCheckpoint, state: dict[str, Tensor], source: str) -> None:
    norm = state.get("norm.weight")
    if norm is None:
        return
    kind = "NaN" if torch.isnan(norm).any() else "weights of its own"
    raise UserError(
        f"{source} has a final norm (norm.weight: {kind}), which MaskFeat was trained without: it is a conversion, not "
        f"the release; take {entry.address}"
    )


def _require_table(entry: OfficialCheckpoint, state: dict[str, Tensor], source: str) -> None:
    table = state.get(_SHARED_TABLE)
    if table is None:
        if "blocks.0.attn.relative_position_bias_table" in state:
            timms = entry.spec.architecture.partition(" ")[0]
            raise UserError(
                f"{source} has a table of relative positions in every block: it is a fine-tuned BEiT, not "
                f"{entry.spec.name}; give --arch {timms}"
            )
        return  # the load names it as missing
    heads, patches = entry.arguments["num_heads"], entry.arguments.get("img_size", 224) // entry.arguments["patch_size"]
    rows = (2 * patches - 1) ** 2 + 3  # three more for [cls]
    if tuple(table.shape) != (rows, heads):
        found = "×".join(map(str, table.shape))
        raise UserError(
            f"{source} does not fit {entry.spec.name}: its {_SHARED_TABLE} is {found}, needed is {rows}×{heads} "
            f"({patches}×{patches} patches, {heads} heads)"
        )
