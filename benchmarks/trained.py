"""What keeps short probes below the end of their training: crops, steps or correlation. Linear probes of [cls] and gap.

    python -m benchmarks.trained                                              # scikit-learn's digits
    python -m benchmarks.trained --data TRAIN.tar,TEST.tar --train 1800 --test 400 --views 1 --crops 3 \
        --steps 500 1500 6000 --decorrelated                                  # so many images a class

For each kind of crop the vectors of the training images are computed `--views` times, each time with other crops; then
classifiers are trained on them, for so many steps each, at the rates and the batch size of `fast`, and the rate is
selected on a tenth of the training images. With `--decorrelated` they are trained once more on the vectors times the
inverse root of their covariance (a hundredth of the mean variance added to its diagonal), which changes what a step of
the optimiser does and not what a linear classifier can tell. Printed is the accuracy on the test images, in percent, as
a mean over seeds, beside that of logistic regression on the vectors of the whole images.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor

from vitprobe.data.augment import Augmentation
from vitprobe.data.labelled import LabelledSet, open_labelled
from vitprobe.models.loading import load_model
from vitprobe.probing import PROTOCOLS, Bank, FrozenModel, ProbeSpec, Tap
from vitprobe.probing.feeds import ImageFeed
from vitprobe.probing.heldout import held_out
from vitprobe.probing.inputs import Inputs
from vitprobe.probing.logistic import fit_best
from vitprobe.probing.scores import correct
from vitprobe.probing.training import select

FAST = PROTOCOLS["fast"]
CROPS = {
    "area 0.08 to 1, sides 3:4 to 4:3": Augmentation(),
    "area 0.67 to 1, sides 3:4 to 4:3": Augmentation(scale=(0.67, 1.0)),
    "area 0.8 to 1, sides 0.9 to 1.1": Augmentation(scale=(0.8, 1.0), ratio=(0.9, 1 / 0.9)),
    "whole": Augmentation(scale=(1.0, 1.0), ratio=(1.0, 1.0)),
}


def some(split: LabelledSet, count: int | None, seed: int) -> list[int]:
    """So many positions of each class, drawn; all without a number."""
    rng = np.random.default_rng(seed)
    classes = (np.flatnonzero(split.labels == label) for label in np.unique(split.labels))
    return sorted(int(i) for members in classes for i in (rng.permutation(members)[:count] if count else members))


def vectors(bank: Bank, feed: ImageFeed, order: list[int], crops: tuple[int, int] | None = None) -> dict[str, Tensor]:
    """[cls] and gap of each image, one row each."""
    return dict(Inputs.joined([bank.read(fed.tokens) for fed in feed(order, crops)]).vectors)


def main() -> None:
    """Print a row for each kind of crop and number of steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mae_vit_nano")
    parser.add_argument("--data", default=None)
    parser.add_argument("--train", type=int, default=None, help="training images a class")
    parser.add_argument("--test", type=int, default=None, help="test images a class")
    parser.add_argument("--views", type=int, default=3)
    parser.add_argument("--crops", type=int, nargs="+", default=range(len(CROPS)), help="which kinds, from 0")
    parser.add_argument("--steps", type=int, nargs="+", default=(120, 300, 1000))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--decorrelated", action="store_true", help="the same once more, decorrelated")
    given = parser.parse_args()
    data, model = open_labelled(given.data), load_model(given.model)
    tap, classes = Tap(len(model.anatomy.blocks) - 1), len(data.classes)
    specs = [
        ProbeSpec(name, tap, FAST.optimizer, rate, 0.0, seed)
        for name in ("cls", "gap")
        for rate in FAST.learning_rates
        for seed in range(given.seeds)
    ]
    train, test = some(data.train, given.train, 0), some(data.test, given.test, 0)
    labels, own = torch.from_numpy(data.train.labels[train]), torch.from_numpy(data.test.labels[test])
    held = torch.from_numpy(held_out(data.train.labels[train], FAST.heldout, 0))
    with FrozenModel(model, [tap]) as frozen:

        def bank(steps: int) -> Bank:
            sizes = {"dim": frozen.dim, "layout": model.layout, "num_classes": classes}
            return Bank(specs, **sizes, steps=steps, warmup_steps=round(FAST.warmup * steps))

        plain = vectors(bank(1), ImageFeed(frozen, data.train, 128), train)
        tested = vectors(bank(1), ImageFeed(frozen, data.test, 128), test)
        anchors = []
        for name, whole in plain.items():
            best = fit_best(whole[~held], labels[~held], whole[held], labels[held], num_classes=classes)
            anchors.append(100 * float(correct(best.classifier.scores(tested[name]), own).double().mean()))
        print(f"{given.model}, {len(train)} training and {len(test)} test images")
        print("| crops | steps | `cls` | below its anchor | `gap` | below its anchor |\n|---|---|---|---|---|---|")
        print(f"| anchor | – | {anchors[0]:.2f} | – | {anchors[1]:.2f} | – |")
        for words in [list(CROPS)[number] for number in given.crops]:
            drawn = Augmentation(**{**vars(CROPS[words]), "flip": data.mirrors})
            feed = ImageFeed(frozen, data.train, 128, drawn)
            views = [vectors(bank(1), feed, train, (0, view)) for view in range(given.views)]
            sets = {words: (views, plain, tested)}
            if given.decorrelated:
                roots = {name: inverse_root(whole[~held]) for name, whole in plain.items()}
                changed = [{name: all_[name] @ roots[name] for name in roots} for all_ in (*views, plain, tested)]
                sets[f"{words}, decorrelated"] = (changed[:-2], changed[-2], changed[-1])
            for shown, (seen, chosen_on, tried_on) in sets.items():
                for steps in given.steps:
                    found = trained(bank(steps), seen, labels, held, chosen_on, tried_on, own, steps)
                    cells = [
                        f"{right:.2f} | {anchor - right:+.2f}" for right, anchor in zip(found, anchors, strict=True)
                    ]
                    print(f"| {shown} | {steps} | {' | '.join(cells)} |", flush=True)


