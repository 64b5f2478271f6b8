"""The digest of weights: any difference changes it, nothing else does; what it cannot cover is said and not resumed."""

from __future__ import annotations

import functools
import io
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vitprobe as vp
from vitprobe.errors import UserError
from vitprobe.models.identity import unidentified, weights_sha256
from vitprobe.models.loading import load_model
from vitprobe.probing import saved


def vit(seed: int = 1, factor: float = 1.0) -> VisionTransformer:
    torch.manual_seed(seed)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    for block in model.blocks:
        block.attn.qkv.weight.data.mul_(factor)
    return model.eval()


def quantised(factor: float = 1.0, dtype: torch.dtype = torch.qint8) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(vit(factor=factor), {nn.Linear}, dtype=dtype)


def two_kinds(make, *given) -> None:
    """The same weights have one digest, each other weights have another."""
    digests = [weights_sha256(make(value)) for value in given]
    assert None not in digests
    assert digests == [weights_sha256(make(value)) for value in given]
    assert len(set(digests)) == len(given)


class Holder(nn.Module):
    """A module with whatever is given to it."""

    def __init__(self, extra: object = None, **buffers: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        nn.init.ones_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.extra = extra
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=name == "saved")

    def get_extra_state(self) -> object:
        return self.extra

    def set_extra_state(self, state: object) -> None:
        self.extra = state


@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
def test_packed_weights_of_dynamic_quantisation(dtype):
    two_kinds(functools.partial(quantised, dtype=dtype), 1.0, 2.0, 9.0)


def test_quantised_tensors():
    def per_tensor(scale: float) -> nn.Module:
        return Holder(saved=torch.quantize_per_tensor(torch.ones(3) * 40 * scale, scale, 0, torch.qint8))

    def per_channel(number: float) -> nn.Module:
        scales, zeros = torch.tensor([1.0, number]), torch.zeros(2, dtype=torch.long)
        values = torch.stack([torch.ones(3), torch.ones(3) * number])
        return Holder(saved=torch.quantize_per_channel(values, scales, zeros, 0, torch.qint8))

    two_kinds(per_tensor, 1.0, 2.0)  # the same numbers at another scale
    two_kinds(per_channel, 1.0, 2.0)


def test_buffers_whether_saved_or_not():
    two_kinds(lambda value: Holder(saved=torch.full((3,), value)), 1.0, 2.0)
    two_kinds(lambda value: Holder(unsaved=torch.full((3,), value)), 1.0, 2.0)


def test_what_modules_save_beside_their_tensors():
    values = [
        *(
            None,
            1,
            1.0,
            True,
            "1",
            b"1",
            [1],
            (1,),
            {"a": 1},
            {"b": 1},
            {"a": [1, {"c": 2}]},
            torch.float32,
            torch.qint8,
        ),
        *(io.BytesIO(b"2"), np.ones(2), np.ones(2, dtype=np.float32), torch.ones(2), torch.zeros(2), torch.relu),
        *([torch.ones(2)], functools.partial(torch.add, alpha=2), functools.partial(torch.add, alpha=3)),
        *(torch.ones(2).to_sparse(), torch.zeros(2).to_sparse(), torch.tensor([1 + 2j]), torch.tensor([1 + 2j]).conj()),
    ]
    two_kinds(Holder, *values)


class Inner(Tensor):
    """A plain subclass, with words of its own beside the numbers."""


def wrapped(values: Tensor, **words: object) -> Tensor:
    made = values.as_subclass(Inner)
    made.__dict__.update(words)
    return made


class Scaled(Tensor):
    """A wrapper subclass: two tensors in one, as quantisation libraries write it."""

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor, about: object = None):
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)

    def __init__(self, values: Tensor, scale: Tensor, about: object = None) -> None:
        self.values_, self.scale_, self.about = values, scale, about

    def __tensor_flatten__(self):
        return ["values_", "scale_"], self.about

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(function)


class Opaque(Scaled):
    """Another that does not say what is in it."""

    __tensor_flatten__ = None  # type: ignore[assignment]


def test_tensor_subclasses():
    one, two = torch.ones(2, dtype=torch.int8), torch.ones(1)
    values = [
        *(
            Scaled(one, two),
            Scaled(one * 2, two),
            Scaled(one, two * 2),
            Scaled(one, two, "other"),
            Scaled(one, two, (8,)),
        ),
        *(Scaled(Scaled(one, two), two), Scaled(Scaled(one, two * 3), two), wrapped(two), wrapped(two * 2)),
        *(wrapped(two, scale=torch.ones(1)), wrapped(two, scale=torch.zeros(1)), two),
    ]
    two_kinds(lambda value: Holder([value]), *values)
    two_kinds(lambda value: Holder(saved=value), *values)


