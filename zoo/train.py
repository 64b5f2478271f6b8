"""Train one recipe: `python -m zoo.train mae_vit_nano --data cifar10_train.tar --out runs/zoo`.

Writes `<out>/<recipe>/checkpoint.pt` after every epoch (atomically; the same command goes on from it) and
`log.csv` (epoch, loss, seconds). Uses a CUDA GPU where there is one, the CPU otherwise, bfloat16 autocast on both.
"""

from __future__ import annotations

import argparse
import csv
import random
import time
from pathlib import Path

import torch
from timm.optim import param_groups_layer_decay  # pyright: ignore[reportPrivateImportUsage]
from torch import nn

from vitprobe.probing.schedule import rate_factor
from vitprobe.runs.manifest import device_name
from zoo.cifar import load_tar
from zoo.objectives import build_objective
from zoo.objectives.base import Objective
from zoo.recipe import Recipe, load_recipe


def learning_rate(recipe: Recipe, epoch: float) -> float:
    """Linear warm-up, then half a cosine to zero, as of probes; `epoch` counts fractions."""
    return recipe.learning_rate * rate_factor(epoch, steps=recipe.epochs, warmup_steps=recipe.warmup_epochs)


def make_optimizer(objective: Objective, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; no weight decay on vectors (norms, biases) and tokens."""
    if recipe.layer_decay != 1:
        groups = param_groups_layer_decay(
            objective.vit, recipe.weight_decay, ("cls_token", "pos_embed"), layer_decay=recipe.layer_decay
        )
        return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)
    decayed, plain = [], []
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim < 2 or "token" in name or "pos_embed" in name else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)


def train(recipe: Recipe, data: Path, out: Path) -> Path:
    """Run (or resume) the recipe to its end; returns the last checkpoint's path."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(recipe.seed)
    objective = build_objective(recipe).to(device)
    if device.type == "cpu":  # where the backward pass of fused attention took 60 % of a step at this size
        for part in objective.modules():
            if hasattr(part, "fused_attn") and any(weight.requires_grad for weight in part.parameters()):
                part.fused_attn = False  # type: ignore[assignment]
    optimizer = make_optimizer(objective, recipe)
    folder = out / recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, start = folder / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        objective.load_state_dict(state["objective"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["epoch"]
    images, labels, _ = load_tar(data)
    images, labels = images.to(device), labels.to(device)
    batches = len(images) // recipe.batch_size

    for epoch in range(start, recipe.epochs):
        # Seeded anew each epoch, so that a resumed run draws what an unbroken one would.
        generator = torch.Generator().manual_seed(recipe.seed * 100_003 + epoch)
        torch.manual_seed(recipe.seed * 100_003 + epoch)
        random.seed(recipe.seed * 100_003 + epoch)  # lightly's block masks
        order = torch.randperm(len(images), generator=generator).to(device)
        total, began = torch.zeros((), dtype=torch.float64, device=device), time.perf_counter()
        for index in range(batches):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, epoch + index / batches) * group.get("lr_scale", 1.0)
            chosen = order[index * recipe.batch_size : (index + 1) * recipe.batch_size]
            views = objective.augment(images[chosen], generator)
            with torch.autocast(device.type, torch.bfloat16):
                loss = objective(views, labels[chosen], generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            objective.after_backward(epoch)
            nn.utils.clip_grad_norm_(objective.parameters(), recipe.gradient_clip)
            optimizer.step()
            objective.after_step(epoch * batches + index, recipe.epochs * batches)
            total += loss.detach()  # no `.item()`, which a GPU would wait for
        mean = total.item() / batches
        seconds = time.perf_counter() - began
        state = {
            "objective": objective.state_dict(),
            "optimizer": optimizer.state_dict(),
            "epoch": epoch + 1,
            "device": f"{device_name(device)}, bfloat16 autocast",
        }
        torch.save(state, partial := checkpoint.with_suffix(".partial"))
        partial.replace(checkpoint)
        with (folder / "log.csv").open("a", newline="") as file:
            csv.writer(file).writerow([epoch + 1, f"{mean:.5f}", f"{seconds:.1f}"])
        print(f"{recipe.name} epoch {epoch + 1}/{recipe.epochs} loss {mean:.4f} {seconds:.0f} s", flush=True)
    return checkpoint


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--data", type=Path, required=True, help="tar of <class>/<n>.jpg")
    parser.add_argument("--out", type=Path, default=Path("runs/zoo"))
    parser.add_argument("--seed", type=int, help="another than the recipe's; the run is then <recipe>_seed<seed>")
    args = parser.parse_args()
    train(load_recipe(args.recipe, args.seed), args.data, args.out)


if __name__ == "__main__":
    main()
