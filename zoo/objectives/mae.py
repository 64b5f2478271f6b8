"""A masked autoencoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from zoo.objectives.base import Objective
from zoo.objectives.initial import xavier_weights
from zoo.recipe import Recipe


def sincos_position_embedding(grid: tuple[int, int], dim: int) -> Tensor:
    """MAE's fixed 2-D sine-cosine table with a zero row for [cls]: `(1, 1 + H·W, dim)`."""
    table = build_sincos2d_pos_embed(list(grid), dim=dim, interleave_sin_cos=False)
    return torch.cat([torch.zeros(1, dim), table])[None]


class MaskedAutoencoder(Objective):
    """MAE (He et al., arXiv 2111.06377): the ViT sees a quarter of the patches; a small decoder paints the rest."""

    decoder_position: Tensor

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.vit = VisionTransformer(**recipe.architecture, num_classes=0)
        grid, width = self.vit.patch_embed.grid_size, self.vit.embed_dim
        if recipe.initial == "xavier":
            xavier_weights(self.vit)
            assert self.vit.cls_token is not None
            nn.init.normal_(self.vit.cls_token, std=0.02)
        self.vit.pos_embed = nn.Parameter(sincos_position_embedding(grid, width), requires_grad=False)
        self.mask_ratio = recipe.mask_ratio
        dim = recipe.decoder_dim
        self.decoder_embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        nn.init.normal_(self.mask_token, std=0.02)
        self.register_buffer("decoder_position", sincos_position_embedding(grid, dim), persistent=False)
        self.decoder = nn.Sequential(
            *(Block(dim, recipe.decoder_heads, qkv_bias=True) for _ in range(recipe.decoder_depth)),
            nn.LayerNorm(dim),
        )
        self.patch_size = recipe.architecture["patch_size"]
        self.decoder_head = nn.Linear(dim, 3 * self.patch_size**2)

    def forward(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Mean squared error on the masked patches, each patch's pixels normalised by its own mean and variance."""
        batch, position, cls_token = len(images), self.vit.pos_embed, self.vit.cls_token
        assert position is not None
        assert cls_token is not None
        patches = self.vit.patch_embed(images) + position[:, 1:]
        count, width = patches.shape[1:]
        visible = round(count * (1 - self.mask_ratio))
        order = torch.rand(batch, count, generator=generator).argsort(1).to(images.device)
        keep, masked = order[:, :visible], order[:, visible:]

        cls = (cls_token + position[:, :1]).expand(batch, -1, -1)
        x = torch.cat([cls, patches.gather(1, keep[..., None].expand(-1, -1, width))], 1)
        x = self.decoder_embed(self.vit.norm(self.vit.blocks(x)))

        dim = x.shape[-1]
        shuffled = torch.cat([x[:, 1:], self.mask_token.to(x.dtype).expand(batch, count - visible, -1)], 1)
        restored = torch.zeros_like(shuffled).scatter(1, order[..., None].expand(-1, -1, dim), shuffled)
        x = self.decoder(torch.cat([x[:, :1], restored], 1) + self.decoder_position.to(x.dtype))
        predicted = self.decoder_head(x[:, 1:].gather(1, masked[..., None].expand(-1, -1, dim))).float()

        target = F.unfold(images.float(), self.patch_size, stride=self.patch_size).transpose(1, 2)
        target = target.gather(1, masked[..., None].expand(-1, -1, target.shape[-1]))
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return F.mse_loss(predicted, target)