def inverse_root(vectors: Tensor) -> Tensor:
    """`(D, D)` of vectors `(n, D)`: what takes them to a covariance near 1."""
    covariance = torch.cov(vectors.double().T)
    covariance.diagonal().add_(0.01 * covariance.diagonal().mean())
    values, axes = torch.linalg.eigh(covariance)
    return (axes * values.rsqrt() @ axes.T).float()


def trained(
    bank: Bank,
    views: list[dict[str, Tensor]],
    labels: Tensor,
    held: Tensor,
    plain: dict[str, Tensor],
    tested: dict[str, Tensor],
    own: Tensor,
    steps: int,
) -> list[float]:
    """The accuracy of [cls] and of gap after so many steps, the best rate's on the held-out images."""
    rest, generator = (~held).nonzero().flatten(), torch.Generator().manual_seed(0)
    a_pass = len(rest) // FAST.batch_size
    orders: dict[int, Tensor] = {}
    for step in range(steps):
        epoch, place = divmod(step, a_pass)
        if not place:
            orders = {seed: rest[torch.randperm(len(rest), generator=generator)] for seed in bank.seeds}
        inputs, classes = {}, {}
        for seed, order in orders.items():
            rows = order[place * FAST.batch_size : (place + 1) * FAST.batch_size]
            inputs[seed] = Inputs(views[(epoch + seed) % len(views)], {}).pick(rows)
            classes[seed] = labels[rows]
        bank.train_step(inputs, classes)
    scores = bank.logits(Inputs({name: whole[held] for name, whole in plain.items()}, {}))
    accuracy = {spec: float(correct(found, labels[held]).double().mean()) for spec, found in scores.items()}
    right = {
        spec: float(correct(found, own).double().mean()) for spec, found in bank.logits(Inputs(tested, {})).items()
    }
    return [
        100 * float(np.mean([right[spec] for spec in chosen])) for chosen, _ in select(bank.specs, accuracy).values()
    ]


if __name__ == "__main__":
    main()
