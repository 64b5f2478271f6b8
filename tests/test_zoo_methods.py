"""The objectives of the zoo that rest on lightly: what they see, what they are judged on, what follows what."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tiny_recipes import tiny
from vitprobe.models.entries import BUNDLED_ARCHITECTURES
from vitprobe.models.loading import BUNDLED_FOLDER
from zoo import recipes
from zoo.augment import color_jitter, two_views
from zoo.cifar import normalize
from zoo.objectives import OBJECTIVES, build_objective
from zoo.objectives.ijepa import Blocks
from zoo.recipe import load_recipe
from zoo.train import make_optimizer

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
RECIPES = sorted(path.stem for path in Path(recipes.__path__[0]).glob("*_vit_nano.py"))
LABELS = torch.zeros(4, dtype=torch.long)


def built(method: str, **changes):
    torch.manual_seed(0)
    return build_objective(tiny(method, **changes))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_a_vit_of_a_bundled_architecture(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.architecture in BUNDLED_ARCHITECTURES.values()
    assert recipe.warmup_epochs < recipe.epochs
    vit = build_objective(recipe).vit
    assert (vit.embed_dim, len(vit.blocks), vit.num_prefix_tokens) == (128, 12, int(name != "ijepa_vit_nano"))
    assert vit.num_classes == (10 if recipe.method == "supervised" else 0)


def test_every_method_has_a_recipe():
    assert {load_recipe(name).method for name in RECIPES} == set(OBJECTIVES)


def test_another_seed_is_another_run():
    recipe = load_recipe("mae_vit_nano", 3)
    assert (recipe.name, recipe.seed) == ("mae_vit_nano_seed3", 3)
    assert dataclasses.replace(recipe, name="mae_vit_nano", seed=0) == load_recipe("mae_vit_nano")
    assert load_recipe("mae_vit_nano", 0) == load_recipe("mae_vit_nano")


def test_fine_tuning_begins_with_the_shipped_weights_and_moves_late_blocks_most():
    recipe = load_recipe("mae_ft_vit_nano")
    objective = build_objective(recipe)
    shipped = load_file(BUNDLED_FOLDER / f"{recipe.start}.safetensors")
    begun = objective.vit.state_dict()
    assert set(begun) - set(shipped) == {"head.weight", "head.bias"}
    assert all(torch.equal(begun[name], shipped[name].float()) for name in shipped)
    groups = make_optimizer(objective, recipe).param_groups
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(scale) == len(list(objective.parameters()))
    weights = [block.attn.qkv.weight for block in objective.vit.blocks]
    assert [scale[id(weight)] for weight in weights] == pytest.approx([0.75 ** (12 - i) for i in range(12)])
    assert scale[id(objective.vit.head.weight)] == 1
    assert scale[id(objective.vit.patch_embed.proj.weight)] == pytest.approx(0.75**13)
    assert {decay[id(weight)] for weight in weights} == {recipe.weight_decay}
    assert decay[id(objective.vit.cls_token)] == decay[id(objective.vit.pos_embed)] == 0


def test_two_views_are_seeded_differ_and_come_view_by_view():
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    views = two_views(images, (0.5, 1.0), seeded())
    assert views.shape == (10, 3, 32, 32)
    assert torch.equal(views, two_views(images, (0.5, 1.0), seeded()))
    assert not torch.isclose(views[:5], views[5:]).all(dim=(1, 2, 3)).any()
    low, high = normalize(torch.zeros(1, 3, 1, 1)), normalize(torch.full((1, 3, 1, 1), 255.0))
    assert ((views > low - 1e-5) & (views < high + 1e-5)).all()
    one_colour = torch.stack([torch.full((3, 32, 32), 10 * i, dtype=torch.uint8) for i in range(1, 6)])
    apart = two_views(one_colour, (0.5, 1.0), seeded()).mean(dim=(1, 2, 3))
    assert (apart[:5].diff() > 0).all(), "the first views keep the order of the images (no solarising, ±40 % bright)"


def test_colours_change_as_drawn():
    images = torch.rand(400, 3, 4, 4, generator=seeded())
    changed = color_jitter(images, seeded())
    assert ((changed >= 0) & (changed <= 1)).all()
    grey = (changed.amax(1) - changed.amin(1)).amax(dim=(1, 2)) < 1e-6
    assert 0.14 < grey.float().mean() < 0.26
    same = torch.isclose(changed, images).all(dim=3).all(dim=2).all(dim=1)
    assert 0.10 < same.float().mean() < 0.22, "a fifth is not jittered; of it a fifth is grey"
    of_grey = color_jitter(images[:, :1].expand(-1, 3, -1, -1), seeded())
    torch.testing.assert_close(of_grey[:, 0], of_grey[:, 2], atol=1e-4, rtol=0)  # a hue leaves grey alone


def test_mocov3_finds_the_other_view():
    objective = built("mocov3", temperature=0.5)
    views = objective.augment(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), seeded())
    loss = objective(views, LABELS, seeded())
    expected = 0.0
    for first, second in ((views[:4], views[4:]), (views[4:], views[:4])):
        query = F.normalize(objective.predictor(objective.projector(objective.vit(first))), dim=1)
        key = F.normalize(objective.momentum_projector(objective.momentum_vit(second)), dim=1)
        likeness = (query @ key.T / 0.5).log_softmax(1)
        expected -= 2 * 0.5 * likeness.diagonal().mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    still = {name for name, p in objective.named_parameters() if p.grad is None}
    frozen = {"vit.pos_embed", "vit.patch_embed.proj.weight", "vit.patch_embed.proj.bias"}
    assert still == frozen | {name for name, _ in objective.named_parameters() if name.startswith("momentum_")}
    assert not objective.vit.pos_embed[0, 0].any()


def test_mocov3_begins_as_its_paper_does():
    vit = built("mocov3").vit
    bound = (6 / (24 + 24)) ** 0.5  # of query, key and value, each a matrix of its own
    weight = vit.blocks[0].attn.qkv.weight
    assert 0.95 * bound < weight.abs().max() <= bound
    patch = vit.patch_embed.proj
    assert 0.95 < patch.weight.abs().max() / (6 / (3 * 64 + 24)) ** 0.5 <= 1
    assert not patch.bias.any()


@pytest.mark.parametrize("method", ["mocov3", "dino", "ibot", "ijepa"])
def test_what_follows_moves_by_one_minus_the_momentum(method):
    objective = built(method, momentum=0.75)
    pairs = objective._followed
    assert len(pairs) == (1 if method == "ijepa" else 2)
    for leader, follower in pairs:
        assert not any(p.requires_grad for p in follower.parameters())
        for one, other in zip(leader.parameters(), follower.parameters(), strict=True):
            torch.testing.assert_close(one, other)
            one.data += 4.0
    before = [[p.clone() for p in follower.parameters()] for _, follower in pairs]
    objective.after_step(99, 100)  # the last: momentum 1
    objective.after_step(0, 100)
    for (_, follower), old in zip(pairs, before, strict=True):
        for now, then in zip(follower.parameters(), old, strict=True):
            torch.testing.assert_close(now, then + 1.0)


def test_dino_keeps_its_prototypes_for_an_epoch_and_its_teacher_without_gradient():
    objective = built("dino")
    views = objective.augment(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), seeded())
    loss = objective(views, LABELS, seeded())
    swapped = built("dino")(views.roll(4, 0), LABELS, seeded())
    torch.testing.assert_close(loss, swapped)
    loss.backward()
    assert objective.vit.blocks[0].attn.qkv.weight.grad.any()
    assert all(p.grad is None for p in (*objective.teacher.parameters(), *objective.teacher_head.parameters()))
    last = objective.head.last_layer.weight_v
    assert last.grad.any()
    objective.after_backward(1)
    assert last.grad is not None
    objective.after_backward(0)
    assert last.grad is None


def test_ibot_hides_half_of_the_views_from_the_student_only(monkeypatch):
    objective = built("ibot")
    hidden = torch.zeros(8, 8, 8, dtype=torch.bool)
    hidden[::2, :3, :3] = True
    monkeypatch.setattr("zoo.objectives.ibot.random_block_mask", lambda size, device: hidden)
    seen = {}
    for name in ("vit", "teacher"):
        block = getattr(objective, name).blocks[0]
        block.register_forward_pre_hook(lambda module, args, name=name: seen.update({name: args[0].detach()}))
    objective.masked.mask_token.data.fill_(7.0)
    views = torch.randn(8, 3, 32, 32)
    objective(views, LABELS, seeded()).backward()
    token = 7.0 + objective.vit.pos_embed[:, 1:].expand(8, -1, -1)
    masked = hidden.flatten(1)
    torch.testing.assert_close(seen["vit"][:, 1:][masked], token[masked])
    torch.testing.assert_close(seen["vit"][:, 1:][~masked], seen["teacher"][:, 1:][~masked])
    assert not torch.isclose(seen["teacher"][:, 1:][masked], token[masked]).any(dim=-1).all()
    assert objective.patch_loss.center.value.any(), "the patches' loss has seen the teacher"
    assert objective.masked.mask_token.grad.any()


def test_simmim_is_judged_on_hidden_squares_only():
    objective = built("simmim", mask_ratio=0.5, mask_square=2)
    torch.nn.init.zeros_(objective.decoder.weight)
    torch.nn.init.zeros_(objective.decoder.bias)  # the loss is then the pixels' own size
    views, hidden = torch.randn(4, 3, 32, 32), []
    encode = objective.masked.encode
    objective.masked.encode = lambda images, idx_mask: hidden.append(idx_mask) or encode(images, idx_mask=idx_mask)
    torch.manual_seed(1)
    loss = objective(views, LABELS, seeded())
    assert hidden[0].shape == (4, 8)  # half of 16 patches
    patches = views.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(2)
    chosen = patches.gather(1, (hidden[0] - 1)[..., None].expand(-1, -1, patches.shape[-1]))
    torch.testing.assert_close(loss, chosen.abs().mean())
    for row in hidden[0] - 1:
        squares = {(patch // 8, patch % 4 // 2) for patch in row.tolist()}
        assert len(squares) == 2, "two whole squares of four patches"


def test_ijepa_predicts_what_the_context_does_not_hold(monkeypatch):
    objective = built("ijepa")
    assert objective.vit.cls_token is None
    seen = []
    objective.vit.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    masks = []
    call = Blocks.__call__
    monkeypatch.setattr(Blocks, "__call__", lambda self, batch: masks.append(call(self, batch)) or masks[-1])
    losses = []
    for _ in range(2):
        torch.manual_seed(2)
        losses.append(objective(torch.randn(4, 3, 32, 32), LABELS, seeded()))
    loss, again = losses
    torch.testing.assert_close(loss, again)  # whatever was drawn before
    _, contexts, targets = masks[0]
    assert len(contexts) == 1
    assert len(targets) == 4
    assert seen[0] == contexts[0].shape[1] < 64
    for image in range(4):
        shown = set(contexts[0][image].tolist())
        assert not any(shown & set(target[image].tolist()) for target in targets)
    loss.backward()
    assert objective.predictor.predictor_embed.weight.grad.any()
    assert all(p.grad is None for p in objective.target.parameters())
