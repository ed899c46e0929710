"""DDPO's own figures."""

from __future__ import annotations

from nemo_aligner_diffusion.evaluation.metrics.base import TrainingMetric


class RewardSpread(TrainingMetric):
    name, title, order = "reward_std", "Spread of the rewards", 21
    colour = "second"
    from_zero = True
    main = False
    caption = "Standard deviation over the step's pictures; near 0 there is nothing to learn from."


class ClipFraction(TrainingMetric):
    name, title, order = "clip_fraction", "Clipped", 44
    colour = "third"
    from_zero = True
    unit = "share of pictures and steps"
    caption = "Whose ratio left clip_range, 0 in a first pass; near 1 a further pass does next to nothing."


class ApproxKL(TrainingMetric):
    name, title, order = "approx_kl", "Distance from the weights that sampled", 46
    colour = "third"
    from_zero = True
    main = False
    caption = "Half the mean square of the log-ratio; 0 in a first pass."
