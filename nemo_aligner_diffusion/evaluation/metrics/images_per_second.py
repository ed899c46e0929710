"""Speed: generated pictures a second, over all processes."""

from nemo_aligner_diffusion.evaluation.metrics.base import Step, TrainingMetric


class ImagesPerSecond(TrainingMetric):
    name, title, direction, order = "images_per_second", "Pictures per second", "higher", 80
    needs = "images"
    colour = "third"
    from_zero = True
    main = False

    def measure(self, step: Step) -> float | None:
        images, seconds = step.reported.get("images"), step.reported.get("seconds", step.seconds)
        return images / seconds if images is not None and seconds > 0 else None
