"""The training step of learning from pairs; a method is its weights over noise levels (one short file each).

A datum's way: two pictures and a label → latents → one noise level and one noise for both → the tuned model's
prediction and the base model's → errors → the argument of σ → loss → parameter gradients → optimizer.
"""

from __future__ import annotations

import functools
import logging
import math
import random
from collections import deque
from typing import Any, ClassVar

import torch
from torch import Tensor

from nemo_aligner_diffusion.algorithms.preference.base import PreferenceMethod
from nemo_aligner_diffusion.algorithms.preference.corrections import Corrections
from nemo_aligner_diffusion.algorithms.preference.loss import pair_loss, preferred_share, pull
from nemo_aligner_diffusion.algorithms.preference.watch import WINDOW, both_rise
from nemo_aligner_diffusion.algorithms.tuning import DenoiserTuning
from nemo_aligner_diffusion.data.preferences.settings import PairSettings
from nemo_aligner_diffusion.diffusion.network.call import Conditioning, DirectCalls
from nemo_aligner_diffusion.diffusion.network.latents import encode, from_moments
from nemo_aligner_diffusion.diffusion.noise import key_to_seed, sample_generator
from nemo_aligner_diffusion.diffusion.trajectory import sample_with_latents
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.parallel.broadcast import gather

log = logging.getLogger(__name__)

BINS = 20  # of the noise levels, of which gradient_weight.csv has a row each
_STATE = "preference"  # in checkpoints


