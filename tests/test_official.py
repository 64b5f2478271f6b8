"""Official checkpoints: layouts against an independent re-statement, every entry at full size."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from official_layouts import save, synthesise
from official_reference import beit, capi, data2vec2, franca, mae_ft, vit
from vitprobe.hooks.capture import capture
from vitprobe.models.building import outline
from vitprobe.models.caches import address_path
from vitprobe.models.checkpoints import load_into
from vitprobe.models.entries import ADDRESSES, BUNDLED_CLASSES, NORMALISATIONS
from vitprobe.models.loading import load_model, require_loadable
from vitprobe.models.official.building import create_official
from vitprobe.models.official.entries import OFFICIAL, find_official
from vitprobe.models.official.layouts import LAYOUTS
from vitprobe.models.registry import all_specs, find_spec

# Loaded here from synthesised checkpoints, and the bundled ones (test_loading); all others need the network.
SYNTHESISED = {
    *("mae_ft_vit_b", "mae_ft_vit_l", "mae_ft_vit_h", "mae_vit_s", "mocov3_vit_s", "mocov3_vit_b"),
    *("ibot_vit_s", "ibot_vit_b", "ibot_vit_l", "beit_vit_b", "beit_vit_l", "beitv2_vit_b"),
    *("data2vec_vit_b", "data2vec_vit_l", "data2vec2_vit_b", "data2vec2_vit_l", "simmim_vit_b"),
    *("maskfeat_vit_b", "maskfeat_vit_l", "capi_vit_l", "franca_vit_b", "franca_vit_l"),
}
BUNDLED = set(BUNDLED_CLASSES)
TINY = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 32}

Reference = Callable[[dict[str, Tensor], Tensor, int, int], Tensor]
REFERENCES: dict[str, Reference] = {
    "mae_ft_vit_b": mae_ft,
    "mae_vit_s": vit,
    "mocov3_vit_s": partial(vit, prefix="module.base_encoder."),
    "ibot_vit_s": vit,
    "maskfeat_vit_b": partial(vit, norm=""),
    "beit_vit_b": beit,
    "beitv2_vit_b": beit,
    "data2vec_vit_b": beit,
    "simmim_vit_b": partial(beit, prefix="encoder."),
    "data2vec2_vit_b": data2vec2,
    "capi_vit_l": capi,
    "franca_vit_b": franca,
}


def shrink(monkeypatch: pytest.MonkeyPatch, name: str, **sizes: Any) -> dict[str, Any]:
    """Makes an entry small for one test; its sizes."""
    entry = OFFICIAL[name]
    arguments = entry.arguments | TINY | sizes
    monkeypatch.setitem(OFFICIAL, name, replace(entry, arguments=arguments))
    return arguments


# The entries ----------------------------------------------------------------------------------------------------------


def test_every_entry_of_the_registry_is_loaded_here_or_needs_the_network():
    names = {spec.name for spec in all_specs()}
    needs_network = {spec.name for spec in all_specs() if spec.source.startswith("timm:")}
    assert set(OFFICIAL) == SYNTHESISED
    assert SYNTHESISED | BUNDLED | needs_network == names
    assert len(SYNTHESISED) + len(BUNDLED) + len(needs_network) == len(names)


def test_entries_are_well_formed():
    for name, entry in OFFICIAL.items():
        spec = entry.spec
        assert find_spec(name) is spec
        assert find_official(spec.source) is find_official(name) is entry
        assert spec.name == name
        assert spec.normalisation in NORMALISATIONS
        assert entry.layout in LAYOUTS
        assert not (entry.address and entry.by_hand)
        if not entry.address:
            assert "by hand" in spec.notes or "no public source" in spec.notes
        assert entry.address.startswith("https://") or not entry.address
    assert find_official("mae_vit_b") is None
    assert set(LAYOUTS) == {entry.layout for entry in OFFICIAL.values()}
    assert len({layout.words for layout in LAYOUTS.values()}) == len(LAYOUTS)


def test_no_two_checkpoints_share_a_file_in_the_cache():
    paths = [address_path(entry.address, entry.cached_name) for entry in OFFICIAL.values() if entry.address]
    paths += [address_path(address) for address in ADDRESSES.values()]
    assert len(set(paths)) == len(paths) == 20 + len(ADDRESSES)
    assert OFFICIAL["mocov3_vit_b"].cached_name == "vit-b-300ep.pth.tar", "torch.hub's own name where it is unique"


@pytest.mark.parametrize("name", sorted(SYNTHESISED))
def test_an_entry_fits_its_full_official_shape(name):
    """Names and shapes at full size, without memory: converter, checks and load on the meta device."""
    entry = OFFICIAL[name]
    official = synthesise(name, entry.arguments, device="meta")
    state = LAYOUTS[entry.layout].convert(dict(official))
    LAYOUTS[entry.layout].check(entry, state, "it")
    module = outline(name, num_classes=1000 if "head.weight" in state else 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # there is nothing to copy
        load_into(module, state, source="it")
    assert module.pretrained_cfg["architecture"] == name  # type: ignore[index]
    assert module.pretrained_cfg["mean"] == NORMALISATIONS[entry.spec.normalisation][0]  # type: ignore[index]


@pytest.mark.parametrize("name", sorted(SYNTHESISED))
def test_an_entry_loads_from_a_file_and_is_captured(name, tmp_path, monkeypatch):
    """The whole way from a file at the entry's own width, heads, patches and images; two blocks of its depth."""
    arguments = OFFICIAL[name].arguments | {"depth": 2}
    monkeypatch.setitem(OFFICIAL, name, replace(OFFICIAL[name], arguments=arguments))
    path = save(tmp_path / "official.pth", name, synthesise(name, arguments))
    model = load_model(name, checkpoint=path)
    assert model.spec == replace(OFFICIAL[name].spec, source="file:official.pth")
    assert not model.module.training
    assert (model.transform.mean, model.transform.std) == NORMALISATIONS[model.spec.normalisation]
    expected = 518 if name.startswith("franca") else 224
    assert model.transform.size == (expected, expected)
    registers = 16 if name == "capi_vit_l" else 0
    assert (model.layout.has_cls, model.layout.num_registers) == (registers == 0, registers)
    assert model.layout.grid == (expected // arguments["patch_size"],) * 2
    if expected == 224:
        with torch.no_grad(), capture(model.module) as attention:
            model.module(torch.randn(1, 3, 224, 224))
        assert len(attention) == 2
        assert attention[1].query is not None
        assert attention[1].query.shape == (
            *(1, arguments["num_heads"], model.layout.num_tokens),
            arguments["embed_dim"] // arguments["num_heads"],
        )


def test_an_entry_loads_at_its_real_size(tmp_path):
    path = save(tmp_path / "s.pth.tar", "mocov3_vit_s", synthesise("mocov3_vit_s", OFFICIAL["mocov3_vit_s"].arguments))
    model = load_model("mocov3_vit_s", checkpoint=path)
    blocks: Any = model.module.blocks
    assert len(blocks) == 12
    assert {block.attn.num_heads for block in blocks} == {12}
    by_arch = load_model(path, arch="mocov3_vit_s")
    assert by_arch.spec.name == "s"
    assert by_arch.spec.licence == ""
    assert by_arch.transform == model.transform


# The architectures ----------------------------------------------------------------------------------------------------


def images(side: int = 32, width: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(2, 3, side, width or side, generator=generator, dtype=torch.float64)


def doubled(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in state.items()}


@pytest.mark.parametrize("name", REFERENCES)
@torch.no_grad()
def test_a_converted_checkpoint_gives_the_official_outputs(name, tmp_path, monkeypatch):
    sizes = shrink(monkeypatch, name)
    state = synthesise(name, sizes)
    model = load_model(name, checkpoint=save(tmp_path / "official.pth", name, state))
    module: Any = model.module.double()
    x = images()
    actual = module(x) if name.startswith("mae_ft") else module.forward_features(x)
    expected = REFERENCES[name](doubled(state), x, 3, 2)
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-5
    assert expected.std() > 0.1


@pytest.mark.parametrize("name", ["mae_ft_vit_b", "mocov3_vit_s", "maskfeat_vit_b", "data2vec2_vit_b", "franca_vit_b"])
@torch.no_grad()
def test_the_re_statement_notices_other_heads(name, monkeypatch):
    """So that the test above could fail; in the other layouts the weights themselves know the number of heads."""
    sizes = shrink(monkeypatch, name)
    state = doubled(synthesise(name, sizes))
    x = images()
    difference = (REFERENCES[name](state, x, 3, 2) - REFERENCES[name](state, x, 4, 2)).abs().max()
    assert difference > 1e-3


@torch.no_grad()
def test_maskfeat_with_one_projection_is_the_same(tmp_path, monkeypatch):
    sizes = shrink(monkeypatch, "maskfeat_vit_b")
    state = synthesise("maskfeat_vit_b", sizes)
    fused = LAYOUTS["maskfeat"].convert(state)
    apart = load_model("maskfeat_vit_b", checkpoint=save(tmp_path / "apart.pth", "maskfeat_vit_b", state))
    together = load_model("maskfeat_vit_b", checkpoint=save(tmp_path / "fused.pth", "maskfeat_vit_b", fused))
    assert not any(".attn.q." in key for key in fused)
    assert torch.equal(apart(images().float()), together(images().float()))


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(32, 48), (8, 40)])
def test_capi_takes_any_image_size(tmp_path, monkeypatch, height, width):
    sizes = shrink(monkeypatch, "capi_vit_l")
    state = synthesise("capi_vit_l", sizes)
    path = save(tmp_path / "capi.pth", "capi_vit_l", state)
    require_loadable("capi_vit_l", checkpoint=path, img_size=(height, width))
    model = load_model("capi_vit_l", checkpoint=path, img_size=(height, width))
    module: Any = model.module.double()
    x = images(height, width)
    assert (module.forward_features(x) - capi(doubled(state), x, 3, 2)).abs().max() <= 1e-5
    assert module(x).shape == (2, 48)
    assert model.layout.grid == (height // 8, width // 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = load_model("capi_vit_l", checkpoint=path)(images().float())
    assert torch.isfinite(mixed).all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["simmim_vit_b", "data2vec2_vit_b", "capi_vit_l"])
