"""The log-probability of a class, by any image-classification network of transformers.

DRaFT (Clark et al. 2024, arXiv 2309.17400) tunes a model so that its pictures are taken for a class that the prompt
does not name, which makes adversarial examples of the classifier; with the class that the prompt names, it makes
pictures more typical. Averaging over views of the picture asks for the class in the whole and in its parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from nemo_aligner_diffusion.errors import RewardError
from nemo_aligner_diffusion.keys import closest
from nemo_aligner_diffusion.rewards.settings import HuggingFaceSettings
from nemo_aligner_diffusion.settings import Kind, setting

if TYPE_CHECKING:
    from torch import Tensor

_CROP_SIDE = 7 / 8
# Where the crops lie, as shares of the room there is: the centre and the corners.
_CROP_PLACES = ((0.5, 0.5), (0.0, 0.0), (0.0, 1.0), (1.0, 0.0))


@dataclass(frozen=True, kw_only=True)
class Classifier(HuggingFaceSettings):
    """``log p(class | picture)``, averaged over views; at most 0.

    Of a classifier with one class per picture it is the log-softmax of its logits, of one with several the log-sigmoid.
    The class is found in upper and lower case alike, and by one of the names that ImageNet writes with commas, such as
    ``goldfish`` of ``goldfish, Carassius auratus``. The views are the same for every picture and call: the picture, its
    mirror image, then the centre and three corner crops of 7/8 of its sides, each also mirrored (random ones:
    :mod:`.augmentation`). In a micro-batch a picture comes with all its views.
    """

    name = "classifier"
    auto_class = "AutoModelForImageClassification"
    what = "an image classifier"
    needs: ClassVar = {"from_pretrained": "google/vit-base-patch16-224", "target_class": "goldfish"}

    target_class: str | None = setting(
        None, Kind("text", nullable=True), "index, or a name of the classifier's id2label; needed"
    )
    views: int = setting(
        1,
        Kind("int", low=1, high=10),
        "1: the picture; up to 10: its mirror image, centre and corner crops too, averaged",
    )

    def describe(self) -> str:
        return f"the class {self.target_class} of a classifier"

    def setup(self, network: Any) -> None:
        network.target = class_index(network.model.config, self.target_class or "")

    def score(self, network: Any, images: Tensor, *rows: Tensor) -> Tensor:
        import torch
        from torch.nn import functional

        from nemo_aligner_diffusion.rewards.base import wide

        pixels = torch.cat([network.pixels(view) for view in fixed_views(images, self.views)])
        logits = wide(network.model(pixel_values=pixels).logits)
        if getattr(network.model.config, "problem_type", None) == "multi_label_classification":
            scores = functional.logsigmoid(logits)
        else:
            scores = functional.log_softmax(logits, dim=-1)
        return scores[:, network.target].view(self.views, -1).mean(dim=0)


def fixed_views(images: Tensor, count: int) -> list[Tensor]:
    """The first ``count`` views, see :class:`Classifier`; crops keep the picture's aspect ratio."""
    height, width = images.shape[-2:]
    rows, columns = max(round(height * _CROP_SIDE), 1), max(round(width * _CROP_SIDE), 1)
    views = [images, images.flip(-1)]
    for down, right in _CROP_PLACES:
        top, left = round(down * (height - rows)), round(right * (width - columns))
        crop = images[..., top : top + rows, left : left + columns]
        views += [crop, crop.flip(-1)]
    return views[:count]


def class_index(config: Any, target: str) -> int:
    """The index of a class given by index or name.

    Raises:
        RewardError: there is none; the nearest names are listed.
    """
    labels = {int(index): str(label) for index, label in config.id2label.items()}
    by_name: dict[str, int] = {}
    for index, label in labels.items():  # whole names count more than their parts, earlier classes more than later
        by_name.setdefault(label.strip().lower(), index)
    for index, label in labels.items():
        for synonym in label.split(","):
            by_name.setdefault(synonym.strip().lower(), index)
    wanted = target.strip().lower()
    if wanted in by_name:
        return by_name[wanted]
    if wanted.isdecimal() and int(wanted) in labels:
        return int(wanted)
    holding = [label for label in labels.values() if wanted in label.lower()][:5]
    near = f"; it is part of {', '.join(holding)}" if holding and wanted else closest(wanted, by_name, least=0.5)
    raise RewardError(
        f"target_class is {target!r}, which is none of the classifier's {len(labels)} classes{near or '.'} Expected a "
        f"name, or an index (0 … {max(labels)})."
    )
