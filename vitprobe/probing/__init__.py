"""Probing: frozen tokens → light probes trained on them, under protocols that are named and hashed."""

from __future__ import annotations

from vitprobe.probing.bank import Bank
from vitprobe.probing.probe import Probe, ProbeSpec
from vitprobe.probing.protocols import PROTOCOLS, Protocol
from vitprobe.probing.tap import Tap
from vitprobe.probing.tokens import FrozenModel

__all__ = ["PROTOCOLS", "Bank", "FrozenModel", "Probe", "ProbeSpec", "Protocol", "Tap"]
