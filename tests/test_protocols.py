"""Protocols: named, hashed, and nothing that could be changed or could not be carried out."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace
from hashlib import sha256

import pytest

from helpers import message
from made_squares import BANK, KNN, LOGISTIC
from vitprobe.data.augment import Augmentation
from vitprobe.errors import UserError
from vitprobe.probing import PROTOCOLS, Protocol
from vitprobe.probing.protocols import find_protocol


def test_the_four_of_them() -> None:
    assert list(PROTOCOLS) == ["fast", "cached", "knn", "logistic"]
    assert all(protocol.name == name and protocol.words for name, protocol in PROTOCOLS.items())
    fast, cached, knn, logistic = PROTOCOLS.values()
    assert [protocol.method for protocol in PROTOCOLS.values()] == ["bank", "cached", "knn", "logistic"]
    assert [protocol.trains for protocol in PROTOCOLS.values()] == [True, True, False, False]
    assert fast.seeds >= 3 and cached.seeds >= 3 and len(fast.learning_rates) >= 5
    assert fast.augmentation is not None and cached.augmentation is None and "augment" in cached.words
    assert knn.norms == (False, True) and dict(knn.grid)["k"] == (5, 10, 15, 20, 50, 100, 200)
    assert all(protocol.heldout == 0.1 for protocol in PROTOCOLS.values()) and dict(logistic.grid)["c"]


def test_a_hash_is_that_of_every_field() -> None:
    digests = {protocol.digest for protocol in PROTOCOLS.values()}
    assert len(digests) == 4 and all(len(digest) == 12 and int(digest, 16) >= 0 for digest in digests)
    fast = PROTOCOLS["fast"]
    changes = [
        *({"seeds": 4}, {"epochs": 4}, {"learning_rates": (0.1,)}, {"heldout": 0.2}, {"augmentation": None}),
        *({"words": "other"}, {"augmentation": Augmentation(flip=False)}, {"init": "default"}, {"optimizer": "lars"}),
    ]
    assert len({replace(fast, **change).digest for change in changes} | {fast.digest}) == len(changes) + 1
    assert replace(fast).digest == fast.digest and str(fast) == f"fast ({fast.digest})"
    described = {name: value for name, value in fast.describe().items() if name != "hash"}
    assert fast.digest == sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:12]
    with pytest.raises(FrozenInstanceError):
        fast.seeds = 1  # type: ignore[misc]


def test_a_description_is_json_with_every_field() -> None:
    for protocol in PROTOCOLS.values():
        described = protocol.describe()
        assert json.loads(json.dumps(described)) == described
        assert described["hash"] == protocol.digest and set(described) == {"hash", *vars(replace(protocol))}


def test_small_sets_are_passed_over_more_often() -> None:
    protocol = replace(PROTOCOLS["fast"], batch_size=128, epochs=3, least_steps=200)
    assert protocol.epochs_for(1_281_167) == 3
    assert protocol.epochs_for(1078) == 25  # 8 steps a pass
    assert protocol.epochs_for(100) == 200  # fewer than a batch: one step a pass
    assert replace(protocol, least_steps=0).epochs_for(5) == 3


def test_finding_one() -> None:
    assert find_protocol("knn") is PROTOCOLS["knn"]
    own = Protocol(name="mine", words="", method="bank", learning_rates=(0.1,))
    assert find_protocol(own) is own
    with pytest.raises(UserError) as caught:
        find_protocol("linear")
    assert message(caught) == "there is no protocol 'linear'; choose from fast, cached, knn, logistic"


@pytest.mark.parametrize(
    ("protocol", "changes", "words"),
    [
        (BANK, {"batch_size": 1}, "protocol bank: a batch of 1 cannot be normalised, give 2 or more"),
        (KNN, {"batch_size": 0}, "protocol knn: a batch of 0 cannot be normalised"),
        (BANK, {"heldout": 0.0}, "protocol bank: heldout is a share between 0 and 1, not 0.0"),
        (BANK, {"heldout": 1.0}, "heldout is a share between 0 and 1, not 1.0"),
        (
            BANK,
            {"learning_rates": ()},
            "protocol bank trains probes, and needs learning rates, weight",
        ),
        (BANK, {"weight_decays": ()}, "needs learning rates, weight decays and seeds"),
        (BANK, {"seeds": 0}, "needs learning rates, weight decays and seeds"),
        (BANK, {"grid": (("k", (5,)),)}, "protocol bank: the method bank takes no grid"),
        (KNN, {"grid": ()}, "protocol knn: the method knn takes a grid of k and temperature"),
        (KNN, {"grid": (("k", ()), ("temperature", (0.1,)))}, "takes a grid of k and temperature"),
        (
            LOGISTIC,
            {"grid": (("c", (1.0,)),)},
            "the method logistic takes a grid of c and iterations",
        ),
    ],
)
def test_what_cannot_be_carried_out(protocol: Protocol, changes: dict, words: str) -> None:
    with pytest.raises(UserError) as caught:
        replace(protocol, **changes)
    assert words in message(caught)
