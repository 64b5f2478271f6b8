"""Turn a finished run into a bundled model: fp16 weights and a card.

    python -m zoo.ship mae_vit_nano --out runs/zoo

Writes `vitprobe/models/bundled/<recipe>.safetensors` and `<recipe>.json` (recipe, epochs, data, loss curve,
accuracies of `zoo.evaluate`, licence). Run `python -m zoo.references` afterwards.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from vitprobe.models.entries import NORMALISATIONS
from zoo.objectives import build_objective
from zoo.recipe import Recipe, load_recipe

BUNDLED = Path(__file__).parent.parent / "vitprobe" / "models" / "bundled"
TRAINING_IMAGES = 50_000
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def ship(recipe: Recipe, out: Path, bundled: Path = BUNDLED) -> None:
    """Write the weights and the card of a recipe that was trained under `out`."""
    name, folder = recipe.name, out / recipe.name
    state = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    if state["epoch"] != recipe.epochs:
        raise SystemExit(f"{folder} has run {state['epoch']} of {recipe.epochs} epochs; train it to its end first")
    objective = build_objective(recipe)
    objective.load_state_dict(state["objective"])
    weights = {key: value.half().contiguous() for key, value in objective.vit.state_dict().items()}
    with (folder / "log.csv").open() as file:
        log = [(int(epoch), float(loss), float(seconds)) for epoch, loss, seconds in csv.reader(file)]
    mean, std = NORMALISATIONS["cifar10"]
    card = {
        "name": name,
        "method": recipe.method,
        "recipe": dataclasses.asdict(recipe),
        "classes": CLASSES if recipe.method == "supervised" else None,
        "data": "CIFAR-10: the 50,000 training images (Krizhevsky, 2009)",
        "mean": mean,
        "std": std,
        "training": {
            "images_seen": recipe.epochs * (TRAINING_IMAGES // recipe.batch_size) * recipe.batch_size,
            "device": state["device"],
            "minutes": round(sum(seconds for *_, seconds in log) / 60, 1),
            "loss_by_epoch": [loss for _, loss, _ in log],
        },
        "test_accuracy": json.loads((folder / "accuracy.json").read_text()),
        "test_accuracy_note": "8,000 of CIFAR-10's test images; k-NN and linear probes fitted on 10,000 training "
        "images (python -m zoo.evaluate)",
        "tuning": "None: no number of the recipe was chosen by comparing runs, and the weights are those of the last "
        "epoch.",
        "licence": "Apache-2.0",
        "limits": "One seed, small images, few epochs: for trying vitprobe and for tests, not a measure of its method.",
    }
    bundled.mkdir(parents=True, exist_ok=True)
    save_file(weights, bundled / f"{name}.safetensors")
    (bundled / f"{name}.json").write_text(json.dumps(card, indent=2) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--out", type=Path, default=Path("runs/zoo"))
    parser.add_argument("--seed", type=int, help="of the run, where it is not the recipe's")
    args = parser.parse_args()
    ship(load_recipe(args.recipe, args.seed), args.out)


if __name__ == "__main__":
    main()