def test_the_attention_that_is_captured(name, tmp_path, monkeypatch):
    """Its probabilities give the attention's own output; updates and outputs are those of the residual stream."""
    sizes = shrink(monkeypatch, name)
    model = load_model(name, checkpoint=save(tmp_path / "it.pth", name, synthesise(name, sizes)))
    block: Any = model.module.blocks[1]  # type: ignore[index]
    seen: dict[str, Tensor] = {}
    hooks = [
        block.attn.register_forward_hook(lambda module, args, output: seen.update(input=args[0], output=output)),
        block.register_forward_hook(lambda module, args, output: seen.update(residual=args[0])),
    ]
    with capture(model) as attention:
        model(images().float())
    for hook in hooks:
        hook.remove()
    if name == "capi_vit_l":
        value = block.attn.v_proj(seen["input"])
    else:
        value = block.attn.qkv(seen["input"])[..., 96:]
        value = value + (block.attn.v_bias if name == "simmim_vit_b" else 0)
    value = value.unflatten(-1, (3, -1)).transpose(1, 2)
    mixed = (attention[1].probabilities() @ value).transpose(1, 2).flatten(2)
    assert torch.allclose(block.attn.proj(mixed), seen["output"], atol=1e-5)
    update = seen["output"] * (block.gamma_1 if name == "simmim_vit_b" else 1)
    ratio = (update.norm(dim=-1) / seen["residual"].norm(dim=-1))[:, model.layout.num_prefix_tokens :].mean(-1)
    assert torch.allclose(attention.statistics()["patch_update_ratio"][:, 1, 0].float(), ratio, rtol=1e-4)


