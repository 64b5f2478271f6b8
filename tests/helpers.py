"""What several test files share: the one tolerance, tiny models with peaked attention, random views."""

from __future__ import annotations

import http.server
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.overrides import _len_torch_function_stack
from torch.utils._python_dispatch import TorchDispatchMode

from vitprobe.attention.rows import RowSummary
from vitprobe.attention.view import AttentionView
from vitprobe.errors import UserError
from vitprobe.hooks.capture import Capture, capture
from vitprobe.layout import TokenLayout

Model = TypeVar("Model", bound=nn.Module)
SMALL = {"img_size": 32, "patch_size": 8}
SIZES = {  # the same small model, as the configs of transformers say it
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
TOLERANCE = 1e-4  # the project's error bound; float32 against float64


def assert_close(actual: Any, expected: Any, *, max_logit: float = 0.0, tolerance: float = TOLERANCE) -> None:
    """Assert |a − b| / max(1e-2, |b|) ≤ tolerance·max(1, max|s| / 100) everywhere, the same shape, and nothing NaN.

    The rounding of the logits s grows with their size, and the bound with it.
    """
    a, b = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert a.shape == b.shape, f"shapes {a.shape} and {b.shape} differ"
    with np.errstate(invalid="ignore"):
        error = np.where(a == b, 0, np.abs(a - b) / np.maximum(1e-2, np.abs(b)))  # inf equals inf
    bound = tolerance * max(1.0, max_logit / 100)
    within = error <= bound  # False for NaN
    assert within.all(), f"error {error.max():.2e} is over {bound:.2e}: {a[~within][:3]} for {b[~within][:3]}"


def assert_all_close(actual: dict[str, Any], expected: dict[str, Any], **how: float) -> None:
    """`assert_close` for each name of two dictionaries, which must have the same names."""
    assert set(actual) == set(expected)
    for name in expected:
        try:
            assert_close(actual[name], expected[name], **how)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def tiny_vit(**options: Any) -> VisionTransformer:
    """A Vision Transformer of two blocks for images of 32 px: 16 patches, 2 heads; in eval mode."""
    sizes: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 5,
    }
    return randomize(VisionTransformer(**(sizes | options))).eval()


def stated_vit(**options: Any) -> VisionTransformer:
    """`tiny_vit` that states how its images are prepared, so that no default is taken and none is said."""
    model = tiny_vit(**options)
    model.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "crop_pct": 1.0}
    return model


def tiny(name: str, **options: Any) -> nn.Module:
    """The architecture `name` of timm at two blocks of width 64, 4 heads; in eval mode."""
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    sizes = {"embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 5}
    return randomize(timm.create_model(name, **(sizes | options))).eval()


def randomize(model: Model, seed: int = 0) -> Model:
    """Weights so large that attention is peaked and no scale, gain or position is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(word in name for word in ("token", "embed", "table", "pos_")) and "proj" not in name:
                parameter.normal_(std=1.0, generator=generator)
            elif "lambda_" in name:  # of differential attention; their products are exponents
                parameter.normal_(std=0.1, generator=generator)
            elif parameter.ndim >= 2:
                parameter.normal_(std=(2 / parameter[0].numel()) ** 0.5, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1, generator=generator)
            else:  # gains of norms, LayerScale
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model


def images(batch: int = 2, height: int = 32, width: int | None = None, seed: int = 1) -> Tensor:
    """Random images `(batch, 3, height, width)`."""
    return torch.randn(batch, 3, height, width or height, generator=torch.Generator().manual_seed(seed))


def write_noise(folder: Path, count: int, height: int = 40, width: int = 40) -> Path:
    """Makes a folder of so many pictures of noise: 00.png, 01.png …"""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    return folder


def random_view(
    layout: TokenLayout,
    *,
    batch: int = 2,
    heads: int = 3,
    dim: int = 8,
    sharpness: float = 1.0,
    dtype: torch.dtype = torch.float32,
    bias: Tensor | None = None,
    seed: int = 0,
    norms: bool = True,
) -> AttentionView:
    """An `AttentionView` of random queries and keys; logits have a standard deviation of about `sharpness`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens = layout.num_tokens
    query, key = (draw(batch, heads, tokens, dim).mul(sharpness**0.5).to(dtype) for _ in range(2))
    of_tokens = [draw(batch, tokens).abs().add(0.1).float() if norms else None for _ in range(4)]
    return AttentionView(0, query, key, dim**-0.5, bias, layout, *of_tokens)


def tensors_of(rows: RowSummary) -> dict[str, Tensor]:
    """What there is in a summary of rows, by name."""
    return {name: value for name, value in vars(rows).items() if isinstance(value, Tensor)}


@torch.no_grad()
def captured(model: nn.Module, x: Any = None, **options: Any) -> Capture:
    """What a capture holds after one forward pass of `x` (without it, of two random images)."""
    with capture(model, **options) as attention:
        model(images() if x is None else x)
    return attention


def state_of(model: nn.Module) -> list[Any]:
    """What a capture may touch: hooks, flags, modes of modules; and torch's stack of function modes."""
    modules = [
        (
            name,
            module.training,
            getattr(module, "fused_attn", None),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            len(module._forward_hooks_always_called),
            len(module._forward_pre_hooks_with_kwargs),
        )
        for name, module in model.named_modules()
    ]
    return [*modules, _len_torch_function_stack()]


def hear_ctrl_c() -> None:
    """For `preexec_fn` of a process that is to be sent SIGINT: what runs in the background of a shell ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def serving(handler: Callable[..., Any], **what: Any) -> Iterator[Any]:
    """An HTTP server on this machine, its address and `what` among its attributes, until the block ends."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:  # type: ignore[arg-type]
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        vars(running).update(what, address=f"http://127.0.0.1:{running.server_port}")
        yield running
        running.shutdown()
        thread.join()


def message(error: pytest.ExceptionInfo[UserError]) -> str:
    """The text of an error, which must be one line."""
    text = str(error.value)
    assert text and "\n" not in text
    return text


class LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return output


class OwnBlock(nn.Module):
    """A block whose attention is whatever `attend` does with `(B, 2, N, 8)` queries, keys and values."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attend = attend
        self.qkv = nn.Linear(16, 48)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, tokens, _ = hidden.shape
        qkv = self.qkv(hidden).view(batch, tokens, 3, 2, 8).permute(2, 0, 3, 1, 4)
        return hidden + self.attend(*qkv).transpose(1, 2).reshape(batch, tokens, 16)


class OwnModel(nn.Module):
    num_prefix_tokens = 0

    def __init__(self, attend: Callable[..., Tensor] = F.scaled_dot_product_attention, by_keyword: bool = True) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(32, 8, 3, 16)
        self.blocks = nn.ModuleList([OwnBlock(attend), OwnBlock(attend)])
        self.by_keyword = by_keyword

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(x=images) if self.by_keyword else self.patch_embed(images)
        for block in self.blocks:
            x = block(hidden=x) if self.by_keyword else block(x)
        return x
