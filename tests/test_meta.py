"""Outlines: what is built on the meta device has the names and shapes of the real thing; all else keeps its values."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from vitprobe.models.meta import on_meta

SMALL = {"depth": 1, "embed_dim": 32, "num_heads": 2}


def facts(module: nn.Module) -> dict[str, Any]:
    tensors = (*module.named_parameters(), *module.named_buffers())
    return {name: (tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in tensors}


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "beit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_an_outline_has_the_names_and_shapes_of_the_model(name: str) -> None:
    with on_meta():
        outline = timm.create_model(name, **SMALL)
    assert facts(outline) == facts(timm.create_model(name, **SMALL))
    assert all(tensor.is_meta for tensor in outline.state_dict().values())


def test_what_is_elsewhere_keeps_its_values() -> None:
    """Some models compute schedules as they are built, on the CPU."""
    with on_meta():
        number = torch.ones(2, device="cpu").mul_(3).add_(1)
    assert number.tolist() == [4, 4]
    assert torch.zeros(2).add_(1).tolist() == [1, 1]  # and outside of it nothing is left out
