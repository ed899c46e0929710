"""What a step minimises: minus the reward at its scale, plus the weighted KL."""

from nemo_aligner_diffusion.evaluation.metrics.base import TrainingMetric


class Loss(TrainingMetric):
    name, title, direction, order = "loss", "Loss", "lower", 45
    main = False
