"""Reward fine-tuning of text-to-image diffusion models: DRaFT+, DRTune and their siblings, on PyTorch Lightning.

The Lightning modules are importable from here, and are loaded when first asked for, so that ``import
nemo_aligner_diffusion`` (and with it ``--help`` and every configuration error) costs no import of torch:

    from nemo_aligner_diffusion import DRaFTPlus
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .algorithms import AlignProp, DRaFT, DRaFTLV, DRaFTPlus, DRTune, ReFL

__version__ = "0.1.0"

__all__ = ["AlignProp", "DRTune", "DRaFT", "DRaFTLV", "DRaFTPlus", "ReFL", "__version__"]

_LIGHTNING_MODULES = frozenset(__all__) - {"__version__"}


def __getattr__(name: str) -> Any:
    if name in _LIGHTNING_MODULES:
        return getattr(importlib.import_module(".algorithms", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LIGHTNING_MODULES})
