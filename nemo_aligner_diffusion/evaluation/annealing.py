"""Annealed importance guidance (design notes 3.4): how much the tuned model says at each sampling step."""

from __future__ import annotations

import math

from nemo_aligner_diffusion.errors import ConfigurationError


def annealed_weights(kind: str, steps: int) -> list[float]:
    """``w_0 … w_{T−1}`` for the prediction ``w_i·e^tuned + (1−w_i)·e^base``.

    Args:
        kind: ``base`` (0), ``draft`` (1), ``linear`` (``i/T``), ``power_p`` (``(i/T)^p``, p > 0), or a number.
        steps: ``T``, the number of network calls.

    Raises:
        ConfigurationError: any other ``kind``.

    Example::

        annealed_weights("power_2", 4)  # [0.0, 0.0625, 0.25, 0.5625]
    """
    name = kind.strip().lower()
    if name == "base":
        return [0.0] * steps
    if name == "draft":
        return [1.0] * steps
    if name == "linear":
        return [i / steps for i in range(steps)]
    power, constant = _number(name.removeprefix("power_")) if name.startswith("power_") else None, _number(name)
    if power is not None and power > 0:
        return [(i / steps) ** power for i in range(steps)]
    if constant is not None:
        return [constant] * steps
    raise ConfigurationError(
        f"the guidance weight {kind!r} is unknown; expected base, draft, linear, power_P (a positive P, as in power_2) "
        "or a number"
    )


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
