"""Logistic regression: what scikit-learn fits, C selected on the held-out slice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from vitprobe.errors import UserError
from vitprobe.probing.logistic import STRENGTHS, logistic


def made(images: int, seed: int, classes: int, dim: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=generator)
    centers = torch.randn(classes, dim, generator=torch.Generator().manual_seed(9))
    features = centers[labels] + torch.randn(images, dim, generator=generator)
    return 100 * features + 7, labels  # far from standard


@pytest.mark.parametrize("classes", [2, 4])
def test_the_fit_is_scikit_learns_on_standardised_features(classes):
    (train, labels), (test, own) = made(200, 0, classes), made(80, 1, classes)
    result = logistic(train, labels, test, own, torch.arange(200) < 40, num_classes=classes)
    scaler = StandardScaler().fit(train.double().numpy())
    model = LogisticRegression(C=result.c, tol=1e-7, max_iter=5000).fit(
        scaler.transform(train.double().numpy()), labels.numpy()
    )
    expected = model.predict_proba(scaler.transform(test.double().numpy()))
    scores = result.classifier.scores(test).softmax(dim=1)
    np.testing.assert_allclose(scores, expected, atol=1e-3)
    assert result.top1.tolist() == (expected.argmax(1) == own.numpy()).tolist()
    assert result.converged
    assert len(set(result.heldout_accuracy.values())) > 1
    assert result.top1.double().mean() > 0.6 and (result.top1 <= result.top5).all()


def test_the_held_out_images_select_c_and_the_test_images_do_not():
    (train, labels), (test, own) = made(150, 0, 3), made(80, 1, 3)
    heldout = torch.arange(150) % 3 == 0
    result = logistic(train, labels, test, own, heldout, num_classes=3)
    assert tuple(result.heldout_accuracy) == STRENGTHS
    assert result.heldout_accuracy[result.c] == max(result.heldout_accuracy.values())
    scaler = StandardScaler().fit(train[~heldout].double().numpy())
    for strength, accuracy in result.heldout_accuracy.items():
        model = LogisticRegression(C=strength, tol=1e-7, max_iter=5000)
        model.fit(scaler.transform(train[~heldout].double().numpy()), labels[~heldout].numpy())
        score = model.score(scaler.transform(train[heldout].double().numpy()), labels[heldout].numpy())
        assert accuracy == pytest.approx(score, abs=0.021)  # one image, where the fits end a little apart
    assert logistic(train, labels, test, (own + 1) % 3, heldout, num_classes=3).c == result.c


def test_a_class_without_training_images_is_never_the_answer():
    (train, labels), (test, own) = made(100, 0, 3), made(50, 1, 3)
    labels, own = labels.where(labels != 1, 0), torch.ones_like(own)
    result = logistic(train, labels, test, own, torch.arange(100) < 20, num_classes=3)
    assert not result.top1.any()


def test_a_number_that_never_changes_and_too_few_iterations():
    (train, labels), (test, own) = made(100, 0, 3), made(50, 1, 3)
    train[:, 2] = test[:, 2] = 5.0
    result = logistic(train, labels, test, own, torch.arange(100) < 20, num_classes=3, strengths=(1.0,), iterations=1)
    assert result.classifier.weight.isfinite().all() and result.classifier.bias.isfinite().all()
    assert not result.converged


def test_features_that_are_not_finite_are_one_line_that_names_the_images():
    (train, labels), (test, own) = made(100, 0, 3), made(50, 1, 3)
    test[7, 0] = float("nan")
    with pytest.raises(UserError) as error:
        logistic(train, labels, test, own, torch.arange(100) < 20, num_classes=3)
    assert str(error.value) == (
        "features of 1 of 50 test images are not finite (numbers 7): look at these images, or compute in float32"
    )
