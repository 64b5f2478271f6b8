"""What a trained ViT's tokens are worth: k-NN and linear accuracy of [cls] and of the average patch, and its own head.

    python -m zoo.evaluate mae_vit_nano --train cifar10_train.tar --test cifar10_test.tar --out runs/zoo

The linear probe is scikit-learn's multinomial logistic regression on standardised features of the training images;
its regularisation is fixed (C = 0.01), nothing is chosen on the test images. k-NN: k = 20, cosine, majority vote.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from zoo.cifar import load_tar
from zoo.cifar import normalize as normalize_pixels
from zoo.objectives import build_objective
from zoo.recipe import load_recipe

BATCH = 500
KNN = 20
TRAIN_IMAGES = 10_000  # the first of a seeded permutation: enough to compare features, minutes instead of an hour


@torch.inference_mode()
def features(vit: VisionTransformer, images: Tensor) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """{"cls": … where there is one, "average": …} of the normed tokens of the last block, and the head's outputs."""
    prefix = vit.num_prefix_tokens
    pooled: dict[str, list[Tensor]] = {"cls": [], "average": []} if prefix else {"average": []}
    outputs = []
    for batch in images.split(BATCH):
        tokens = vit.forward_features(normalize_pixels(batch))
        if prefix:
            pooled["cls"].append(tokens[:, 0])
        pooled["average"].append(tokens[:, prefix:].mean(dim=1))
        outputs.append(vit.forward_head(tokens))
    return {name: torch.cat(parts).numpy() for name, parts in pooled.items()}, torch.cat(outputs).numpy()


def evaluate(vit: VisionTransformer, train: Path, test: Path) -> dict[str, float]:
    """Accuracies on the test images, 0 to 1."""
    vit.eval()
    (train_images, train_labels, _), (test_images, test_labels, _) = load_tar(train), load_tar(test)
    chosen = torch.randperm(len(train_images), generator=torch.Generator().manual_seed(0))[:TRAIN_IMAGES]
    known, _ = features(vit, train_images[chosen])
    unknown, outputs = features(vit, test_images)
    labels, truth = train_labels[chosen].numpy(), test_labels.numpy()
    accuracy = {}
    for name in known:
        knn = KNeighborsClassifier(n_neighbors=KNN).fit(normalize(known[name]), labels)
        accuracy[f"knn20_{name}"] = knn.score(normalize(unknown[name]), truth)
        linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000)).fit(known[name], labels)
        accuracy[f"linear_{name}"] = linear.score(unknown[name], truth)
    if vit.num_classes:
        accuracy["own_head"] = float((outputs.argmax(1) == truth).mean())
    return {name: round(float(value), 4) for name, value in accuracy.items()}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/zoo"))
    parser.add_argument("--random", action="store_true", help="evaluate random weights instead: the baseline")
    parser.add_argument("--seed", type=int, help="of the run, where it is not the recipe's")
    args = parser.parse_args()
    recipe = load_recipe(args.recipe, args.seed)
    torch.manual_seed(recipe.seed)
    objective = build_objective(recipe)
    if not args.random:
        state = torch.load(args.out / recipe.name / "checkpoint.pt", map_location="cpu", weights_only=True)
        objective.load_state_dict(state["objective"])
    accuracy = evaluate(objective.vit, args.train, args.test)
    print(json.dumps(accuracy, indent=2))
    folder = args.out / recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"accuracy{'_random' if args.random else ''}.json").write_text(json.dumps(accuracy, indent=2) + "\n")


if __name__ == "__main__":
    main()
