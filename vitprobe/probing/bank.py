"""`Bank`: many probes of one frozen model, trained in one pass over the images, each as if it were alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitprobe.aggregation import create
from vitprobe.aggregation.batch import TokenBatch
from vitprobe.errors import UserError
from vitprobe.models.tokens import TokenLayout
from vitprobe.probing.optimizers import OPTIMIZERS
from vitprobe.probing.probe import Init, Probe, ProbeSpec
from vitprobe.probing.schedule import rate_factor
from vitprobe.probing.tap import Tap


class Bank:
    """Probes that read the same frozen tokens and share nothing else that is trained.

    A probe's weights are, bit for bit, those of a bank that holds it alone: each is drawn from its own seed, takes its
    own forward and backward pass with its own loss, and its own optimiser step. Only what cannot differ is shared: the
    vector that an aggregator without weights gives, and the normalisation of that vector.

    Args:
        specs: the probes, all different.
        dim: numbers a token.
        layout: which token is what.
        num_classes: classes.
        steps: optimiser steps of the whole training.
        warmup_steps: those in which learning rates rise.
        init: of the classifiers; see `Probe`.
        device: where the probes are kept and trained.
        dtype: of weights and tokens.

    Attributes:
        specs: the probes.
        step: optimiser steps done.
        retired: probes that diverged, with the reason; they are trained no more.
    """

    def __init__(
        self,
        specs: Iterable[ProbeSpec],
        *,
        dim: int,
        layout: TokenLayout,
        num_classes: int,
        steps: int,
        warmup_steps: int = 0,
        init: Init = "trunc_normal",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.specs = tuple(specs)
        if not self.specs or len(set(self.specs)) < len(self.specs):
            raise ValueError("a bank needs probes, and all different")
        if not 0 <= warmup_steps < steps:
            raise UserError(f"a warm-up of {warmup_steps} steps does not fit in {steps} steps of training")
        self.step = 0
        self.retired: dict[ProbeSpec, str] = {}
        self._schedule = {"steps": steps, "warmup_steps": warmup_steps}
        self._probes: dict[ProbeSpec, Probe] = {}
        self._members = _grouped(self.specs, lambda spec: spec.name)
        for members in self._members:
            shares: Probe | None = None
            for spec in members:
                probe = _initial(spec, shares, dim, layout, num_classes, init).to(device, dtype)
                self._probes[spec] = probe
                if not probe.aggregator.learned:
                    shares = probe
        self._modules = nn.ModuleList(self._probes[spec] for spec in self.specs)
        trained = _grouped(self.specs, lambda spec: f"{spec.name} {spec.optimizer}")
        self._optimizers = [
            OPTIMIZERS[members[0].optimizer](
                [self._probes[spec] for spec in members],
                [spec.learning_rate for spec in members],
                [spec.weight_decay for spec in members],
            )
            for members in trained
        ]
        self._trained = [spec for members in trained for spec in members]

    @property
    def live(self) -> list[ProbeSpec]:
        """The probes that have not been retired."""
        return [spec for spec in self.specs if spec not in self.retired]

    def train_step(self, batches: Mapping[Tap, TokenBatch], labels: Int[Tensor, " batch"]) -> dict[ProbeSpec, float]:
        """One optimiser step of every live probe; a probe whose loss or weights are not finite is retired.

        Args:
            batches: for each tap of the probes, the tokens there of the same images.
            labels: the class of each image.

        Returns:
            The mean cross-entropy of each live probe before the step.

        Raises:
            UserError: for fewer than two images, and where no probe is left.
        """
        if len(labels) < 2:
            raise UserError("a batch of one image cannot be normalised: train on batches of two images or more")
        if self.step >= self._schedule["steps"]:
            raise RuntimeError(f"the training is over: all {self.step} steps are done")
        losses = self._backward(batches, labels)
        for optimizer in self._optimizers:
            optimizer.step(rate_factor(self.step, **self._schedule), self.step + 1)
        self.step += 1
        finite = torch.cat([optimizer.finite() for optimizer in self._optimizers])
        values = torch.stack(list(losses.values())).tolist()
        for spec, sound in zip(self._trained, finite.tolist(), strict=True):
            if spec in losses and not sound:
                self.retired[spec] = f"weights not finite after step {self.step}"
        for spec, value in zip(losses, values, strict=True):
            if not math.isfinite(value):
                self.retired[spec] = f"loss not finite at step {self.step}"
        if not self.live:
            raise UserError(f"every probe diverged by step {self.step}: lower the learning rates")
        return dict(zip(losses, values, strict=True))

    def _backward(self, batches: Mapping[Tap, TokenBatch], labels: Tensor) -> dict[ProbeSpec, Tensor]:
        """Adds each live probe's gradients; one learned probe's graph is freed before the next is built."""
        self._modules.train()
        usable = {tap: _outside_inference(batch) for tap, batch in batches.items()}
        losses: dict[ProbeSpec, Tensor] = {}
        for members in self._live_members():
            vector = self._shared_vector(members, usable)
            for spec in members:
                probe = self._probes[spec]
                scores = probe(usable[spec.tap]) if vector is None else probe.head(vector)
                loss = F.cross_entropy(scores, labels)
                loss.backward()
                losses[spec] = loss.detach()
        return losses

    @torch.no_grad()
    def logits(self, batches: Mapping[Tap, TokenBatch]) -> dict[ProbeSpec, Float[Tensor, "batch classes"]]:
        """The class scores that each live probe gives in eval mode.

        Args:
            batches: for each tap of the probes, the tokens there of the same images.
        """
        self._modules.eval()
        scores: dict[ProbeSpec, Tensor] = {}
        for members in self._live_members():
            vector = self._shared_vector(members, batches)
            for spec in members:
                probe = self._probes[spec]
                scores[spec] = probe(batches[spec.tap]) if vector is None else probe.head(vector)
        return scores

    def probe(self, spec: ProbeSpec) -> Probe:
        """A copy of one probe as it is now, in eval mode; nothing of it is trained further."""
        return copy.deepcopy(self._probes[spec]).requires_grad_(False).eval()

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed training needs to go on bit for bit.

        Returns:
            `tensors` by name (weights, running statistics, the optimisers' state; copies), and words and numbers that
            JSON can hold: `step`, `retired`, `settings`.
        """
        return {
            "step": self.step,
            "retired": {str(self.specs.index(spec)): reason for spec, reason in self.retired.items()},
            "settings": self._settings(),
            "tensors": {name: tensor.detach().clone() for name, tensor in self._tensors().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave.

        Raises:
            UserError: where the state is that of other probes or another schedule.
        """
        own = self._tensors()
        shapes = {name: tensor.shape for name, tensor in state["tensors"].items()}
        if state["settings"] != self._settings() or shapes != {name: tensor.shape for name, tensor in own.items()}:
            raise UserError("the saved training is one of other probes or another schedule: resume with its settings")
        for name, tensor in own.items():
            tensor.detach().copy_(state["tensors"][name])
        self.step = state["step"]
        self.retired = {self.specs[int(index)]: reason for index, reason in state["retired"].items()}

    def _settings(self) -> dict[str, Any]:
        return {"specs": [asdict(spec) for spec in self.specs], **self._schedule}

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for number, optimizer in enumerate(self._optimizers):
            tensors |= {f"stack{number}.{name}": tensor for name, tensor in optimizer.state().items()}
        return tensors | {f"probe{name}": buffer for name, buffer in self._modules.named_buffers()}  # shared ones once

    def _live_members(self) -> list[list[ProbeSpec]]:
        """Live probes, those of one name together."""
        live = ([spec for spec in members if spec not in self.retired] for members in self._members)
        return [members for members in live if members]

    def _shared_vector(self, members: Sequence[ProbeSpec], batches: Mapping[Tap, TokenBatch]) -> Tensor | None:
        """What all classifiers of an aggregator without weights read; None for one with weights."""
        probe = self._probes[members[0]]
        if probe.aggregator.learned:
            return None
        with torch.no_grad():
            return probe.vector(batches[members[0].tap])


def _initial(
    spec: ProbeSpec, shares: Probe | None, dim: int, layout: TokenLayout, num_classes: int, init: Init
) -> Probe:
    """A probe with the weights that its seed draws; torch's own random numbers stay where they were.

    Args:
        shares: a probe of the same aggregator, which has no weights and is used together with its normalisation.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(spec.seed)
        if shares is not None:
            return Probe(shares.aggregator, num_classes, init=init, norm=shares.norm)
        return Probe(create(spec.aggregator, dim=dim, layout=layout), num_classes, init=init)


def _grouped(specs: Sequence[ProbeSpec], key: Callable[[ProbeSpec], str]) -> list[list[ProbeSpec]]:
    """Probes of equal key together, in the order in which keys first come."""
    groups: dict[str, list[ProbeSpec]] = {}
    for spec in specs:
        groups.setdefault(key(spec), []).append(spec)
    return list(groups.values())


def _outside_inference(batch: TokenBatch) -> TokenBatch:
    """Tokens from inference mode cannot take part in a backward pass; a copy can."""
    return replace(batch, tokens=batch.tokens.clone()) if batch.tokens.is_inference() else batch
