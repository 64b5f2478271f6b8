"""`Bank`: many probes of one frozen model, trained in one pass over the images, each as if it were alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitprobe.aggregation import create
from vitprobe.aggregation.batch import TokenBatch
from vitprobe.errors import UserError
from vitprobe.layout import TokenLayout
from vitprobe.probing.inputs import Inputs
from vitprobe.probing.optimizers import OPTIMIZERS
from vitprobe.probing.probe import Init, Probe, ProbeSpec
from vitprobe.probing.schedule import rate_factor
from vitprobe.probing.tap import Tap


class Bank:
    """Probes that read the tokens of the same frozen model and share nothing else that is trained.

    A probe's weights are, bit for bit, those of a bank that holds it alone: each is drawn from its own seed, takes its
    own forward and backward pass with its own loss, and its own optimiser step. Probes of one seed read the same
    images in the same order; each seed may read images of its own. Only what cannot differ is shared: the vector that
    an aggregator without weights gives, and, within a seed, the normalisation of that vector.

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
        self._numbers_of_tokens = layout.num_tokens * dim
        self._schedule = {"steps": steps, "warmup_steps": warmup_steps}
        self._probes: dict[ProbeSpec, Probe] = {}
        self._members = _grouped(self.specs, lambda spec: f"{spec.name} {spec.seed}")
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
        self._weightless = {
            spec.name: (self._probes[spec].aggregator, spec.tap)
            for spec in self.specs
            if not self._probes[spec].aggregator.learned
        }
        self._learned_taps = {spec.tap for spec in self.specs if spec.name not in self._weightless}

    @property
    def live(self) -> list[ProbeSpec]:
        """The probes that have not been retired."""
        return [spec for spec in self.specs if spec not in self.retired]

    @property
    def seeds(self) -> list[int]:
        """The probes' seeds, each once."""
        return list(dict.fromkeys(spec.seed for spec in self.specs))

    @property
    def bytes_an_image(self) -> int:
        """What `read` keeps of one image."""
        probes = {spec.name: self._probes[spec] for spec in self.specs}
        vectors = sum(probes[name].aggregator.out_dim for name in self._weightless)
        numbers = vectors + len(self._learned_taps) * self._numbers_of_tokens
        return numbers * next(iter(probes.values())).head.weight.element_size()

    def read(self, batches: Mapping[Tap, TokenBatch]) -> Inputs:
        """Return what the probes read of these tokens.

        Args:
            batches: for each tap of the probes, the tokens there of the same images.
        """
        with torch.no_grad():
            vectors = {
                name: aggregator(batches[tap]).contiguous() for name, (aggregator, tap) in self._weightless.items()
            }
        return Inputs(vectors, {tap: batch for tap, batch in batches.items() if tap in self._learned_taps})

    def train_step(
        self, batches: Mapping[Tap, TokenBatch] | Mapping[int, Inputs], labels: Tensor | Mapping[int, Tensor]
    ) -> dict[ProbeSpec, float]:
        """One optimiser step of every live probe; a probe whose loss or weights are not finite is retired.

        Args:
            batches: for each tap of the probes, the tokens there of the same images; or for each seed, what `read`
                gave of its images.
            labels: the class of each image; for each seed where `batches` is.

        Returns:
            The mean cross-entropy of each live probe before the step.

        Raises:
            UserError: for fewer than two images, and where no probe is left.
        """
        if isinstance(labels, Tensor):
            shared = self.read(cast(Mapping[Tap, TokenBatch], batches))
            batches, labels = dict.fromkeys(self.seeds, shared), dict.fromkeys(self.seeds, labels)
        if min(len(labels[seed]) for seed in self.seeds) < 2:
            raise UserError("a batch of one image cannot be normalised: train on batches of two images or more")
        if self.step >= self._schedule["steps"]:
            raise RuntimeError(f"the training is over: all {self.step} steps are done")
        losses = self._backward(cast(Mapping[int, Inputs], batches), labels)
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

    def _backward(self, inputs: Mapping[int, Inputs], labels: Mapping[int, Tensor]) -> dict[ProbeSpec, Tensor]:
        """Adds each live probe's gradients; one learned probe's graph is freed before the next is built."""
        self._modules.train()
        usable = {each: each.outside_inference() for each in set(inputs.values())}
        losses: dict[ProbeSpec, Tensor] = {}
        for spec, scores in self._scores({seed: usable[each] for seed, each in inputs.items()}):
            loss = F.cross_entropy(scores, labels[spec.seed])
            loss.backward()
            losses[spec] = loss.detach()
        return {spec: losses[spec] for spec in self.specs if spec in losses}

    @torch.no_grad()
    def logits(self, batches: Mapping[Tap, TokenBatch] | Inputs) -> dict[ProbeSpec, Float[Tensor, "batch classes"]]:
        """The class scores that each live probe gives in eval mode.

        Args:
            batches: for each tap of the probes, the tokens there of the same images; or what `read` gave of them.
        """
        self._modules.eval()
        inputs = batches if isinstance(batches, Inputs) else self.read(batches)
        return dict(self._scores(dict.fromkeys(self.seeds, inputs)))

    def _scores(self, inputs: Mapping[int, Inputs]) -> Iterator[tuple[ProbeSpec, Tensor]]:
        """Each live probe's scores; a learned probe's are computed when they are asked for."""
        for members in self._live_members():
            probe, mine = self._probes[members[0]], inputs[members[0].seed]
            vector = None
            if not probe.aggregator.learned:
                with torch.no_grad():
                    vector = probe.norm(mine.vectors[members[0].name])
            for spec in members:
                probe = self._probes[spec]
                yield spec, probe(mine.tokens[spec.tap]) if vector is None else probe.head(vector)

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
        """Live probes, those of one name and seed together."""
        live = ([spec for spec in members if spec not in self.retired] for members in self._members)
        return [members for members in live if members]


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
