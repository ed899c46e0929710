"""Supervised fine-tuning on the preferred pictures: the baseline."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_aligner_diffusion.algorithms.preference.base import Levels, PreferenceMethod


@dataclass(frozen=True)
class SFT(PreferenceMethod):
    """The preferred picture's denoising error is minimised, ``d_θ(z^w, t)``; no base model, no loser.

    Of a pair with soft labels the error counts as much as the preferred picture's share.
    """

    name = "sft"
    title = "SFT"
    source = "supervised fine-tuning"
    ignored = (*PreferenceMethod.ignored, "model.preference.label_smoothing")
    compares = False

    def weights(self, levels: Levels) -> list[float]:
        return [1.0] * levels.size
