"""Fine-tuning from a program or a notebook: :func:`tune`, whose objects and defaults are the command line's."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch

from nemo_aligner_diffusion.algorithms.base import Method
from nemo_aligner_diffusion.config.load import load_settings
from nemo_aligner_diffusion.errors import ConfigurationError, DataError
from nemo_aligner_diffusion.rewards.augmentation import Augmentation
from nemo_aligner_diffusion.rewards.base import Reward
from nemo_aligner_diffusion.rewards.support.augmented import augmented
from nemo_aligner_diffusion.runtime.messages import with_quiet_libraries
from nemo_aligner_diffusion.runtime.signals import Interrupted, Interruption
from nemo_aligner_diffusion.training.run import Given, train
from nemo_aligner_diffusion.training.settings import RunSettings
from nemo_aligner_diffusion.tune_arguments import (
    check_pipeline,
    read_method,
    read_model,
    read_prompt_argument,
    read_reward,
    written,
)
from nemo_aligner_diffusion.tuned import Tuned

RewardFunction = Callable[[torch.Tensor, Sequence[str]], torch.Tensor]


def tune(
    model: str | os.PathLike[str] | diffusers.DiffusionPipeline | None = None,
    *,
    reward: RewardFunction | Reward | str | os.PathLike[str],
    prompts: Sequence[str] | str | os.PathLike[str] | None = None,
    method: Method | str = "draft+",
    steps: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    kl_coeff: float | None = None,
    guidance_scale: float | None = None,
    inference_steps: int | None = None,
    seed: int | None = None,
    lora_rank: int | None = None,
    every_weight: bool = False,
    validation_prompts: Sequence[str] | None = None,
    validation_seeds: Sequence[int] | None = None,
    output: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    progress: bool = True,
) -> Tuned:
    """Fine-tune a text-to-image pipeline by the gradient of a reward, in this process, and give back what was tuned.

    What is ``None`` is as the method's recipe on the command line has it (``docs/configuration.md``); the same settings
    give the same run, digit for digit. Ctrl-C ends the run after the step under way and returns what was learnt until
    then; a second one stops at once. Nothing of the caller's is changed but the pipeline: no random state, logging
    level, signal handler or default of torch.

    Args:
        model: a ``diffusers`` folder or hub id; a pipeline, *which is itself tuned* (its networks are frozen, its
            denoiser gets a LoRA adapter in float32, or with ``every_weight`` new weights; its scheduler stays; it moves
            to the GPU if there is one; an error takes the adapter off again); ``None``: the embedded 64×64 model.
        reward: a function ``(images (B, 3, H, W) in [0, 1], prompts) -> scores (B,)``, differentiable in the images,
            higher is better; lambdas will do. Or a :class:`.Reward` or ``nn.Module``, which is frozen; a ``.nemo``
            file; the name of one of ours (``"symmetry"``, ``"clip"``, …), its settings in ``overrides``.
        prompts: a list of prompts, or a path to shards or a text file (``docs/data.md``); ``None``: the embedded ones.
        method: an object such as ``DRTune(train_steps=4)``, or a name such as ``"drtune"``.
        steps: *optimizer* steps. Sampling steps are ``inference_steps``.
        batch_size: pictures an optimizer step; handled so many at once as the recipe's ``model.micro_batch_size``
            allows.
        lr: learning rate.
        kl_coeff: weight of the distance to the base model's predictions; 0: none.
        guidance_scale, inference_steps: how pictures are sampled, here and in :meth:`.Tuned.compare`.
        seed: of the adapter's start, noise, prompts' order and plans.
        lora_rank: of the adapter.
        every_weight: train all of the denoiser in place of an adapter; a frozen copy of it is kept.
        validation_prompts, validation_seeds: validate with them during the run; ``None``: with ``output`` as the
            command line does, else not at all.
        output: the run directory, as the command line leaves it, with checkpoints, export and report; ``None``: a
            temporary one with the figures only.
        overrides: anything else, in the command line's words: ``["sched=constant", "rm.augment.views=2"]``.
        progress: show step, reward, KL and time left.

    Raises:
        AlignerError: an argument, file, reward or override cannot be used; one message, before the first step if it
            can be known by then.
        KeyboardInterrupt: Ctrl-C before the first step.

    Example::

        result = tune(reward=lambda images, prompts: images[:, 0].mean((1, 2)), prompts=["a red fox"], steps=20)
        result.compare(["a red fox"], seeds=[0, 1]).save("before_after.png")
    """
    files: dict[str, list[str]] = {}  # of prompts that come as a list
    with contextlib.ExitStack() as temporary:
        if output is None:
            folder = Path(temporary.enter_context(tempfile.TemporaryDirectory(prefix="nad-")))
        else:
            folder = Path(output).expanduser().absolute()
        recipe, own_method, words = read_method(method)
        pipe, model_words = read_model(model)
        own_reward, reward_words = read_reward(reward)
        words += [*model_words, *reward_words, f"exp_manager.explicit_log_dir={written(str(folder))}"]
        words.append("exp_manager.requeue_on_preemption=false")
        if output is None:
            words += ["exp_manager.create_tensorboard_logger=false", "report.enable=false"]
            if validation_prompts is None:
                words.append(f"trainer.{recipe}.val_check_interval=0")
        for use, given in (("train", prompts), ("validation", validation_prompts)):
            if given is None:
                continue
            argument = "prompts" if use == "train" else "validation_prompts"
            texts = read_prompt_argument(given, argument)
            if isinstance(texts, list):
                files[f"{argument}.txt"] = texts
                texts = str(folder / f"{argument}.txt")
            elif use == "validation":
                raise DataError(f"validation_prompts={given!r}: expected a list of prompts")
            words.append(f"model.data.{use}.webdataset.local_root_path={written(texts)}")
        if validation_prompts is not None:
            words.append(f"model.data.validation.max_prompts={len(files['validation_prompts.txt'])}")
        if every_weight:
            if lora_rank is not None:
                raise ConfigurationError(f"every_weight=True with lora_rank={lora_rank}: expected one of them")
            words.append("peft=none")
        settings = {
            "steps": (f"trainer.{recipe}.max_steps", steps),
            "batch_size": ("model.global_batch_size", batch_size),
            "lr": ("model.optim.lr", lr),
            "kl_coeff": ("model.kl_coeff", kl_coeff),
            "guidance_scale": ("model.infer.unconditional_guidance_scale", guidance_scale),
            "inference_steps": ("model.infer.inference_steps", inference_steps),
            "seed": ("model.seed", seed),
            "lora_rank": ("model.peft.lora_tuning.adapter_dim", lora_rank),
            "validation_seeds": ("model.data.validation.seeds", validation_seeds),
        }
        run = _load(recipe, words, settings, overrides)
        if pipe is not None:
            check_pipeline(pipe, run.model)
        if own_reward is not None:
            own_reward = augmented(own_reward, Augmentation(**(run.rm.get("augment") or {})))
        interruption = Interruption((signal.SIGINT,), then="" if output is None else ", then export and report")
        objects = Given(pipe, own_reward, own_method, files, silent=not progress, keep=output is not None)
        try:
            with _callers_state(), with_quiet_libraries():
                ended = train(run, interruption, objects)
        except BaseException as error:
            _take_adapter_off(pipe)
            if isinstance(error, Interrupted):
                raise KeyboardInterrupt("interrupted before the first step: nothing was learnt") from None
            raise
        return Tuned(ended, interrupted=interruption.requested is not None, release=temporary.pop_all().close)


def _load(recipe: str, words: list[str], settings: dict[str, tuple[str, Any]], overrides: Sequence[str]) -> RunSettings:
    """The configuration; a batch that is no multiple of the recipe's micro-batch is handled in smaller ones."""
    if isinstance(overrides, str):
        raise ConfigurationError(f"overrides={overrides!r} is one text; expected a list of them: [{overrides!r}]")
    chosen = {argument: (key, value) for argument, (key, value) in settings.items() if value is not None}
    words = [*words, *(f"{key}={written(value)}" for key, value in chosen.values())]
    batch_size = settings["batch_size"][1]
    if isinstance(batch_size, int) and batch_size > 0 and not any("micro_batch_size=" in word for word in overrides):
        usual = load_settings(recipe).model.micro_batch_size
        size = next(size for size in range(min(usual, batch_size), 0, -1) if batch_size % size == 0)
        words.append(f"model.micro_batch_size={size}")
    try:
        run = load_settings(recipe, [*words, *overrides])
    except ConfigurationError as error:
        told = str(error)
        for argument, (key, _) in chosen.items():
            told = told.replace(f"{key} = ", f"{argument} ({key}) = ")
        raise ConfigurationError(told) from None
    if run.trainer.world_size > 1:
        raise ConfigurationError(
            f"tune works in one process, but trainer.devices × trainer.num_nodes = {run.trainer.world_size}; for "
            "several use the command line"
        )
    return run


def _take_adapter_off(pipe: Any) -> None:
    """What failed can be tried again."""
    for part in pipe.components.values() if pipe is not None else ():
        if getattr(part, "peft_config", None):
            part.unload_lora()


@contextlib.contextmanager
def _callers_state() -> Iterator[None]:
    """Random generators, gradient mode and torch's defaults are the caller's again afterwards."""
    dtype = torch.get_default_dtype()
    here = torch.cuda.current_device() if torch.cuda.is_available() else None
    devices = list(range(torch.cuda.device_count())) if here is not None else []
    try:
        with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(dtype)
        if here is not None:
            torch.cuda.set_device(here)