def test_distributed_tensors(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))

        def make(value: float) -> nn.Module:
            return Holder(saved=distribute_tensor(torch.full((4,), value), mesh, [Shard(0)]))

        two_kinds(make, 1.0, 2.0)
        # How they are dealt out is no part of the weights.
        again = Holder(saved=distribute_tensor(torch.ones(4), mesh, [Replicate()]))
        assert weights_sha256(again) == weights_sha256(make(1.0))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("value", "words"),
    [(object(), "object"), ({"a": [lambda: 1]}, "function"), ([Opaque(torch.ones(1), torch.ones(1))], "Opaque")],
)
def test_what_no_digest_covers_is_named(value, words):
    module = Holder(value)
    assert weights_sha256(module) is None
    assert unidentified(module) == f"_extra_state is a {words}"
    assert unidentified(Holder()) == ""


class Unknown(VisionTransformer):
    def get_extra_state(self) -> object:
        return object()


def unknown() -> VisionTransformer:
    torch.manual_seed(0)
    return Unknown(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0).eval()


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
ONE: dict[str, Any] = {"statistics": ["cls_to_patches"]}
REASON = "the weights of Unknown have no digest (_extra_state is a object)"


def test_such_weights_are_analysed_but_not_resumed(tmp_path):
    profile = vp.analyze(unknown(), IMAGES, out=tmp_path, **ONE)
    assert profile.manifest["model"]["weights_sha256"] is None
    assert list(profile.remarks) == [f"{REASON}: this run cannot be resumed"]
    assert profile.diagnosis().lines
    with pytest.raises(
        UserError, match=rf"^--resume cannot tell .*{re.escape(REASON)}; give --overwrite, or another --out$"
    ):
        vp.analyze(unknown(), list_of_images(tmp_path), out=tmp_path / "2", resume=True, **ONE)
    vp.analyze(unknown(), IMAGES, out=tmp_path, overwrite=True, **ONE)


def test_a_probe_of_such_weights_says_why_it_cannot_be_loaded(monkeypatch, tmp_path):
    words = {
        "model": {"by_name": False, "weights_sha256": None, "name": "Unknown"},
        "arguments": {"model": "Unknown", "checkpoint": None, "arch": None, "weights_key": None, "img_size": None},
    }
    monkeypatch.setattr(saved, "_read", lambda path: (words, {}))
    with pytest.raises(
        UserError, match=r"a\.safetensors was trained on weights that have no digest, so that no model can"
    ):
        vp.load_probe(tmp_path / "a.safetensors", unknown())


def list_of_images(tmp_path):
    from PIL import Image

    Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save(path := tmp_path / "a.png")
    return [str(path)]


def test_a_quantised_run_is_not_taken_for_another(tmp_path):
    first, other = load_model(quantised()), load_model(quantised(9.0))
    pictures = list_of_images(tmp_path)
    vp.analyze(first, pictures, out=tmp_path / "run", **ONE)
    again = vp.analyze(quantised(), pictures, out=tmp_path / "run", resume=True, **ONE)
    assert again.manifest["model"]["weights_sha256"] == weights_sha256(first.module)
    with pytest.raises(UserError, match="begun with weights of SHA-256"):
        vp.analyze(other, pictures, out=tmp_path / "run", resume=True, **ONE)


def test_torchao():
    quantization = pytest.importorskip("torchao.quantization")

    def make(factor: float) -> nn.Module:
        model = vit(factor=factor)
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        return model

    two_kinds(make, 1.0, 2.0)
    assert np.isfinite(vp.analyze(make(1.0), IMAGES, **ONE).table()["mean"]).all()


# Only weights must be finite ------------------------------------------------------------------------------------------


def test_masks_may_hold_infinity_and_weights_may_not():
    model = vit()
    model.register_buffer("attn_mask", torch.full((17, 17), float("-inf")).triu(1))
    model.register_buffer("nothing", torch.tensor(float("nan")))
    assert load_model(model).module is model
    for statistic in ("running_mean", "running_var"):
        model = vit()
        model.blocks[1].extra = nn.BatchNorm1d(4)
        getattr(model.blocks[1].extra, statistic)[2] = float("nan")
        with pytest.raises(UserError, match=rf"hold NaN, first in blocks\.1\.extra\.{statistic} \(block 1\)"):
            load_model(model)


def test_parts_of_quantised_parameters_are_looked_at():
    model = vit()
    model.scaled = nn.Parameter(Scaled(torch.ones(2), torch.tensor(float("inf"))), requires_grad=False)
    with pytest.raises(UserError, match="hold infinity, first in scaled"):
        load_model(model)


def test_lazy_modules_have_no_weights_yet():
    model = vit()
    model.more = nn.LazyLinear(3)
    with pytest.raises(UserError, match=r"has no weights: more\.weight gets its shape from the first images"):
        load_model(model)
