"""What modules that tune a model of pictures share: the layout, a step's figures, and validation by pictures."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from nemo_aligner_diffusion.diffusion.generate import Sampling, generate
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.parallel.module import ParallelModule
from nemo_aligner_diffusion.rewards.base import Reward, scores_of
from nemo_aligner_diffusion.runtime.signals import Interrupted

log = logging.getLogger(__name__)

_Self = TypeVar("_Self", bound="PictureValidation")
_COUNTS = ("images", "pairs")  # figures that are added up over the micro-batches and processes of a step


@dataclass(frozen=True)
class ValidationPictures:
    """The last validation, all ranks together: ``N`` (prompt, seed) pairs, pictures ``(N, 3, H, W)`` in [0, 1]."""

    prompts: list[str]
    seeds: list[int]
    base: Tensor
    tuned: Tensor
    base_rewards: list[float]
    tuned_rewards: list[float]


class PictureValidation(ParallelModule):
    """A module that validates by pictures: the same prompts and seeds every time, base against tuned. How it trains is
    the subclass's, which calls :meth:`report` in its ``training_step``.

    Args:
        model: only its denoiser's parameters that require grad are trained; its
            :meth:`.DiffusionModel.reference` is the base model.
        reward: scores ``(B, 3, H, W)``; of a video its frames, whose scores are averaged.
        sampling: how pictures are made.
        decode_micro_batch_size: pictures decoded at a time; ``None``: all.
        optimizer_factory, guard, parallel: see :class:`.ParallelModule`.

    Attributes:
        reports: names of the figures that a step reports: which columns ``metrics.csv`` begins with.
        watched: what the values are of which :meth:`report` is told.
        shown: those of them that the progress line shows, and the words for them.
        last_metrics: of the last optimizer step, means over micro-batches and processes.
        measure_validation: gives :attr:`last_validation`; a run sets it to all metrics (``evaluation/metrics``).
    """

    reports: ClassVar[tuple[str, ...]] = ()
    watched: ClassVar[str] = "reward"
    shown: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        model: DiffusionModel,
        reward: Reward,
        sampling: Sampling,
        decode_micro_batch_size: int | None,
        *parallel_module: Any,
    ) -> None:
        super().__init__(*parallel_module)
        self.model = model
        self.reward = reward
        self.sampling = sampling
        self.decode_micro_batch_size = decode_micro_batch_size
        self.last_validation: dict[str, float] = {}  # complete, and the same on every rank, when the epoch has ended
        self.measure_validation: Callable[[ValidationPictures], dict[str, float]] = lambda pictures: {}
        self.validation_prompts: list[str] = []  # prompt of each row of the validation set
        self.validation_pictures: ValidationPictures | None = None
        self._base_images: dict[int, Tensor] = {}  # row of the validation set -> the base model's picture
        self._base_rewards: dict[int, Tensor] = {}
        self._validated: list[tuple[int, str, int, Tensor, Tensor]] = []
        self.last_metrics: dict[str, float] = {}
        self._micro_batches: list[dict[str, Tensor]] = []  # figures of the micro-batches of the running optimizer step
        self._values: list[Tensor] = []
        self._step_started = 0.0
        self._gradients_checked = False

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        """A move takes everything along, another dtype (``trainer.precision``) not the reward: it has its own."""

        def moved(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

        super()._apply(fn, recurse=False)
        for child in self.children():
            child._apply(moved if child is self.reward else fn, recurse)
        return self

    def trainable_parameters(self) -> list[tuple[str, Parameter]]:
        return self.model.trainable_parameters()

    # a step's figures

    def begin_micro_batch(self) -> None:
        """The first of an optimizer step starts the clock."""
        if not self._micro_batches:
            self._step_started = time.perf_counter()

    def report(self, prompts: list[str], values: Tensor, figures: Mapping[str, Tensor]) -> None:
        """What is said of a micro-batch.

        Args:
            prompts: ``B``.
            values: ``(B,)``, which the guard looks at under the name :attr:`watched`.
            figures: scalars for ``metrics.csv``, the same names in all micro-batches of a step.
        """
        self._prompts += prompts
        self._values.append(values.detach())
        self._micro_batches.append(dict(figures))

    def step_values(self) -> dict[str, Any]:
        return {self.watched: torch.cat(self._values)}

    # Lightning's hooks

    def configure_model(self) -> None:
        """Spread the model over the processes, if there are several; before the optimizer sees its parameters."""
        mesh = self.device_mesh
        if mesh is not None:
            model = self.model
            denoisers = [part for part in (model.denoiser, model.reference_denoiser) if part is not None]
            self.parallel.apply(mesh, denoisers, {**model.frozen_parts(), "reward": self.reward})

    def on_train_start(self) -> None:
        self.eval()  # frozen parts stay as they are; only the denoiser may have dropout
        self.model.denoiser.train()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if not self._gradients_checked:
            self._check_gradients()
        super().on_before_optimizer_step(optimizer)

    def _check_gradients(self) -> None:
        """Once: parameters that no gradient reaches stay as they are for ever, and nobody would be told."""
        self._gradients_checked = True
        parameters = self.trainable_parameters()
        without = [name for name, parameter in parameters if parameter.grad is None]
        if len(without) == len(parameters):
            raise ConfigurationError(
                f"no trained parameter of {self.model.trained} gets a gradient: the pipeline runs it where gradients "
                f"are off, or the loss does not depend on it"
            )
        if without:
            log.warning(
                "%d of %d trained tensors get no gradient and stay as they are: %s%s",
                len(without),
                len(parameters),
                ", ".join(without[:5]),
                ", …" if len(without) > 5 else "",
            )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        names = list(self._micro_batches[0])
        figures = torch.stack([torch.stack([micro[name].float() for name in names]) for micro in self._micro_batches])
        averaged = self.trainer.strategy.reduce(figures.mean(0), reduce_op="mean")
        self.last_metrics = dict(zip(names, averaged.tolist(), strict=True))
        for name in set(_COUNTS) & set(names):
            self.last_metrics[name] *= len(self._micro_batches) * self.parallel.layout.data
        self.last_metrics["grad_norm"] = self._grad_norm
        self.last_metrics["seconds"] = time.perf_counter() - self._step_started
        self._micro_batches, self._prompts, self._values = [], [], []

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        prompts, seeds, rows = batch["prompts"], batch["seeds"], batch["rows"]
        if any(row not in self._base_rewards for row in rows):
            self._base_rewards |= dict(zip(rows, self.score(self.base_images(batch), prompts), strict=True))
        tuned = self._generate(prompts, seeds)
        self._validated += list(zip(rows, prompts, seeds, tuned, self.score(tuned, prompts), strict=True))

    def base_images(self, batch: dict[str, Any]) -> Tensor:
        """The base model's pictures ``(B, 3, H, W)`` of a batch of the validation set, on the CPU; made once."""
        if any(row not in self._base_images for row in batch["rows"]):
            with self.model.reference():
                images = self._generate(batch["prompts"], batch["seeds"])
            self._base_images |= dict(zip(batch["rows"], images, strict=True))
        return torch.stack([self._base_images[row] for row in batch["rows"]])

    def on_validation_epoch_end(self) -> None:
        rows = [row for row, *_ in self._validated]
        mine = {
            "rows": torch.tensor(rows, device=self.device),
            "seeds": torch.tensor([seed for _, _, seed, _, _ in self._validated], device=self.device),
            "base": torch.stack([self._base_images[row] for row in rows]).to(self.device),
            "tuned": torch.stack([picture for *_, picture, _ in self._validated]).to(self.device),
            "base_rewards": torch.stack([self._base_rewards[row] for row in rows]).to(self.device),
            "tuned_rewards": torch.stack([score for *_, score in self._validated]).to(self.device),
        }
        if self.trainer.world_size > 1:
            gathered: Any = self.all_gather(mine)
            mine = {name: value.flatten(0, 1) for name, value in gathered.items()}
        together = {name: value.cpu() for name, value in mine.items()}
        order = {int(row): place for place, row in reversed(list(enumerate(together["rows"])))}  # each row once
        places = [order[row] for row in sorted(order)]
        self.validation_pictures = ValidationPictures(
            prompts=[self.validation_prompts[row] for row in sorted(order)],
            seeds=[int(seed) for seed in together["seeds"][places]],
            base=together["base"][places],
            tuned=together["tuned"][places],
            base_rewards=together["base_rewards"][places].tolist(),
            tuned_rewards=together["tuned_rewards"][places].tolist(),
        )
        self.last_validation = self.measure_validation(self.validation_pictures)
        self.validated_step = self.trainer.global_step
        self._validated = []

    def _generate(self, prompts: list[str], seeds: list[int]) -> Tensor:
        """A picture of each pair, ``(B, 3, H, W)`` on the CPU."""
        images = generate(
            self.model,
            prompts,
            seeds,
            self.sampling,
            batch_size=len(prompts),
            decode_batch_size=self.decode_micro_batch_size,
        )
        self.parallel.reshard()
        return images

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Rewards ``(B,)`` on the CPU, of the pictures as they are."""
        with torch.no_grad():
            return self.scores(images.to(self.device), prompts)[0].cpu()

    def scores(self, images: Tensor, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """``(B,)`` and the reward's parts; of frames ``(B, F, 3, H, W)`` the mean over ``F``."""
        try:
            return scores_of(self.reward, images, prompts)
        except KeyboardInterrupt as stop:  # Lightning would end the program over it
            raise Interrupted from stop
