"""Reward fine-tuning of text-to-image diffusion models: DRaFT+, DRTune and their siblings, on PyTorch Lightning.

:func:`tune` and the methods are importable from here, and are looked for when first asked for; ``import
nemo_aligner_diffusion`` (and with it ``--help`` and every configuration error) costs no import of torch:

    from nemo_aligner_diffusion import DRTune, tune
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_aligner_diffusion.api import tune as tune

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "tune":
        return importlib.import_module(".api", __name__).tune
    if name[0].isupper():
        methods = importlib.import_module(".algorithms", __name__)
        if hasattr(methods, name):
            return getattr(methods, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    methods = dir(importlib.import_module(".algorithms", __name__))
    return sorted({*globals(), "tune", *(name for name in methods if name[0].isupper())})
