"""Multinomial logistic regression on pooled features, by L-BFGS (scikit-learn's)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitprobe.probing.features import check_features
from vitprobe.probing.scores import TOP, correct

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

STRENGTHS = tuple(float(strength) for strength in np.logspace(-4, 1, 6))  # of C
ITERATIONS = 1000

# Of the mean loss's gradient. At scikit-learn's own 1e-4 a fit that starts from the last C's ends there at once.
_TOLERANCE = 1e-5


@dataclass(frozen=True, eq=False)
class Classifier:
    """A linear classifier of raw features.

    Attributes:
        weight: `(classes, D)`.
        bias: `(classes,)`; minus infinity for a class that was never seen.
        converged: whether the fit ended before its last iteration.
    """

    weight: Float[Tensor, "classes dim"]
    bias: Float[Tensor, " classes"]
    converged: bool

    def scores(self, features: Float[Tensor, "image dim"]) -> Float[Tensor, "image classes"]:
        """Return the score of each class, `(n, classes)`, in float64, before a softmax."""
        return features.double() @ self.weight.T + self.bias


@dataclass(frozen=True, eq=False)
class Best:
    """The fit whose C was best on held-out images.

    Attributes:
        c: that C: weight of the loss against the penalty ‖W‖² / 2, as scikit-learn's.
        heldout_accuracy: accuracy on the held-out images, 0..1, of every C.
        classifier: the fit.
    """

    c: float
    heldout_accuracy: dict[float, float]
    classifier: Classifier

    @property
    def converged(self) -> bool:
        """Whether the fit ended before its last iteration."""
        return self.classifier.converged


@dataclass(frozen=True, eq=False)
class LogisticResult(Best):
    """Logistic regression on the test images, fitted on all training images with the best C.

    Attributes:
        top1: whether each test image is right.
        top5: whether its class is among the best five.
    """

    top1: Bool[Tensor, " test"]
    top5: Bool[Tensor, " test"]


def logistic(
    train: Float[Tensor, "train dim"],
    train_labels: Int[Tensor, " train"],
    test: Float[Tensor, "test dim"],
    test_labels: Int[Tensor, " test"],
    heldout: Bool[Tensor, " train"],
    *,
    num_classes: int,
    strengths: Sequence[float] = STRENGTHS,
    iterations: int = ITERATIONS,
) -> LogisticResult:
    """Fit on the training images, classify the test images.

    Features are standardised by the mean and standard deviation of the images that are fitted on. C is the one with
    the best accuracy on the held-out training images, fitted on the others; of equal ones the smallest. With it all
    training images are fitted. The test images decide nothing.

    Args:
        train: features of all training images.
        train_labels: their classes, from 0; every class has some.
        test: features of the test images.
        test_labels: their classes.
        heldout: which training images select C.
        num_classes: classes.
        strengths: values of C to choose from.
        iterations: of L-BFGS, at most.

    Raises:
        UserError: for features that are not finite.
    """
    check_features(train, "training")
    check_features(test, "test")
    best = fit_best(
        train[~heldout],
        train_labels[~heldout],
        train[heldout],
        train_labels[heldout],
        num_classes=num_classes,
        strengths=strengths,
        iterations=iterations,
    )
    classifier = _Path(train, train_labels, num_classes, iterations).fit(best.c)
    top1, top5 = (correct(classifier.scores(test), test_labels, top) for top in (1, TOP))
    return LogisticResult(best.c, best.heldout_accuracy, classifier, top1, top5)


def fit_best(
    train: Float[Tensor, "train dim"],
    train_labels: Int[Tensor, " train"],
    heldout: Float[Tensor, "heldout dim"],
    heldout_labels: Int[Tensor, " heldout"],
    *,
    num_classes: int,
    strengths: Sequence[float] = STRENGTHS,
    iterations: int = ITERATIONS,
) -> Best:
    """Fit with every C, and return the fit that has most held-out images right; of equal ones the smallest C.

    Args:
        train: features of the images to fit on.
        train_labels: their classes, from 0.
        heldout: features of the images to select on.
        heldout_labels: their classes.
        num_classes: classes.
        strengths: values of C to choose from.
        iterations: of L-BFGS, at most.
    """
    accuracy, fits = {}, {}
    path = _Path(train, train_labels, num_classes, iterations)
    for strength in sorted(strengths):  # from the strongest penalty: each fit starts where the last one ended
        fits[strength] = path.fit(strength)
        accuracy[strength] = float(correct(fits[strength].scores(heldout), heldout_labels).double().mean())
    best = max(accuracy, key=lambda strength: accuracy[strength])
    return Best(best, accuracy, fits[best])


class _Path:
    """Fits on the same images with one C after the other."""

    def __init__(self, features: Tensor, labels: Tensor, num_classes: int, iterations: int) -> None:
        from sklearn.linear_model import LogisticRegression  # takes a second to import

        features = features.double()
        self.center = features.mean(dim=0)
        spread = features.std(dim=0, correction=0)
        self.spread = torch.where(spread > 0, spread, 1.0)  # of a number that never changes
        self.standard = ((features - self.center) / self.spread).cpu().numpy()
        self.labels, self.num_classes = labels.cpu().numpy(), num_classes
        self.model: LogisticRegression = LogisticRegression(max_iter=iterations, tol=_TOLERANCE, warm_start=True)

    def fit(self, strength: float) -> Classifier:
        """Return the fit with this C."""
        from sklearn.exceptions import ConvergenceWarning

        self.model.set_params(C=strength)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # said in the result instead
            self.model.fit(self.standard, self.labels)
        weight = self.center.new_zeros(self.num_classes, len(self.center))
        bias = self.center.new_full((self.num_classes,), -torch.inf)  # of a class that was never seen
        found = torch.from_numpy(self.model.coef_).to(weight), torch.from_numpy(self.model.intercept_).to(weight)
        if len(found[0]) == 1:  # of two classes scikit-learn gives the second's against the first
            found = tuple(torch.cat([-part / 2, part / 2]) for part in found)
        seen = torch.from_numpy(self.model.classes_).to(weight.device)
        weight[seen] = found[0] / self.spread
        bias[seen] = found[1] - weight[seen] @ self.center
        return Classifier(weight, bias, bool((self.model.n_iter_ < self.model.max_iter).all()))
