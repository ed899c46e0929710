"""Validation of a model that makes pictures: the same prompts and seeds every time, base against tuned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from nemo_aligner_diffusion.diffusion.generate import Sampling, generate
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.parallel.module import ParallelModule
from nemo_aligner_diffusion.rewards.base import Reward, scores_of
from nemo_aligner_diffusion.runtime.signals import Interrupted


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
    """The half of a module that validates by pictures; what trains is the subclass's.

    Args:
        model: whose :meth:`.DiffusionModel.reference` is the base model.
        reward: scores ``(B, 3, H, W)``; of a video its frames, whose scores are averaged.
        sampling: how pictures are made.
        decode_micro_batch_size: pictures decoded at a time; ``None``: all.
        optimizer_factory, guard, parallel: see :class:`.ParallelModule`.

    Attributes:
        measure_validation: gives :attr:`last_validation`; a run sets it to all metrics (``evaluation/metrics``).
    """

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
        self.model.offload.bring("reward", self.device)  # which may embed the pictures, for their diversity
        self.last_validation = self.measure_validation(self.validation_pictures)
        self.model.offload.release("reward")
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
            scores = self.scores(images.to(self.device), prompts)[0].cpu()
        self.model.offload.release("reward")
        return scores

    @record_function("reward")
    def scores(self, images: Tensor, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """``(B,)`` and the reward's parts; of frames ``(B, F, 3, H, W)`` the mean over ``F``."""
        self.model.offload.bring("reward", self.device)
        try:
            return scores_of(self.reward, images, prompts)
        except KeyboardInterrupt as stop:  # Lightning would end the program over it
            raise Interrupted from stop
