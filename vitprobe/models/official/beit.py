"""BEiT, BEiT v2 and data2vec before fine-tuning: one table of relative positions for all blocks; and SimMIM's names."""

from __future__ import annotations

from functools import partial

from timm.models.beit import Beit

from vitprobe.errors import UserError
from vitprobe.models.official.entries import OfficialCheckpoint
from vitprobe.models.official.layout import Layout, State, behind, without

_SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
_WORDS = "BEiT's names with one table for all blocks"

build = partial(Beit, use_abs_pos_emb=False, use_rel_pos_bias=False, use_shared_rel_pos_bias=True, global_pool="token")


def convert(state: State) -> State:
    """Return the encoder without the prediction heads; the index of positions is rebuilt with the model."""
    state = without(state, "mask_token", "lm_head.", "cls_pt_")
    return {name: value for name, value in state.items() if not name.endswith("relative_position_index")}


def convert_simmim(state: State) -> State:
    """Return SimMIM's encoder, which is BEiT's behind `encoder.`, without the decoder."""
    return convert(behind(state, "encoder."))


def check(entry: OfficialCheckpoint, state: State, source: str) -> None:
    """Raise `UserError` for a table of relative positions in every block, or one of other heads or another image size.

    Args:
        entry: the checkpoint that the weights are meant to be.
        state: the converted weights.
        source: what the message calls the file.
    """
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


LAYOUT = Layout(
    words=f"{_WORDS} ({_SHARED_TABLE}), beside lm_head. and mask_token", convert=convert, build=build, check=check
)
SIMMIM = Layout(words=f"{_WORDS} behind encoder., beside decoder.", convert=convert_simmim, build=build, check=check)
