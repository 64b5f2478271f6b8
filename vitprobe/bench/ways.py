"""The ways to see attention that are measured: captures, and what is usual with timm and transformers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitprobe.hooks.capture import capture
from vitprobe.models.loaded import LoadedModel
from vitprobe.models.loading import load_model
from vitprobe.statistics import of_the_paper

PAPERS = tuple(statistic.name for statistic in of_the_paper())


def _plain(module: nn.Module, images: Tensor) -> None:
    module(images)


def _papers(module: nn.Module, images: Tensor) -> None:
    with capture(module, keep="statistics", statistics=PAPERS) as attention:
        module(images)
    attention.statistics()


def _every(module: nn.Module, images: Tensor) -> None:
    with capture(module, keep="statistics") as attention:
        module(images)
    attention.statistics()


def _eager_hooks(module: nn.Module, images: Tensor) -> None:
    """As is usual with timm: fused attention off, whole matrices read where they enter their dropout, of all blocks.

    The paper's three statistics are computed of these.
    """
    matrices: list[Tensor] = []
    with ExitStack() as stack:
        for name, part in module.named_modules():
            if hasattr(part, "fused_attn"):
                stack.callback(setattr, part, "fused_attn", part.fused_attn)
                part.fused_attn = False  # type: ignore[assignment]
            if name.endswith("attn_drop"):
                hook = part.register_forward_pre_hook(lambda _, args: matrices.append(args[0]))
                stack.callback(hook.remove)
        module(images)
    for matrix in matrices:
        of_cls, patches = matrix[:, :, 0], matrix[:, :, 1:, 1:]
        shares = of_cls[..., 1:] / of_cls[..., 1:].sum(-1, keepdim=True)
        _ = of_cls[..., 0], torch.special.entr(shares).sum(-1)
        _ = (patches.diagonal(dim1=-2, dim2=-1) / patches.sum(-1)).mean(-1)


def _output_attentions(module: nn.Module, images: Tensor) -> None:
    """As is usual with transformers: its eager attention, which returns the matrices of all blocks."""
    model: Any = module
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        model(images, output_attentions=True)
    finally:
        model.set_attn_implementation(implementation)


WAYS: dict[str, Callable[[nn.Module, Tensor], None]] = {
    "plain": _plain,
    "papers": _papers,
    "every": _every,
    "eager hooks": _eager_hooks,
    "output_attentions": _output_attentions,
}
WORDS = {
    "plain": "the model's own forward pass",
    "papers": "the paper's three statistics",
    "every": "every statistic",
    "eager hooks": "whole matrices from hooks, fused attention off (usual with timm)",
    "output_attentions": "output_attentions of the same ViT in transformers",
}


def suitable(loaded: LoadedModel) -> list[str]:
    """Ways that can be measured for a model."""
    ways = ["papers", "every"]
    if any(hasattr(part, "fused_attn") for part in loaded.module.modules()):
        ways.append("eager hooks")
    plain = type(loaded.module) is VisionTransformer and loaded.layout.has_cls and loaded.layout.num_prefix_tokens == 1
    if plain and find_spec("transformers") is not None:
        ways.append("output_attentions")
    return ways


def set_up(
    model: str, img_size: int | tuple[int, int] | None, batch_size: int, device: str, way: str
) -> tuple[nn.Module, Tensor]:
    """The model and the images; in the way of transformers its own ViT of the same sizes."""
    torch.manual_seed(0)
    loaded = load_model(model, img_size=img_size, pretrained=False)
    module = _of_transformers(loaded) if way == "output_attentions" else loaded.module
    images = torch.randn(batch_size, loaded.anatomy.channels, *loaded.transform.size, device=device)
    return module.to(device).eval(), images


def _of_transformers(loaded: LoadedModel) -> nn.Module:
    from transformers import ViTConfig, ViTModel

    width, block = loaded.anatomy.width or 768, loaded.anatomy.blocks[0]
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=len(loaded.anatomy.blocks),
        num_attention_heads=loaded.anatomy.num_heads or 12,
        intermediate_size=block.mlp.fc1.out_features,  # type: ignore[union-attr]
        image_size=loaded.transform.size,
        patch_size=loaded.layout.patch_size[0],
    )
    return ViTModel(config, add_pooling_layer=False)
