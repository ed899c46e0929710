"""What is supervised: one short file per method, found by :mod:`.registry`; importing this costs no torch."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """``DRTune`` and its siblings, by the names of their classes."""
    if name[0].isupper():
        from nemo_aligner_diffusion.algorithms.registry import methods

        for method in methods().values():
            if method.__name__ == name:
                return method
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    from nemo_aligner_diffusion.algorithms.registry import methods

    return sorted({*globals(), *(method.__name__ for method in methods().values())})
