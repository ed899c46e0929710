"""The training step that every direct-gradient method shares; a method is a plan rule (one short file each).

A datum's way: prompts → the pipeline's call (rollout without gradient, latents kept) → the latent the plan reads →
picture → reward → ``∂R/∂latent`` → active calls replayed in their backward pass → parameter gradients → optimizer.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from nemo_aligner_diffusion.algorithms.picture_validation import PictureValidation
from nemo_aligner_diffusion.diffusion.generate import Sampling
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.diffusion.noise import plan_random, sample_generator
from nemo_aligner_diffusion.diffusion.plan import PlanRule, drawn
from nemo_aligner_diffusion.diffusion.schedule import path_of
from nemo_aligner_diffusion.diffusion.trajectory import Rollout, check_repeatable, distance_of_training, rollout
from nemo_aligner_diffusion.errors import AlignerError, ConfigurationError
from nemo_aligner_diffusion.parallel.module import OptimizerFactory
from nemo_aligner_diffusion.parallel.non_finite import NonFinitePolicy
from nemo_aligner_diffusion.parallel.parallelism import Parallelism
from nemo_aligner_diffusion.rewards.base import Reward
from nemo_aligner_diffusion.rewards.support.augmented import SampleKeys, scoring_samples

log = logging.getLogger(__name__)

_Self = TypeVar("_Self", bound="RewardTuning")
_FLOAT16_SCALE = 256.0  # of the objective: decoders' gradients of some rewards are under float16's least number


class RewardTuning(PictureValidation):
    """Fine-tune a denoiser by the gradient of a reward through its own sampling.

    The loss is ``L = −λ·mean(R) + kl_coeff·KL``, or with a margin ``λ·mean(relu(margin − R)) + kl_coeff·KL``, which
    stops pushing what is good enough (ReFL).

    Args:
        model: the pipeline; only its denoiser's parameters that require grad are trained.
        reward: frozen, differentiable in the image.
        sampling: how pictures are made, in training and validation.
        plan_rule: which steps are supervised, drawn once per optimizer step and equal on every rank.
        optimizer_factory, guard, parallel: see :class:`.ParallelModule`.
        kl_coeff: weight of the distance to the frozen model (DRaFT+); 0 makes no reference call.
        kl_space: in which it is measured: ``epsilon``, ``prediction`` or ``velocity``; ``None``: velocity for flows,
            else epsilon (as NeMo-Aligner's).
        reward_scale: ``λ``.
        reward_margin: see above; ``None`` for the plain reward.
        decode_micro_batch_size: pictures decoded and scored at a time; ``None``: the micro-batch.
        seed: of plans and noise; a run is a function of it, whatever the layout.
    """

    def __init__(
        self,
        model: DiffusionModel,
        reward: Reward,
        sampling: Sampling,
        plan_rule: PlanRule,
        optimizer_factory: OptimizerFactory,
        *,
        kl_coeff: float = 0.0,
        kl_space: str | None = None,
        reward_scale: float = 1.0,
        reward_margin: float | None = None,
        decode_micro_batch_size: int | None = None,
        seed: int = 0,
        guard: NonFinitePolicy | None = None,
        parallel: Parallelism | None = None,
    ) -> None:
        super().__init__(model, reward, sampling, decode_micro_batch_size, optimizer_factory, guard, parallel)
        self.plan_rule = plan_rule
        self.kl_coeff = kl_coeff
        self.kl_space = kl_space
        self.reward_scale = reward_scale
        self.reward_margin = reward_margin
        self.seed = seed
        self.last_metrics: dict[str, float] = {}
        self._micro_batches: list[dict[str, Tensor]] = []  # figures of the micro-batches of the running optimizer step
        self._rewards: list[Tensor] = []
        self._step_started = 0.0
        self._gradients_checked = self._overflow_said = False
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
        return self.model.trainable_parameters()

    def step_values(self) -> dict[str, Any]:
        return {"reward": torch.cat(self._rewards)}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The surrogate loss of one micro-batch: its gradient is that of ``L``, its value is not."""
        if not self._micro_batches:
            self._step_started = time.perf_counter()
        prompts: list[str] = batch["prompts"]
        samples = [int(index) for index in batch["index"]]
        scored = Scored()

        def objective(images: Tensor, rows: slice, read: int) -> Tensor:
            with scoring_samples(SampleKeys(self.seed, self.global_step, tuple(samples[rows]), draw=read)):
                return self.reward_loss(scored.add(*self.scores(images, prompts[rows])))

        self.model.count_truncated(prompts)
        result = rollout(
            self.model,
            self.plan_rule,
            [sample_generator(self.seed, self.global_step, index) for index in samples],
            self.model.inputs(prompts, **vars(self.sampling)),
            objective,
            rng=plan_random(self.seed, self.global_step),
            reference=self.kl_coeff != 0,
            kl_space=self.kl_space,
            decode_rows=self.decode_micro_batch_size,
            gradient_scale=_FLOAT16_SCALE if self._in_float16 else 1.0,
        )
        self._keep(prompts, scored, result)
        surrogate = result.surrogate(self.kl_coeff)
        if not torch.isfinite(scored.scores).all():  # every process then skips this update: see ParallelModule
            surrogate = surrogate * float("nan")
            self._say_what_overflows(result)
        return surrogate

    def reward_loss(self, scores: Tensor) -> Tensor:
        """Per-sample loss ``(B,)`` of per-sample rewards."""
        if self.reward_margin is None:
            return -self.reward_scale * scores
        return self.reward_scale * torch.relu(self.reward_margin - scores)

    @property
    def _in_float16(self) -> bool:
        kind = self.device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        return autocast or self._has_float16_weights

    @functools.cached_property
    def _has_float16_weights(self) -> bool:
        """Asked in each step, of some thousand tensors: no dtype changes once training has begun."""
        parts = (*self.model.networks.values(), self.reward)
        return any(p.dtype == torch.float16 for part in parts for p in part.parameters())

    def _say_what_overflows(self, result: Rollout) -> None:
        """Once: which half of a float16 pipeline it was."""
        if self._in_float16 and not self._overflow_said:
            self._overflow_said = True
            finite = all(bool(torch.isfinite(end).all()) for end in result.ends)
            log.warning(
                "a reward is not finite, in float16: %s; expected trainer.precision=bf16 or 32",
                "the decoder or the reward overflows, the latents are finite" if finite else "the denoiser overflows",
            )

    def _keep(self, prompts: list[str], scored: Scored, result: Rollout) -> None:
        """What ``metrics.csv`` and the guard are told of a micro-batch."""
        scores = scored.scores
        if self._in_float16 and not any(g.any() for g in result.gradients) and self.reward_loss(scores).any():
            raise AlignerError(
                "the reward's gradient with respect to every latent of the batch is zero: in float16 it underflows; "
                "expected rm.trainer.precision=32 and trainer.precision=bf16 or 32"
            )
        divergence = torch.zeros((), device=scores.device)
        if result.divergence is not None:
            divergence = result.divergence.detach()
        figures = {
            "reward": scores.mean(),
            "kl_penalty": divergence,
            "loss": self.reward_loss(scores).mean() + self.kl_coeff * divergence,
            "images": torch.tensor(float(len(prompts)), device=scores.device),
            "active_steps": torch.tensor(float(len(result.plan.active)), device=scores.device),
        }
        if list(scored.parts) != [self.reward.name]:  # a reward of parts: each on its own, raw
            figures.update({f"reward_{name}": torch.cat(part).mean() for name, part in scored.parts.items()})
        self._micro_batches.append(figures)
        self._prompts += prompts
        self._rewards.append(scores.reshape(result.plan.network_reads, -1).mean(0))

    def check_pipeline(self) -> None:
        """Draw a plan and make a picture twice, before anything is written: see :func:`.check_repeatable`."""
        self.eval()
        steps = self.sampling.steps or self.model.default_steps
        drawn(self.plan_rule, path_of(self.model.pipe.scheduler, steps), plan_random(self.seed, 0))
        prompt = next(iter(self.validation_prompts), "a picture")
        inputs = self.model.inputs([prompt], **vars(self.sampling))
        check_repeatable(self.model, inputs)
        if self.model.decoder.other_picture:
            mean, most = distance_of_training(self.model, inputs)
            log.info(
                "in training the reward scores %s; the first is %.2g from the VAE's on average, %.2g at most "
                "(pixels in [0, 1]); validation and exports are of the VAE",
                self.model.decoder.other_picture,
                mean,
                most,
            )

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
                f"are off, or the reward does not depend on the picture"
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
        self.last_metrics["images"] *= len(self._micro_batches) * self.parallel.layout.data
        self.last_metrics["grad_norm"] = self._grad_norm
        self.last_metrics["seconds"] = time.perf_counter() - self._step_started
        self._micro_batches, self._prompts, self._rewards = [], [], []


class Scored:
    """The scores of a micro-batch, read after read, as they come in."""

    def __init__(self) -> None:
        self._scores: list[Tensor] = []
        self.parts: dict[str, list[Tensor]] = {}

    def add(self, scores: Tensor, parts: dict[str, Tensor]) -> Tensor:
        self._scores.append(scores.detach())
        for name, part in parts.items():
            self.parts.setdefault(name, []).append(part.detach())
        return scores

    @property
    def scores(self) -> Tensor:
        """``(reads × B,)``."""
        return torch.cat(self._scores)