@torch.no_grad()
def test_capi_starts_from_the_published_frequencies():
    module: Any = create_official(OFFICIAL["capi_vit_l"], embed_dim=32, depth=1, num_heads=2)
    freqs = module.blocks[0].attn.rope.freqs / (2 * torch.pi)
    assert torch.allclose(freqs[0, :8], freqs[1, 8:])
    assert torch.equal(freqs[0, 8:], torch.zeros(8))
    assert torch.allclose(freqs[0, [0, 3, 4, 7]], torch.tensor([7.0, 7e-4, 7.0, 7e-4]))


@torch.no_grad()
@pytest.mark.parametrize("name", ["mocov3_vit_s", "data2vec2_vit_b", "beit_vit_b", "simmim_vit_b", "franca_vit_b"])
def test_positions_are_resampled(name, tmp_path, monkeypatch):
    """Positions that are the same everywhere stay so at another image size, whatever their resampling."""
    sizes = shrink(monkeypatch, name)
    state = synthesise(name, sizes)
    for key, value in state.items():
        if key.endswith(("pos_embed", "positions")):
            value[:] = value[:, 1:2]
        if key.endswith("bias_table"):
            value[:-3] = value[:1]
    path = save(tmp_path / "official.pth", name, state)
    require_loadable(name, checkpoint=path, img_size=(48, 64))
    model = load_model(name, checkpoint=path, img_size=(48, 64))
    assert model.layout.grid == (6, 8)
    flat = torch.ones(1, 3, 48, 64) * torch.tensor([0.3, -0.2, 0.9]).view(1, 3, 1, 1)
    module: Any = model.module
    patches = module.forward_features(flat)[0, 1:]
    assert (patches - patches[:1]).abs().max() < 1e-4


def test_random_weights():
    model = load_model("ibot_vit_s", pretrained=False)
    assert isinstance(model.module, VisionTransformer)
    assert model.spec.name == "ibot_vit_s-random"
    assert model.spec.paradigm == model.spec.source == "random"
    assert (model.transform.mean, model.transform.crop_pct) == (NORMALISATIONS["imagenet"][0], 224 / 256)
