"""The training step that every direct-gradient method shares; a method is a plan rule (one short file each).

A datum's way: prompts → conditioning → ``z_0`` → trajectory → latent the plan reads → image → reward → ``∂R/∂latent``
→ active steps replayed in their backward pass → parameter gradients → optimizer.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from nemo_aligner_diffusion.diffusion.families.stable_diffusion import StableDiffusion
from nemo_aligner_diffusion.diffusion.generate import generate
from nemo_aligner_diffusion.diffusion.guidance import guided_predictor
from nemo_aligner_diffusion.diffusion.noise import gaussian, plan_random, sample_generator
from nemo_aligner_diffusion.diffusion.sampler import Sampler
from nemo_aligner_diffusion.diffusion.trajectory import Plan, reward_gradient, run_trajectory
from nemo_aligner_diffusion.parallel.module import NonFiniteGuard, OptimizerFactory, ParallelModule
from nemo_aligner_diffusion.parallel.parallelism import Parallelism
from nemo_aligner_diffusion.rewards.base import Reward
from nemo_aligner_diffusion.rewards.sample_keys import SampleKeys, scoring_samples

PlanRule = Callable[[int, random.Random], Plan]  # (number of network calls T, random source) -> plan of one batch
_Self = TypeVar("_Self", bound="RewardTuning")


@dataclass(frozen=True)
class ValidationPictures:
    """The last validation, all ranks together: ``N`` (prompt, seed) pairs, pictures ``(N, 3, H, W)`` in [0, 1]."""

    prompts: list[str]
    seeds: list[int]
    base: Tensor
    tuned: Tensor
    base_rewards: list[float]
    tuned_rewards: list[float]


class RewardTuning(ParallelModule):
    """Fine-tune a denoiser by the gradient of a reward through its own sampling.

    The loss is ``L = −λ·mean(R) + kl_coeff·KL``, or with a margin ``λ·mean(relu(margin − R)) + kl_coeff·KL``, which
    stops pushing what is good enough (ReFL).

    Args:
        model: the model family; only ``model.denoiser``'s parameters that require grad are trained.
        reward: frozen, differentiable in the image.
        sampler: the solver that makes the pictures.
        plan_rule: which steps are supervised, drawn once per optimizer step and equal on every rank.
        optimizer_factory, guard, parallel: see :class:`.ParallelModule`.
        guidance_scale: classifier-free guidance ``g``.
        kl_coeff: weight of the distance to the frozen model (DRaFT+); 0 makes no reference call.
        reward_scale: ``λ``.
        reward_margin: see above; ``None`` for the plain reward.
        height, width: pixels; ``None``: the model's own size.
        decode_micro_batch_size: pictures decoded and scored at a time; ``None``: the micro-batch.
        seed: of plans and noise; a run is a function of it, whatever the layout.
    """

    def __init__(
        self,
        model: StableDiffusion,
        reward: Reward,
        sampler: Sampler,
        plan_rule: PlanRule,
        optimizer_factory: OptimizerFactory,
        *,
        guidance_scale: float,
        kl_coeff: float = 0.0,
        reward_scale: float = 1.0,
        reward_margin: float | None = None,
        height: int | None = None,
        width: int | None = None,
        decode_micro_batch_size: int | None = None,
        seed: int = 0,
        guard: NonFiniteGuard | None = None,
        parallel: Parallelism | None = None,
    ) -> None:
        super().__init__(optimizer_factory, guard, parallel)
        self.model = model
        self.reward = reward
        self.sampler = sampler
        self.plan_rule = plan_rule
        self.guidance_scale = guidance_scale
        self.kl_coeff = kl_coeff
        self.reward_scale = reward_scale
        self.reward_margin = reward_margin
        self.height, self.width = height, width
        self.decode_micro_batch_size = decode_micro_batch_size
        self.seed = seed
        self.last_metrics: dict[str, float] = {}
        self.last_validation: dict[str, float] = {}
        self.validation_prompts: list[str] = []  # prompt of each row of the validation set
        self.validation_pictures: ValidationPictures | None = None
        self.validated_step = -1
        self._base_images: dict[int, Tensor] = {}  # row of the validation set -> the base model's picture
        self._base_rewards: dict[int, Tensor] = {}
        self._validated: list[tuple[int, str, int, Tensor, Tensor]] = []
        self._micro_batches: list[dict[str, Tensor]] = []  # figures of the micro-batches of the running optimizer step
        self._rewards: list[Tensor] = []
        self._step_started = 0.0
        if kl_coeff:
            model.keep_reference()

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
        return [(name, p) for name, p in self.model.denoiser.named_parameters() if p.requires_grad]

    def step_values(self) -> dict[str, Any]:
        return {"reward": torch.cat(self._rewards)}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The surrogate loss of one micro-batch: its gradient is that of ``L``, its value is not."""
        if not self._micro_batches:
            self._step_started = time.perf_counter()
        prompts: list[str] = batch["prompts"]
        conditioning = self.model.encode_prompts(prompts)
        predict = guided_predictor(self.model, conditioning, self.guidance_scale)
        plan = self.plan_rule(len(self.sampler), plan_random(self.seed, self.global_step))
        trajectory = run_trajectory(
            predict,
            self.sampler,
            plan,
            self._noise(batch["index"]).__next__,
            reference=self._frozen(predict) if self.kl_coeff else None,
        )
        scored: list[tuple[Tensor, dict[str, Tensor]]] = []
        share = 1.0 / len(trajectory.reads)
        samples = [int(index) for index in batch["index"]]

        def objective(images: Tensor, rows: slice) -> Tensor:
            read = sum(len(scores) for scores, _ in scored) // len(prompts)  # one read is scored after the other
            with scoring_samples(SampleKeys(self.seed, self.global_step, tuple(samples[rows]), draw=read)):
                scores, parts = self.reward.scores(images, prompts[rows])
            scored.append((scores.detach(), {name: part.detach() for name, part in parts.items()}))
            return self.reward_loss(scores).sum() * (share / len(prompts))

        gradients = reward_gradient(trajectory.reads, self.model.decode, objective, self.decode_micro_batch_size)
        surrogate = torch.stack(
            [(read * g.detach()).sum() for read, g in zip(trajectory.reads, gradients, strict=True)]
        ).sum()
        scores = torch.cat([score for score, _ in scored])
        loss = self.reward_loss(scores).mean()
        divergence = torch.zeros((), device=scores.device)
        if trajectory.divergence is not None:
            divergence = trajectory.divergence.detach()
            surrogate = surrogate + self.kl_coeff * trajectory.divergence
            loss = loss + self.kl_coeff * divergence
        if not torch.isfinite(scores).all():  # every process then skips this update: see ParallelModule
            surrogate = surrogate * float("nan")
        figures = {
            "reward": scores.mean(),
            "kl_penalty": divergence,
            "loss": loss,
            "images": torch.tensor(float(len(prompts)), device=scores.device),
            "active_steps": torch.tensor(float(len(plan.active)), device=scores.device),
        }
        if list(scored[0][1]) != [self.reward.name]:  # a reward of parts: each on its own, raw
            for name in scored[0][1]:
                figures[f"reward_{name}"] = torch.cat([parts[name] for _, parts in scored]).mean()
        self._micro_batches.append(figures)
        self._prompts += prompts
        self._rewards.append(scores.reshape(len(trajectory.reads), -1).mean(0))
        return surrogate

    def reward_loss(self, scores: Tensor) -> Tensor:
        """Per-sample loss ``(B,)`` of per-sample rewards."""
        if self.reward_margin is None:
            return -self.reward_scale * scores
        return self.reward_scale * torch.relu(self.reward_margin - scores)

    def _noise(self, indices: Tensor) -> Iterator[Tensor]:
        generators = [sample_generator(self.seed, self.global_step, int(index)) for index in indices]
        shape = self.model.latent_shape(self.height, self.width)
        while True:
            yield gaussian(generators, shape, self.model.latent_like)

    def _frozen(self, predict: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        def frozen(latents: Tensor, timestep: Tensor) -> Tensor:
            with self.model.reference():
                return predict(latents, timestep)

        return frozen

    # Lightning's hooks

    def configure_model(self) -> None:
        """Spread the model over the processes, if there are several; before the optimizer sees its parameters."""
        mesh = self.device_mesh
        if mesh is not None:
            model = self.model
            denoisers = [part for part in (model.denoiser, model.reference_denoiser) if part is not None]
            frozen = {"text_encoder": model.text_encoder, "vae": model.vae, "reward": self.reward}
            self.parallel.apply(mesh, denoisers, frozen)

    def on_train_start(self) -> None:
        self.eval()  # frozen parts stay as they are; only the denoiser may have dropout
        self.model.denoiser.train()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        names = list(self._micro_batches[0])
        figures = torch.stack([torch.stack([micro[name].float() for name in names]) for micro in self._micro_batches])
        averaged = self.trainer.strategy.reduce(figures.mean(0), reduce_op="mean")
        self.last_metrics = dict(zip(names, averaged.tolist(), strict=True))
        self.last_metrics["images"] *= len(self._micro_batches) * self.parallel.layout.data
        self.last_metrics["grad_norm"] = self._grad_norm
        self.last_metrics["seconds"] = time.perf_counter() - self._step_started
        self._micro_batches, self._prompts, self._rewards = [], [], []

    # validation: the same prompts and seeds every time, base against tuned

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        prompts, seeds, rows = batch["prompts"], batch["seeds"], batch["rows"]
        if any(row not in self._base_rewards for row in rows):
            self._base_rewards |= dict(zip(rows, self._score(self.base_images(batch), prompts), strict=True))
        tuned = self._generate(prompts, seeds)
        self._validated += list(zip(rows, prompts, seeds, tuned, self._score(tuned, prompts), strict=True))

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
        base, tuned = together["base_rewards"][places], together["tuned_rewards"][places]
        self.validation_pictures = ValidationPictures(
            prompts=[self.validation_prompts[row] for row in sorted(order)],
            seeds=[int(seed) for seed in together["seeds"][places]],
            base=together["base"][places],
            tuned=together["tuned"][places],
            base_rewards=base.tolist(),
            tuned_rewards=tuned.tolist(),
        )
        self.last_validation = {
            "reward": float(tuned.mean()),
            "base_reward": float(base.mean()),
            "share_improved": float((tuned > base).float().mean()),
        }
        self.validated_step = self.trainer.global_step
        self._validated = []

    def _generate(self, prompts: list[str], seeds: list[int]) -> Tensor:
        """A picture of each pair, ``(B, 3, H, W)`` on the CPU."""
        images = generate(
            self.model,
            self.sampler,
            prompts,
            seeds,
            self.guidance_scale,
            height=self.height,
            width=self.width,
            batch_size=len(prompts),
            decode_batch_size=self.decode_micro_batch_size,
        )
        self.parallel.reshard()
        return images

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Rewards ``(B,)`` on the CPU, of the pictures as they are."""
        with torch.no_grad():
            return self.reward(images.to(self.device), prompts).cpu()
