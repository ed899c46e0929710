"""Speed: generated pictures a second, over all processes."""

from typing import ClassVar

from nemo_aligner_diffusion.evaluation.metrics.base import Step, TrainingMetric


class ImagesPerSecond(TrainingMetric):
    name, title, direction, order = "images_per_second", "Pictures per second", "higher", 80
    needs: ClassVar[str] = "images"
    colour = "third"
    from_zero = True
    main = False

    def measure(self, step: Step) -> float | None:
        count, seconds = step.reported.get(self.needs), step.reported.get("seconds", step.seconds)
        return count / seconds if count is not None and seconds > 0 else None
