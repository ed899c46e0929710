"""Reward fine-tuning of text-to-image diffusion models: DRaFT+, DRTune and their siblings, on PyTorch Lightning.

The methods are importable from here, and are looked for when first asked for; ``import nemo_aligner_diffusion`` (and
with it ``--help`` and every configuration error) costs no import of torch:

    from nemo_aligner_diffusion import DRTune
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name[0].isupper():
        methods = importlib.import_module(".algorithms", __name__)
        if hasattr(methods, name):
            return getattr(methods, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    methods = dir(importlib.import_module(".algorithms", __name__))
    return sorted({*globals(), *(name for name in methods if name[0].isupper())})
