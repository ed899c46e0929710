"""The training step of a policy gradient: sample a global batch, score it, push each drawn step by its advantage.

A datum's way: prompts → the pipeline's call with a stochastic solver → pictures → rewards of the global batch →
advantages → ``−min(A·ratio, A·clip(ratio))`` of the drawn steps → parameter gradients → optimizer. Further passes over
the batch go along the stored trajectories.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from nemo_aligner_diffusion.algorithms.policy.advantages import Advantages, moments
from nemo_aligner_diffusion.algorithms.policy.ddpo import DDPO
from nemo_aligner_diffusion.algorithms.tuning import DenoiserTuning
from nemo_aligner_diffusion.diffusion.noise import plan_random, sample_generator
from nemo_aligner_diffusion.diffusion.policy.rollout import PolicyRollout, policy_rollout
from nemo_aligner_diffusion.diffusion.policy.transitions import Transitions
from nemo_aligner_diffusion.diffusion.schedule import timed
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.parallel.broadcast import gather
from nemo_aligner_diffusion.rewards.support.augmented import SampleKeys, scoring_samples

_STATE = "policy"  # in checkpoints


@dataclass
class Stored:
    """A process's share of a global batch, between the optimizer steps that learn from it.

    Attributes:
        step: optimizer steps done when it was sampled, which its noise is keyed by.
        passes: that have been made.
        spread: standard deviations over the whole global batch, of rewards and of advantages.
        samples: ``B`` global sample indices.
        rewards, advantages: ``(B,)`` float64.
        log_densities: ``(B, T)`` when it was sampled; 0 at steps that have none.
        latents: ``(B, T, …)``, ``z_1 … z_T``.
    """

    step: int
    passes: int
    spread: tuple[float, float]
    samples: list[int]
    rewards: Tensor
    advantages: Tensor
    log_densities: Tensor
    latents: Tensor

    @property
    def rows(self) -> dict[str, Any]:
        """What has a row a sample."""
        return {name: getattr(self, name) for name in ("rewards", "advantages", "log_densities", "latents")}

    def of(self, samples: list[int]) -> Stored:
        """The rows of some of its samples, in their order."""
        if samples == self.samples:
            return self
        place = {sample: row for row, sample in enumerate(self.samples)}
        chosen = [place[sample] for sample in samples]
        return replace(self, samples=samples, **{name: rows[chosen] for name, rows in self.rows.items()})


class PolicyGradient(DenoiserTuning):
    """DDPO (Black et al., 2023) through any pipeline whose steps have a density: see :class:`.Transitions`.

    A batch of the loader is this process's whole share of a global batch; each global batch comes
    ``method.inner_passes`` times in a row (:class:`.SampleStream`, ``repeats``). Its loss is the mean over samples and
    drawn steps of ``−min(A·ratio, A·clip(ratio, 1 − c, 1 + c))``, ``ratio`` of the present to the sampling weights'
    density of the transition, log-densities being means over a latent's elements.

    Args:
        method: the settings; in training pictures are sampled with its ``noise_level``.
        micro_batch_size: pictures sampled at a time, and gone along with at a time; gradients do not depend on it.
        **tuning: see :class:`.DenoiserTuning`; of the reward numbers are enough, no gradient is taken.
    """

    reports = ("reward", "loss", "images", "grad_norm")
    shown: ClassVar = {"reward": "reward", "clip_fraction": "clipped"}

    def __init__(self, method: DDPO, micro_batch_size: int, **tuning: Any) -> None:
        super().__init__(**tuning)
        self.method = method
        self.micro_batch_size = micro_batch_size
        self.advantages = Advantages(
            method.buffer if method.statistics == "prompt" else None, method.min_count, method.advantage_clip
        )
        self._stored: Stored | None = None

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss of this process's share of a global batch."""
        self.begin_micro_batch()
        prompts: list[str] = batch["prompts"]
        samples = [int(index) for index in batch["index"]]
        stored, self._stored = self._stored, None
        if stored is None or not set(samples) <= set(stored.samples):
            return self._first_pass(prompts, samples)
        return self._further_pass(prompts, stored.of(samples))

    def _first_pass(self, prompts: list[str], samples: list[int]) -> Tensor:
        self.model.count_truncated(prompts)
        chunks = self._chunks(len(samples), self.micro_batch_size)
        parts = [self._rolled(prompts[c], samples[c], self.global_step) for c in chunks]
        rewards, raw = self._scored(torch.cat([part.pictures for part in parts]), prompts, samples)
        advantages, spread = self._advantages(prompts, samples, rewards)
        figures = {"images": float(len(samples)), "reward_std": spread[0], "advantage_std": spread[1], **raw}
        if self.method.inner_passes > 1 and math.isfinite(spread[1]):  # else the update is skipped; sampled anew
            densities = torch.cat([part.trajectory_densities for part in parts])
            latents = torch.cat([part.latents for part in parts if part.latents is not None])
            self._stored = Stored(self.global_step, 1, spread, samples, rewards, advantages, densities, latents)
        new = _drawn(parts)
        return self._loss(new, new.detach(), prompts, rewards, advantages, figures)

    def _further_pass(self, prompts: list[str], stored: Stored) -> Tensor:
        chunks = self._chunks(len(prompts), self.micro_batch_size)
        parts = [self._rolled(prompts[c], stored.samples[c], stored.step, stored.latents[c]) for c in chunks]
        old = stored.log_densities[:, list(parts[0].drawn)]
        stored.passes += 1
        if stored.passes < self.method.inner_passes:
            self._stored = stored
        figures = {"images": 0.0, "reward_std": stored.spread[0], "advantage_std": stored.spread[1]}
        return self._loss(_drawn(parts), old, prompts, stored.rewards, stored.advantages, figures)

    @staticmethod
    def _chunks(rows: int, size: int) -> list[slice]:
        return [slice(start, start + size) for start in range(0, rows, size)]

    def _rolled(
        self, prompts: list[str], samples: list[int], step: int, latents: Tensor | None = None
    ) -> PolicyRollout:
        """One call of the pipeline; of ``step`` are the samples, of the present one the drawn steps."""
        return policy_rollout(
            self.model,
            [sample_generator(self.seed, step, sample) for sample in samples],
            self.model.inputs(prompts, **{**vars(self.sampling), "eta": 0.0}),
            self.method.drawn,
            plan_random(self.seed, self.global_step),
            noise_level=self.method.noise_level,
            keep=latents is None and self.method.inner_passes > 1,
            decode_rows=self.decode_micro_batch_size,
            stored=None if latents is None else latents.to(self.device),
        )

    def _scored(self, pictures: Tensor, prompts: list[str], samples: list[int]) -> tuple[Tensor, dict[str, float]]:
        """``(B,)`` float64, and means of a reward's parts, for the metrics."""
        scores: list[Tensor] = []
        parts: dict[str, list[Tensor]] = {}
        for rows in self._chunks(len(samples), self.decode_micro_batch_size or self.micro_batch_size):
            with torch.no_grad(), scoring_samples(SampleKeys(self.seed, self.global_step, tuple(samples[rows]))):
                score, components = self.scores(pictures[rows], prompts[rows])
            scores.append(score.double())
            for name, component in components.items():
                parts.setdefault(name, []).append(component)
        shown = {} if list(parts) == [self.reward.name] else parts
        return torch.cat(scores), {f"reward_{name}": float(torch.cat(of).mean()) for name, of in shown.items()}

    def _advantages(
        self, prompts: list[str], samples: list[int], rewards: Tensor
    ) -> tuple[Tensor, tuple[float, float]]:
        """This process's, from the rewards of the global batch in the order of its samples; and the batch's spread."""
        everybody = [row for rows in gather([*zip(samples, prompts, rewards.tolist(), strict=True)]) for row in rows]
        batch = {sample: row for sample, *row in everybody}  # the processes of a tensor group have the same ones
        order = sorted(batch)
        theirs = [batch[sample][1] for sample in order]
        found = self.advantages([batch[sample][0] for sample in order], theirs)
        of = dict(zip(order, found, strict=True))
        mine = torch.tensor([of[sample] for sample in samples], dtype=torch.float64)
        return mine, (moments(theirs)[1], moments(found)[1])

    def _loss(
        self,
        new: Tensor,
        old: Tensor,
        prompts: list[str],
        rewards: Tensor,
        advantages: Tensor,
        figures: Mapping[str, float],
    ) -> Tensor:
        """Of log-densities ``(B, drawn steps)``; all that is said of the step."""
        losses, ratio = clipped_losses(new, old.to(new), advantages.to(new)[:, None], self.method.clip_range)
        apart = new.detach() - old.to(new)
        measured = {
            "reward": rewards.mean(),
            "loss": losses.detach().mean(),
            "approx_kl": apart.square().mean() / 2,
            "clip_fraction": ((ratio - 1).abs() > self.method.clip_range).to(new).mean(),
            **{name: new.new_tensor(value) for name, value in figures.items()},
        }
        self.end_micro_batch(prompts, {name: value.to(new) for name, value in measured.items()}, reward=rewards)
        return losses.mean()

    def check_pipeline(self) -> None:
        """Also that the solver's steps have a density, and that a further pass would see the network of the first."""
        dropping = any(isinstance(part, torch.nn.Dropout) and part.p > 0 for part in self.model.denoiser.modules())
        if dropping and self.method.inner_passes > 1:
            raise ConfigurationError(
                f"{self.method.given('inner_passes')} with dropout in the trained network: the ratio of a further pass "
                "would be of two masks; expected model.peft.lora_tuning.dropout=0, or one pass"
            )
        steps = self.sampling.steps or self.model.default_steps
        Transitions(timed(self.model.pipe.scheduler, steps), steps, self.method.noise_level)
        super().check_pipeline()

    # checkpoints: what further passes need, whole, so that any layout goes on with it

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        state: dict[str, Any] = {"advantages": self.advantages.state_dict()}
        if self._stored is not None:
            state["stored"] = vars(self._whole(self._stored))
        checkpoint[_STATE] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        state = checkpoint.get(_STATE)
        if state is None:  # of a run with another method
            return
        self.advantages.load_state_dict(state["advantages"])
        self._stored = Stored(**state["stored"]) if "stored" in state else None

    def _whole(self, stored: Stored) -> Stored:
        """The global batch, on the CPU, by sample."""
        mine = {"samples": torch.tensor(stored.samples), **stored.rows}
        if self.trainer.world_size > 1:
            gathered: Any = self.all_gather({name: rows.to(self.device) for name, rows in mine.items()})
            mine = {name: rows.flatten(0, 1) for name, rows in gathered.items()}
        together: dict[str, Any] = {name: rows.cpu() for name, rows in mine.items()}
        every = together.pop("samples").tolist()
        return replace(stored, samples=every, **together).of(sorted(set(every)))


def clipped_losses(new: Tensor, old: Tensor, advantages: Tensor, clip_range: float) -> tuple[Tensor, Tensor]:
    """``−min(A·ratio, A·clip(ratio, 1 − c, 1 + c))`` of each entry, and the ratios without gradient.

    Args:
        new, old: log-densities under the present and the sampling weights.
    """
    ratio = (new - old).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(advantages * ratio, advantages * clipped), ratio.detach()


def _drawn(parts: Sequence[PolicyRollout]) -> Tensor:
    """Log-densities ``(B, drawn steps)`` of all chunks, with gradient."""
    return torch.cat([torch.stack([part.log_densities[i] for i in part.drawn], 1) for part in parts])
