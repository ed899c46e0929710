"""The log-probability of a class, by any image-classification network of transformers.

DRaFT (Clark et al. 2024, arXiv 2309.17400) tunes a model so that its pictures are taken for a class that the prompt
does not name, which makes adversarial examples of the classifier; with the class that the prompt names, it makes
pictures more typical. Averaging over views of the picture asks for the class in the whole and in its parts.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nemo_aligner_diffusion.errors import RewardError
from nemo_aligner_diffusion.rewards.base import Reward
from nemo_aligner_diffusion.rewards.image_processor import ImageProcessor
from nemo_aligner_diffusion.rewards.micro_batches import check_micro_batch_size, in_micro_batches, own_precision
from nemo_aligner_diffusion.rewards.pretrained import existing_source, load_model

MOST_VIEWS = 10
_CROP_SIDE = 7 / 8
# Where the crops lie, as shares of the room there is: the centre and the corners.
_CROP_PLACES = ((0.5, 0.5), (0.0, 0.0), (0.0, 1.0), (1.0, 0.0))


class ClassifierReward(Reward):
    """``log p(class | picture)``, averaged over views; at most 0.

    Of a classifier with one class per picture it is the log-softmax of its logits, of one with several the log-sigmoid.

    Args:
        model: of transformers' ``…ForImageClassification``; frozen in place.
        processor: what the model does to a picture first.
        target_class: index, or a name in ``model.config.id2label`` (upper and lower case alike; one of the names that
            ImageNet writes with commas, such as ``goldfish`` of ``goldfish, Carassius auratus``).
        views: 1 to 10, the same for every picture and call: the picture, its mirror image, then the centre and three
            corner crops of 7/8 of its sides, each also mirrored (random ones: :mod:`.augmentation`).
        micro_batch_size, activation_checkpointing: see :mod:`.micro_batches`; a picture comes with all its views.
    """

    name = "classifier"

    def __init__(
        self,
        model: Any,
        processor: ImageProcessor,
        target_class: int | str,
        *,
        views: int = 1,
        micro_batch_size: int | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_micro_batch_size(micro_batch_size)
        if isinstance(views, bool) or not isinstance(views, int) or not 1 <= views <= MOST_VIEWS:
            raise RewardError(f"A classifier's views are {views!r}; expected an integer from 1 to {MOST_VIEWS}.")
        self.model = model
        self.processor = processor
        self.target = class_index(model.config, target_class)
        self.views = views
        self.multi_label = getattr(model.config, "problem_type", None) == "multi_label_classification"
        self.micro_batch_size = micro_batch_size
        self.activation_checkpointing = activation_checkpointing
        self.freeze()

    @classmethod
    def from_pretrained(
        cls, source: str | Path, target_class: int | str, where: str = "rm.model.from_pretrained", **settings: Any
    ) -> ClassifierReward:
        """From a folder or hub id; ``settings`` are the constructor's.

        Raises:
            RewardError: there is no such classifier, its preprocessing is not known here, or it has no such class.
        """
        from transformers import AutoModelForImageClassification

        source = existing_source(source, where)
        model = load_model(AutoModelForImageClassification, source, where, "an image classifier")
        return cls(model, ImageProcessor.from_pretrained(source, where), target_class, **settings)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        device = next(self.model.parameters()).device
        with own_precision(device.type):
            return in_micro_batches(
                self._score_images,
                images.to(device),
                micro_batch_size=self.micro_batch_size,
                activation_checkpointing=self.activation_checkpointing,
            )

    def _score_images(self, images: Tensor) -> Tensor:
        pixels = torch.cat([self.processor(view) for view in fixed_views(images, self.views)])
        return self._log_probability(pixels).view(self.views, -1).mean(dim=0)

    def _log_probability(self, pixels: Tensor) -> Tensor:
        logits = self.model(pixel_values=pixels.to(next(self.model.parameters()).dtype)).logits
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.multi_label:
            return functional.logsigmoid(logits[:, self.target])
        return functional.log_softmax(logits, dim=-1)[:, self.target]


def fixed_views(images: Tensor, count: int) -> list[Tensor]:
    """The first ``count`` views, see :class:`ClassifierReward`; crops keep the picture's aspect ratio."""
    height, width = images.shape[-2:]
    rows, columns = max(round(height * _CROP_SIDE), 1), max(round(width * _CROP_SIDE), 1)
    views = [images, images.flip(-1)]
    for down, right in _CROP_PLACES:
        top, left = round(down * (height - rows)), round(right * (width - columns))
        crop = images[..., top : top + rows, left : left + columns]
        views += [crop, crop.flip(-1)]
    return views[:count]


def class_index(config: Any, target: int | str) -> int:
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
    wanted = str(target).strip().lower()
    if wanted in by_name:
        return by_name[wanted]
    if wanted.removeprefix("-").isdecimal():
        if int(wanted) in labels:
            return int(wanted)
        raise RewardError(f"target_class is {target}, but the classifier's classes are 0 … {max(labels)}.")
    near = difflib.get_close_matches(wanted, by_name, n=5, cutoff=0.5)
    near += [name for name in by_name if wanted in name and name not in near][: 5 - len(near)]
    hint = f"nearest are {', '.join(labels[by_name[name]] for name in near)}" if near else "none is like it"
    raise RewardError(
        f"target_class is {target!r}, which is none of the classifier's {len(labels)} classes; {hint}. An index "
        f"(0 … {max(labels)}) will do, too."
    )
