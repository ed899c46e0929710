"""A CLIP that learns which of two pictures is preferred: PickScore's training (Kirstain et al., arXiv 2305.01569).

A datum's way: shard → two pictures and a prompt → two scores ``exp(logit_scale)·cos`` → softmax over the two →
Kullback-Leibler divergence from the label (:mod:`.loss`) → gradients of the parts that are trained → optimizer.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from nemo_aligner_diffusion.data.preferences.reward_pairs import PreferenceBatch
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.parallel.module import OptimizerFactory, ParallelModule
from nemo_aligner_diffusion.parallel.non_finite import NonFinitePolicy
from nemo_aligner_diffusion.parallel.parallelism import Parallelism
from nemo_aligner_diffusion.reward_training.configuration import TrainedParts
from nemo_aligner_diffusion.reward_training.evaluate import preference_figures
from nemo_aligner_diffusion.reward_training.loss import correct, decided, preference_loss
from nemo_aligner_diffusion.rewards.base import unit_length
from nemo_aligner_diffusion.rewards.clip.reward import CLIPReward

MAX_LOGIT_SCALE = math.log(100.0)  # as in CLIP (Radford et al., 2021, section 2.5): beyond it training is unstable


def choose_trained_parts(model: Any, parts: TrainedParts) -> None:
    """Set ``requires_grad`` of every parameter of a :class:`transformers.CLIPModel`.

    Raises:
        ConfigurationError: more layers are asked for than there are, or nothing is left to train.
    """
    model.requires_grad_(False)
    towers = (
        ("vision", model.vision_model, model.vision_model.post_layernorm, parts.vision.trained_layers),
        ("text", model.text_model, model.text_model.final_layer_norm, parts.text.trained_layers),
    )
    for name, tower, norm, layers in towers:
        if layers is None:
            tower.requires_grad_(True)
        elif layers > len(tower.encoder.layers):
            raise ConfigurationError(
                f"model.{name}.trainable_layers = {layers}: the {name} tower has {len(tower.encoder.layers)} layers; "
                "null trains all of it"
            )
        elif layers > 0:
            tower.encoder.layers[-layers:].requires_grad_(True)
            norm.requires_grad_(True)
    model.visual_projection.requires_grad_(parts.projections)
    model.text_projection.requires_grad_(parts.projections)
    model.logit_scale.requires_grad_(parts.logit_scale)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigurationError(
            "nothing to train: set model.vision.freeze=false, model.text.freeze=false, model.projections=true or "
            "model.logit_scale=true"
        )


class PreferenceCLIP(ParallelModule):
    """Train the CLIP inside a reward on preference pairs.

    Args:
        reward: its ``model`` is trained in place; what it computes is what the finished reward computes.
        parts: what is trained.
        optimizer_factory, guard, parallel: see :class:`.ParallelModule`; the CLIP is whole on every process.
        activation_checkpointing: recompute each transformer layer in the backward pass.
    """

    def __init__(
        self,
        reward: CLIPReward,
        parts: TrainedParts,
        optimizer_factory: OptimizerFactory,
        *,
        activation_checkpointing: bool = False,
        guard: NonFinitePolicy | None = None,
        parallel: Parallelism | None = None,
    ) -> None:
        super().__init__(optimizer_factory, guard, parallel)
        self.reward = reward
        self.parts = parts
        choose_trained_parts(reward.model, parts)
        clip: Any = reward.model
        self.text_is_trained = any(
            parameter.requires_grad
            for module in (clip.text_model, clip.text_projection)
            for parameter in module.parameters()
        )
        self.activation_checkpointing = activation_checkpointing
        if activation_checkpointing:
            clip.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.last_metrics: dict[str, float] = {}
        self.last_validation: dict[str, float] = {}
        self._sums = torch.zeros(4)  # over the running optimizer step: loss, correct, decided, pairs
        self._step_started = 0.0
        self._validated: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores ``(B, 2)`` of pairs ``(B, 2, 3, S, S)`` with their prompts; differentiable in what is trained."""
        pairs = len(images)
        image_embeddings = self.embed_images(images.flatten(0, 1)).view(pairs, 2, -1)
        text_embeddings = self.embed_texts(prompts)
        cosine = (image_embeddings * text_embeddings[:, None].to(image_embeddings.dtype)).sum(dim=-1)
        return self.reward.model.logit_scale.to(cosine.dtype).exp() * cosine

    def embed_images(self, images: Tensor) -> Tensor:
        """Embeddings ``(N, D)`` of length 1 of images ``(N, 3, H, W)`` in ``[0, 1]``."""
        reward, clip = self.reward, self.reward.model
        pooled = clip.vision_model(pixel_values=reward.preprocessing(images).to(reward.dtype)).pooler_output
        return unit_length(clip.visual_projection(pooled))

    def embed_texts(self, prompts: list[str]) -> Tensor:
        """Embeddings ``(B, D)`` of length 1; computed once for each prompt where the text side is frozen."""
        reward, clip = self.reward, self.reward.model
        if not self.text_is_trained:
            return reward.embed_texts(prompts)
        tokens = [reward.tokenize(prompt) for prompt in prompts]
        longest = max(map(len, tokens))
        # The tower is causal and pools at the first end-of-text token: more of them behind it change nothing.
        padded = [ids + [ids[-1]] * (longest - len(ids)) for ids in tokens]
        pooled = clip.text_model(input_ids=torch.tensor(padded, device=self.device)).pooler_output
        return unit_length(clip.text_projection(pooled))

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        labels = batch["labels"]
        if not self._prompts:
            self._step_started, self._sums = time.perf_counter(), torch.zeros(4, device=labels.device)
        scores = self(batch["images"], batch["prompts"])
        loss = preference_loss(scores.float(), labels)
        sure = decided(labels)
        right = correct(scores.detach(), labels) * sure
        self._sums += torch.stack([loss.detach().sum(), right.sum(), sure.sum(), torch.ones_like(loss).sum()])
        self._prompts += batch["prompts"]
        return loss.mean() * torch.where(torch.isfinite(loss).all(), 1.0, float("nan"))  # as ParallelModule wants it

    def trainable_parameters(self) -> list[tuple[str, Parameter]]:
        return [(name, p) for name, p in self.reward.model.named_parameters() if p.requires_grad]

    def step_values(self) -> dict[str, Any]:
        return {"loss": self._sums[0]}

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            self.parallel.apply(self.device_mesh, [self.reward.model], {})

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.parts.logit_scale:
            with torch.no_grad():
                self.reward.model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        self._finish_step()

    def _finish_step(self) -> None:
        loss, right, sure, pairs = self.trainer.strategy.reduce(self._sums, reduce_op="sum").tolist()
        self.last_metrics = {
            "loss": loss / pairs,
            "accuracy": right / sure if sure else float("nan"),
            "ties": pairs - sure,
            "grad_norm": self._grad_norm,
            "logit_scale": float(self.reward.model.logit_scale.detach().exp()),
            "images": 2 * pairs,
            "seconds": time.perf_counter() - self._step_started,
        }
        self._prompts = []

    def on_train_epoch_end(self) -> None:
        self._prompts = []  # micro-batches that no optimizer step followed

    def on_train_start(self) -> None:
        # recomputation asks for training mode; otherwise a CLIP has no dropout worth having on a few pairs
        self.reward.model.train(self.activation_checkpointing)

    def on_train_end(self) -> None:
        self.reward.text_rows.clear()  # what it holds may be the embeddings of untrained weights

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        scores = self(batch["images"], batch["prompts"]).float()
        self._validated.append((scores, batch["labels"], batch["counts"]))

    def on_validation_epoch_end(self) -> None:
        scores, labels, counts = (torch.cat(parts) for parts in zip(*self._validated, strict=True))
        if self.trainer.world_size > 1:
            scores, labels, counts = (gathered.flatten(0, 1) for gathered in self.all_gather([scores, labels, counts]))
        figures = preference_figures(scores[counts].cpu(), labels[counts].cpu())
        self.last_validation = {
            name: getattr(figures, name) for name in ("loss", "accuracy", "calibration_error", "pairs", "ties")
        }
        self.validated_step = self.global_step
        self._validated = []
        for name in ("loss", "accuracy"):  # what early stopping may look at
            # the same on all ranks already; but Lightning warns where it is not told to make it so
            self.log(f"val_{name}", self.last_validation[name], logger=False, sync_dist=self.trainer.world_size > 1)
