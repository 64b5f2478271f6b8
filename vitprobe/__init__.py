"""vitprobe: exact attention diagnostics for Vision Transformers.

The public names are loaded when first used, so that `import vitprobe` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name → the module that holds it; None where the name is itself a module.
_HOME = {
    "Profile": "vitprobe.profile.profile",
    "TokenLayout": "vitprobe.layout",
    "UserError": "vitprobe.errors",
    "Verification": "vitprobe.probing.verification",
    "aggregation": None,
    "analyze": "vitprobe.profile.analysis",
    "capture": "vitprobe.hooks.capture",
    "figures": None,
    "hand_over": "vitprobe.hooks.handover",
    "list_models": "vitprobe.models.registry",
    "load_model": "vitprobe.models.loading",
    "load_probe": "vitprobe.probing.saved",
    "models": None,
    "open_images": "vitprobe.data.sources",
    "probing": None,
    "statistics": None,
    "verify": "vitprobe.probing.verify",
}

__all__ = [
    "Profile",
    "TokenLayout",
    "UserError",
    "Verification",
    "__version__",
    "aggregation",
    "analyze",
    "capture",
    "figures",
    "hand_over",
    "list_models",
    "load_model",
    "load_probe",
    "models",
    "open_images",
    "probing",
    "statistics",
    "verify",
]

if TYPE_CHECKING:
    from vitprobe import aggregation, figures, models, probing, statistics
    from vitprobe.data.sources import open_images
    from vitprobe.errors import UserError
    from vitprobe.hooks.capture import capture
    from vitprobe.hooks.handover import hand_over
    from vitprobe.layout import TokenLayout
    from vitprobe.models.loading import load_model
    from vitprobe.models.registry import list_models
    from vitprobe.probing.saved import load_probe
    from vitprobe.probing.verification import Verification
    from vitprobe.probing.verify import verify
    from vitprobe.profile.analysis import analyze
    from vitprobe.profile.profile import Profile


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vitprobe' has no attribute {name!r}")
    home = _HOME[name]
    value = import_module(f"vitprobe.{name}") if home is None else getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