class PreferenceTuning(DenoiserTuning):
    """Fine-tune a denoiser on pairs of pictures: see :class:`.PreferenceMethod` for the loss.

    Args:
        method: its weights.
        pairs: ``model.preference``.
        **tuning: see :class:`.DenoiserTuning`.

    Attributes:
        corrections: DDE's table; ``None`` with other methods.
        weight_by_level: ``(20, 2)``: pairs so far in each twentieth of the noise levels, and the sum of their gradient
            weights ``|∂loss/∂(Δ^w − Δ^l)|``.
    """

    counted = "pairs"
    shown: ClassVar = {"loss": "loss", "implicit_accuracy": "accuracy", "implicit_margin": "margin"}
    starts_with = ("first network calls", "first backward pass")

    def __init__(self, method: PreferenceMethod, pairs: PairSettings, **tuning: Any) -> None:
        super().__init__(**tuning)
        self.method = method
        self.pairs = pairs
        if pairs.pairs == "shards":  # online it makes the labels
            self.reward_is = "reward (only watches)"
        compared = ("implicit_accuracy", "implicit_margin", "winner_error", "loser_error", "gradient_weight")
        self.reports = ("loss", "pairs", "grad_norm", *(compared if method.compares else ()))
        self.weight_by_level = torch.zeros(BINS, 2, dtype=torch.float64)
        self._rows: list[Tensor] = []  # (B, 5) of the micro-batches: sample, t, Δ^w, Δ^l, gradient weight
        self._errors: deque[tuple[float, float]] = deque(maxlen=2 * WINDOW)
        self._warned = False
        if method.compares:
            self.model.keep_reference()

    # what the model's noise levels make of the method

    @functools.cached_property
    def calls(self) -> DirectCalls:
        return DirectCalls(self.model, self.sampling)

    @functools.cached_property
    def weights(self) -> Tensor:
        """``w_t``, float64 ``(T_train,)``."""
        return torch.tensor(self.method.weights(self.calls.levels), dtype=torch.float64, device=self.device)

    @functools.cached_property
    def corrections(self) -> Corrections | None:
        weights = self.method.corrections(self.calls.levels)
        return None if weights is None else Corrections(weights, self.method.correction_share)

    @functools.cached_property
    def range(self) -> tuple[int, int]:
        """Levels that are trained: ``first <= t < end``."""
        size = self.calls.levels.size
        first, end = self.pairs.steps or (0, size)
        if not 0 <= first < end <= size:
            raise ConfigurationError(
                f"model.preference.steps = [{first}, {end}]: this model has {size} noise levels; expected [first, end] "
                f"with 0 <= first < end <= {size}"
            )
        return first, end

    def check_pipeline(self) -> None:
        """Also, whether the method is defined on this model's noise levels, and the denoiser can be called on them."""
        super().check_pipeline()
        levels = self.calls.levels
        self.method.check_weights(levels, *self.range)
        if levels.flow and self.method.name == "dde_single":
            log.warning(
                "model.algorithm=dde_single on a flow: its weight σ² is bounded, and DDE's argument about the noisy "
                "end is about models that predict noise: an experiment; dpo and discounted are defined on flows"
            )

    # one micro-batch

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss of one micro-batch of pairs."""
        self.begin_micro_batch()
        prompts: list[str] = batch["prompts"]
        samples = [int(index) for index in batch["index"]]
        generators = [sample_generator(self.seed, self.global_step, index) for index in samples]
        t, noise = self.draw(generators)
        latents, labels = self.latents(batch, samples, generators)
        self.model.count_truncated(prompts)
        second = labels[:, 1] > labels[:, 0]
        both = torch.stack([latents[range(len(samples)), place.long()] for place in (second, ~second)])
        importance = torch.where(labels[:, 0] == labels[:, 1], self.pairs.tie_weight, 1.0)
        conditioning = self.calls.conditioning(prompts)
        if not self.method.compares:
            errors = self.errors(conditioning, both[:1], noise, t)
            losses = importance * self.weights[t].to(errors) * errors[0]
            self.end_micro_batch(prompts, {"loss": losses.detach().mean()}, loss=losses.detach())
            return losses.mean()
        with torch.no_grad(), self.model.reference():
            base = self.errors(conditioning, both, noise, t)
        change = self.errors(conditioning, both, noise, t) - base
        return self.compared(prompts, samples, change, t, labels, importance)

    def compared(
        self, prompts: list[str], samples: list[int], change: Tensor, t: Tensor, labels: Tensor, importance: Tensor
    ) -> Tensor:
        """The loss of pairs whose errors have changed by ``change``, ``Δ^w`` and ``Δ^l`` ``(2, B)``, at ``t``."""
        weights = self.weights[t]
        above = self.corrections.above(t) if self.corrections is not None else torch.zeros_like(weights)
        argument = -self.method.scale * (weights.to(change) * (change[0] - change[1]) + above.to(change))
        share = preferred_share(labels.to(change), self.pairs.label_smoothing)
        losses = importance * pair_loss(argument, share)
        with torch.no_grad():
            gradient = importance * pull(argument, share).abs() * self.method.scale * weights.to(change)
            figures = {
                "loss": losses.mean(),
                "implicit_accuracy": (argument > 0).float().mean() + 0.5 * (argument == 0).float().mean(),
                "implicit_margin": argument.mean(),
                "winner_error": change[0].mean(),
                "loser_error": change[1].mean(),
                "gradient_weight": gradient.mean(),
            }
            measured = torch.stack([t.to(change), *change, gradient]).cpu().double()
        # float32 holds no sample's index beyond 2^24
        self._rows.append(torch.cat([torch.tensor([samples], dtype=torch.float64), measured]).T)
        self.end_micro_batch(prompts, figures, loss=losses.detach())
        return losses.mean()

    def draw(self, generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
        """``t`` ``(B,)``, evenly of :attr:`range`, and noise ``(B, *latent)``: a pair's two pictures share both."""
        shape = self.calls.latent_shape
        first, end = self.range
        drawn = [(torch.randint(first, end, (), generator=g), torch.randn(shape, generator=g)) for g in generators]
        t, noise = (torch.stack(values).to(self.device) for values in zip(*drawn, strict=True))
        return t, noise

    def errors(self, conditioning: Conditioning, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``d`` of ``latents`` ``(P, B, *latent)``, in one call of the network; ``(P, B)``."""
        levels, copies = self.calls.levels, len(latents)
        clean, noise, t = latents.flatten(0, 1), torch.cat([noise] * copies), t.repeat(copies)
        noisy = levels.noised(clean, noise, t)
        prediction = self.calls.predict(conditioning, noisy, t)
        return levels.error(clean, noise, prediction, t).unflatten(0, (copies, -1))

    @torch.no_grad()
    def latents(
        self, batch: dict[str, Any], samples: list[int], generators: list[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        """Latents ``(B, 2, *latent)`` of the pairs and their labels ``(B, 2)``."""
        if self.pairs.pairs == "online":
            return self._online(batch["prompts"], samples)
        both = [g for g in generators for _ in range(2)] if self.pairs.vae_sample else None
        given, shape = batch.get("moments"), self.calls.latent_shape
        if given is not None:
            latents = from_moments(self.model, given.flatten(0, 1), both, latent_shape=shape)
        else:
            latents = encode(self.model, batch["pictures"].flatten(0, 1), both, latent_shape=shape)
        return latents.unflatten(0, (-1, 2)), batch["labels"]

    def _online(self, prompts: list[str], samples: list[int]) -> tuple[Tensor, Tensor]:
        """Two pictures of each prompt by the model as it stands, and which of them the reward prefers."""
        keys = [("online", self.seed, self.global_step, index) for index in samples]
        inputs = self.model.inputs(prompts, **vars(self.sampling))
        latents, scores = [], []
        was_training = self.model.denoiser.training
        self.model.denoiser.eval()
        for place in (0, 1):
            generators = [torch.Generator().manual_seed(key_to_seed(*key, place)) for key in keys]
            pictures, finished = sample_with_latents(self.model, generators, inputs, self.decode_micro_batch_size)
            latents.append(finished)
            scores.append(self.scores(pictures, prompts)[0])
        self.model.denoiser.train(was_training)
        ahead = torch.sign(scores[0] - scores[1])
        noise = self.pairs.self_made.label_noise
        wrong = [random.Random(key_to_seed("label", *key[1:])).random() < noise for key in keys]
        ahead = torch.where(torch.tensor(wrong, device=ahead.device), -ahead, ahead)
        return torch.stack(latents, 1), torch.stack([(1 + ahead) / 2, (1 - ahead) / 2], 1)

    # Lightning's hooks

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if not self.method.compares:
            return
        rows = self._of_all_processes()
        if all(map(math.isfinite, (value for row in rows for value in row))):
            if self.corrections is not None:
                self.corrections.learn((int(t), winner, loser) for _, t, winner, loser, _ in rows)
            for _, t, _, _, weight in rows:
                self.weight_by_level[int(t) * BINS // self.calls.levels.size] += torch.tensor([1.0, weight]).double()
            self._errors.append((self.last_metrics["winner_error"], self.last_metrics["loser_error"]))
        if not self._warned and both_rise(*zip(*self._errors, strict=True)) and self.trainer.is_global_zero:
            self._warned = True
            log.warning(
                "step %d: the tuned model denoises winners and losers alike worse than the base model, and worse over "
                "the last %d steps than over those before: the known disease of learning from preferences. A smaller "
                "model.optim.lr, a larger model.%s.beta, or an earlier checkpoint may help",
                self.global_step,
                WINDOW,
                self.method.option,
            )

    def _of_all_processes(self) -> list[list[float]]:
        """The rows of the global batch, each once, in the order of its samples: the same whatever the layout."""
        found: dict[float, list[float]] = {}
        for rows in gather(torch.cat(self._rows).tolist()):  # processes that share a sample say nearly the same
            for row in rows:
                found.setdefault(row[0], row)
        self._rows = []
        return [found[sample] for sample in sorted(found)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[_STATE] = {"weight_by_level": self.weight_by_level.clone()}
        if self.corrections is not None:
            checkpoint[_STATE]["corrections"] = self.corrections.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        state = checkpoint.get(_STATE, {})  # none of a run by rewards that goes on with pairs
        if "weight_by_level" in state:
            self.weight_by_level = state["weight_by_level"].to("cpu", torch.float64)
        if self.corrections is not None and "corrections" in state:
            self.corrections.load_state_dict(state["corrections"])
