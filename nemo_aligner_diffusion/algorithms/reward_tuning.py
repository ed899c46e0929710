"""The training step that every direct-gradient method shares; a method is a plan rule (one short file each).

A datum's way: prompts → the pipeline's call (rollout without gradient, latents kept) → the latent the plan reads →
picture → reward → ``∂R/∂latent`` → active calls replayed in their backward pass → parameter gradients → optimizer.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from nemo_aligner_diffusion.algorithms.tuning import DenoiserTuning
from nemo_aligner_diffusion.diffusion.network.guidance_interval import guidance_interval
from nemo_aligner_diffusion.diffusion.noise import plan_random, sample_generator
from nemo_aligner_diffusion.diffusion.plan import PlanRule, drawn
from nemo_aligner_diffusion.diffusion.schedule import path_of
from nemo_aligner_diffusion.diffusion.trajectory import Rollout, distance_of_training, rollout
from nemo_aligner_diffusion.errors import AlignerError
from nemo_aligner_diffusion.rewards.support.augmented import SampleKeys, scoring_samples

log = logging.getLogger(__name__)

_FLOAT16_SCALE = 256.0  # of the objective: decoders' gradients of some rewards are under float16's least number


class RewardTuning(DenoiserTuning):
    """Fine-tune a denoiser by the gradient of a reward through its own sampling.

    The loss is ``L = −λ·mean(R) + kl_coeff·KL``, or with a margin ``λ·mean(relu(margin − R)) + kl_coeff·KL``, which
    stops pushing what is good enough (ReFL).

    Args:
        plan_rule: which steps are supervised, drawn once per optimizer step and equal on every rank.
        kl_coeff: weight of the distance to the frozen model (DRaFT+); 0 makes no reference call.
        kl_space: in which it is measured: ``epsilon``, ``prediction`` or ``velocity``; ``None``: velocity for flows,
            else epsilon (as NeMo-Aligner's).
        reward_scale: ``λ``.
        reward_margin: see above; ``None`` for the plain reward.
        kept_steps: see :func:`.rollout`.
        rollout_guidance_interval: of the steps without gradient: see :class:`.GuidanceInterval`; ``None``: everywhere.
        **tuning: see :class:`.DenoiserTuning`; the reward is differentiable in the image.
    """

    reports = ("reward", "kl_penalty", "loss", "images", "grad_norm")
    shown: ClassVar = {"reward": "reward", "kl_penalty": "KL"}

    def __init__(
        self,
        plan_rule: PlanRule,
        *,
        kl_coeff: float = 0.0,
        kl_space: str | None = None,
        reward_scale: float = 1.0,
        reward_margin: float | None = None,
        kept_steps: int = 0,
        rollout_guidance_interval: Sequence[float] | None = None,
        **tuning: Any,
    ) -> None:
        super().__init__(**tuning)
        self.plan_rule = plan_rule
        self.kl_coeff = kl_coeff
        self.kl_space = kl_space
        self.reward_scale = reward_scale
        self.reward_margin = reward_margin
        self.kept_steps = kept_steps
        self.rollout_guidance_interval = rollout_guidance_interval
        self._overflow_said = False
        if kl_coeff:
            self.model.keep_reference()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The surrogate loss of one micro-batch: its gradient is that of ``L``, its value is not."""
        self.begin_micro_batch()
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
            kept_steps=self.kept_steps,
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
            "active_steps": torch.tensor(float(len(result.plan.active)), device=scores.device),
        }
        if list(scored.parts) != [self.reward.name]:  # a reward of parts: each on its own, raw
            figures.update({f"reward_{name}": torch.cat(part).mean() for name, part in scored.parts.items()})
        self.end_micro_batch(prompts, figures, reward=scores.reshape(result.plan.network_reads, -1).mean(0))

    def check_pipeline(self) -> None:
        """Draw a plan and make a picture twice, before anything is written: see :func:`.check_repeatable`."""
        steps = self.sampling.steps or self.model.default_steps
        drawn(self.plan_rule, path_of(self.model.pipe.scheduler, steps), plan_random(self.seed, 0))
        super().check_pipeline()
        if self.rollout_guidance_interval is not None:
            self.model.guidance_interval = guidance_interval(
                self.model, self.rollout_guidance_interval, lambda them: self.model.inputs(them, **vars(self.sampling))
            )
        if self.model.decoder.other_picture:
            mean, most = distance_of_training(self.model, self.inputs_for_checks())
            log.info(
                "in training the reward scores %s; the first is %.2g from the VAE's on average, %.2g at most "
                "(pixels in [0, 1]); validation and exports are of the VAE",
                self.model.decoder.other_picture,
                mean,
                most,
            )


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
