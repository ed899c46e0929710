"""The learning rate that a step was made with."""

from nemo_aligner_diffusion.evaluation.metrics.base import Step, TrainingMetric
from nemo_aligner_diffusion.evaluation.run_files import RunFiles


class LearningRate(TrainingMetric):
    name, title, order = "lr", "Learning rate", 60
    colour = "fourth"
    from_zero = True
    noisy = False

    def measure(self, step: Step) -> float:
        return step.learning_rate

    def describe(self, run: RunFiles) -> str:
        return f"Optimizer: {run.setting('model.optim.name', 'not recorded')}."
