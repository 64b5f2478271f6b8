"""CAPI (arXiv 2502.08769): its encoder, which timm does not have, and the names of the release.

The encoder is a pre-norm Vision Transformer with RMS norms, projections without bias (queries, keys and values apart),
and rotary positions: patches lie at 0..1 on either axis, the registers, which come first, on the edge of the image.
There is no [cls]; the norm at the end has no weights.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers.mlp import Mlp
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn

from vitprobe.models.official.layout import Layout, State, behind, without

_EPSILON = 1e-5  # of the RMS norms
# Waves across the image: the highest and the lowest frequency of the rotary positions.
_FREQUENCIES = (7.0, 7e-4)


class CapiEncoder(nn.Module):
    """CAPI's encoder.

    Args:
        img_size: pixels that its images have by default; it takes any that whole patches tile.
        patch_size: pixels an edge of a patch.
        embed_dim: channels of a token.
        depth: blocks.
        num_heads: heads of a block.
        num_registers: registers; four sides of the image share them evenly.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 14,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        num_registers: int = 16,
    ) -> None:
        super().__init__()
        self.num_features = self.embed_dim = embed_dim
        self.num_prefix_tokens = self.num_reg_tokens = num_registers
        self.patch_embed = PatchEmbed(img_size, patch_size, 3, embed_dim, strict_img_size=False)
        self.reg_token = nn.Parameter(torch.randn(1, num_registers, embed_dim) * 0.02)
        self.blocks = nn.ModuleList([_Block(embed_dim, num_heads) for _ in range(depth)])
        self.norm = nn.RMSNorm(embed_dim, eps=_EPSILON, elementwise_affine=False)

    def forward_features(self, images: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B token channel"]:
        """The normalised tokens: registers first, then the patches row by row."""
        patches = self.patch_embed(images)
        positions = self._positions(*self.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1])))
        tokens = torch.cat([self.reg_token.expand(len(patches), -1, -1), patches], dim=1)
        for block in self.blocks:
            tokens = block(tokens, positions)
        return self.norm(tokens)

    def forward(self, images: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B channel"]:
        """The mean of the normalised patch tokens."""
        return self.forward_features(images)[:, self.num_prefix_tokens :].mean(dim=1)

    def _positions(self, rows: int, columns: int) -> Float[Tensor, "token 2"]:
        """Row and column of each token, 0..1; float32."""
        device = self.reg_token.device
        patches = torch.cartesian_prod(
            torch.linspace(0, 1, rows, device=device), torch.linspace(0, 1, columns, device=device)
        )
        step = torch.arange(self.num_reg_tokens // 4, device=device) / (self.num_reg_tokens // 4)
        zero, one = torch.zeros_like(step), torch.ones_like(step)
        # Along the four sides, each from the corner where the one before ends.
        sides = [(step, zero), (one, step), (1 - step, one), (zero, 1 - step)]
        edge = torch.cat([torch.stack(side, dim=1) for side in sides])
        return torch.cat([edge * patches.amax(dim=0), patches])  # an image of one row has no height


class _Block(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(dim, eps=_EPSILON)
        self.attn = _Attention(dim, num_heads)
        self.drop_path1 = nn.Identity()  # where capture reads what attention adds
        self.norm2 = nn.RMSNorm(dim, eps=_EPSILON)
        self.mlp = Mlp(dim, 4 * dim, bias=False)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        tokens = tokens + self.drop_path1(self.attn(self.norm1(tokens), positions))
        return tokens + self.mlp(self.norm2(tokens))


class _Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj, self.proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.rope = _Rotary(dim // num_heads)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        query, key, value = (
            projection(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(self.rope(query, positions), self.rope(key, positions), value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class _Rotary(nn.Module):
    """Rotary positions of two axes at once: channel i of d mixes with its partner, half of d away.

    The first half of the channels takes its sines and cosines from a token's row, the second half from its column.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        highest, lowest = _FREQUENCIES
        quarter = dim // 4
        waves = highest * (lowest / highest) ** torch.linspace(0, 1, quarter).repeat(2)
        frequencies = torch.zeros(2, dim)
        frequencies[0, : 2 * quarter] = frequencies[1, dim - 2 * quarter :] = 2 * torch.pi * waves
        self.freqs = nn.Parameter(frequencies, requires_grad=False)  # the released file holds them in every block

    def forward(self, heads: Tensor, positions: Tensor) -> Tensor:
        angles = positions.to(self.freqs.dtype) @ self.freqs
        first, second = heads.chunk(2, dim=-1)
        turned = heads * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()
        return turned.to(heads.dtype)  # under autocast the angles stay in float32


_RENAMED = {"residual1.norm": "norm1", "residual1.fn": "attn", "residual2.norm": "norm2", "residual2.fn": "mlp"}


def convert(state: State) -> State:
    """Return the encoder under the names of `CapiEncoder`, without the decoder."""
    state = without(behind(state, "backbone."), "mask_token", "decoder.")
    renamed: State = {}
    for name, value in state.items():
        name = name.removeprefix("encoder.")
        for old, new in _RENAMED.items():
            name = name.replace(f".{old}.", f".{new}.")
        name = "reg_token" if name == "registers" else re.sub(r"^patch_embed\.(?!proj\.)", "patch_embed.proj.", name)
        renamed[name] = value
    return renamed


LAYOUT = Layout(
    words="backbone.encoder.blocks.0.residual1.fn.q_proj.weight … beside backbone.decoder.",
    convert=convert,
    build=CapiEncoder,
    has_classifier=False,
)
