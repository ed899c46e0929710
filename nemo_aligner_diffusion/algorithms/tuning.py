"""A denoiser that is tuned, by whatever it learns from: what all such modules do around their training step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from nemo_aligner_diffusion.algorithms.picture_validation import PictureValidation
from nemo_aligner_diffusion.diffusion.generate import Sampling
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.diffusion.network.compiled import Compiled
from nemo_aligner_diffusion.diffusion.network.rollout_network import fast_in_bf16, rollout_network_of
from nemo_aligner_diffusion.diffusion.trajectory import check_repeatable
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.parallel.module import OptimizerFactory
from nemo_aligner_diffusion.parallel.non_finite import NonFinitePolicy
from nemo_aligner_diffusion.parallel.parallelism import Parallelism
from nemo_aligner_diffusion.rewards.base import Reward

log = logging.getLogger(__name__)

_Self = TypeVar("_Self", bound="DenoiserTuning")


class DenoiserTuning(PictureValidation):
    """A module whose ``training_step`` is a subclass's, between :meth:`begin_micro_batch` and :meth:`end_micro_batch`.

    Args:
        model, reward, sampling, decode_micro_batch_size, optimizer_factory, guard, parallel: see
            :class:`.PictureValidation`.
        seed: of all draws; a run is a function of it, whatever the layout.
        rollout_precision: of the steps without gradient: see :class:`.RolloutNetwork`; ``auto``: ``bf16`` where that is
            fast; ``None``: they are the trained network's own.
        rollout_options: what else is asked of that copy: see :class:`.RolloutNetwork`.
        replay_compile: mode of ``torch.compile`` for the steps with gradient; ``None``: they are not compiled.

    Attributes:
        counted: what its samples are, the name of their count.
        reports: names of the figures that a step has: which columns ``metrics.csv`` begins with.
        shown: those of them that the progress line shows, and the words for them.
        starts_with: what the first step does before and in its backward pass, for the start-up's line.
        reward_is: what the line of a validation calls the reward.
        last_metrics: figures of the last optimizer step, means over micro-batches and ranks, for ``metrics.csv``.
    """

    counted: ClassVar[str] = "images"
    reports: tuple[str, ...] = ()
    shown: ClassVar[Mapping[str, str]] = {}
    starts_with: ClassVar[tuple[str, str]] = ("first rollout", "first replay")
    reward_is: str = "reward"

    def __init__(
        self,
        model: DiffusionModel,
        reward: Reward,
        sampling: Sampling,
        optimizer_factory: OptimizerFactory,
        *,
        decode_micro_batch_size: int | None = None,
        seed: int = 0,
        rollout_precision: str | None = None,
        rollout_options: Mapping[str, Any] | None = None,
        replay_compile: str | None = None,
        guard: NonFinitePolicy | None = None,
        parallel: Parallelism | None = None,
    ) -> None:
        super().__init__(model, reward, sampling, decode_micro_batch_size, optimizer_factory, guard, parallel)
        self.seed = seed
        self.rollout_precision, self.rollout_options = rollout_precision, dict(rollout_options or {})
        self.replay_compile = replay_compile
        self.last_metrics: dict[str, float] = {}
        self._micro_batches: list[dict[str, Tensor]] = []  # figures of the micro-batches of the running optimizer step
        self._values: list[dict[str, Tensor]] = []  # what the guard looks at, of each
        self._step_started = 0.0
        self._gradients_checked = False

    def begin_micro_batch(self) -> None:
        if not self._micro_batches:
            self._step_started = time.perf_counter()
            self.model.offload.release()
            for _, parameter in self.trained:  # Lightning frees them before the backward pass only
                parameter.grad = None
            if self.model.rollout_network is not None:
                self.parallel.reshard()  # what a call before has left gathered is no piece that the copy has
                self.model.rollout_network.refresh()

    def end_micro_batch(self, prompts: list[str], figures: Mapping[str, Tensor], **values: Tensor) -> None:
        """Keep what ``metrics.csv`` and the guard are told.

        Args:
            prompts: of the ``B`` samples.
            figures: name -> a number, the mean over the samples; ``images``, how many were made, is ``B`` unless given.
            values: name -> ``(B,)``, each of which must be finite.
        """
        count = torch.tensor(float(len(prompts)), device=self.device)
        self._micro_batches.append({self.counted: count, **figures})
        self._prompts += prompts
        self._values.append(values)

    def step_values(self) -> dict[str, Any]:
        return {name: torch.cat([values[name] for values in self._values]) for name in self._values[0]}

    def inputs_for_checks(self) -> dict[str, Any]:
        """The pipeline's arguments for one picture."""
        prompt = next(iter(self.validation_prompts), "a picture")
        return self.model.inputs([prompt], **vars(self.sampling))

    def check_pipeline(self) -> None:
        """Make a picture twice, before anything is written: see :func:`.check_repeatable`."""
        self.eval()
        check_repeatable(self.model, self.inputs_for_checks())

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        """A move takes everything along, another dtype (``trainer.precision``) not the reward: it has its own."""

        def moved(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

        super()._apply(fn, recurse=False)
        for child in self.children():
            child._apply(moved if child is self.reward else fn, recurse)
        if self.model.rollout_network is not None:
            self.model.rollout_network.network._apply(fn)
        return self

    def trainable_parameters(self) -> list[tuple[str, Parameter]]:
        return self.model.trainable_parameters()

    # Lightning's hooks

    def configure_model(self) -> None:
        """Spread the model over the processes, if there are several; before the optimizer sees its parameters."""
        mesh, model = self.device_mesh, self.model
        if model.rollout_network is None:
            fast, share = fast_in_bf16(model.device), self.parallel.holds_whole_weights
            asked = self.rollout_precision
            model.rollout_network = rollout_network_of(model.denoiser, asked, fast, share, **self.rollout_options)
            if model.rollout_network is not None:
                names = {"bf16": "bfloat16", "fp8": "float8 and bfloat16", "same": "the training's precision"}
                products = names[model.rollout_network.precision]
                log.info("steps without gradient by a copy of the %s, products in %s (model.rollout_precision=%s)",
                         model.trained, products, self.rollout_precision)  # fmt: skip
        if self.replay_compile and model.compiled is None:
            model.compiled = Compiled(model.denoiser, self.replay_compile, "model.replay_compile")
        if mesh is not None:
            copied = None if model.rollout_network is None else model.rollout_network.network
            denoisers = [part for part in (model.denoiser, model.reference_denoiser, copied) if part is not None]
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
                f"are off, or what is learnt from does not depend on it"
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
        self.last_metrics[self.counted] *= len(self._micro_batches) * self.parallel.layout.data
        self.last_metrics["grad_norm"] = self._grad_norm
        self.last_metrics["seconds"] = time.perf_counter() - self._step_started
        self._micro_batches, self._prompts, self._values = [], [], []
