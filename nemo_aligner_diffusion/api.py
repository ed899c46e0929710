"""Fine-tuning from a program or a notebook: :func:`tune`, whose objects and defaults are the command line's."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch

from nemo_aligner_diffusion.algorithms.base import Method, TrainingMethod
from nemo_aligner_diffusion.algorithms.custom import CustomMethod
from nemo_aligner_diffusion.algorithms.registry import methods
from nemo_aligner_diffusion.config.families import family_of
from nemo_aligner_diffusion.config.load import load_settings
from nemo_aligner_diffusion.config.recipes import groups, recipes
from nemo_aligner_diffusion.config.words import quoted
from nemo_aligner_diffusion.data.paths import expand_paths
from nemo_aligner_diffusion.data.prompt_files import clean_prompt
from nemo_aligner_diffusion.diffusion.families import DENOISERS
from nemo_aligner_diffusion.diffusion.recognition import of_pipeline
from nemo_aligner_diffusion.errors import ConfigurationError, DataError, RewardError
from nemo_aligner_diffusion.import_path import check_call
from nemo_aligner_diffusion.keys import closest
from nemo_aligner_diffusion.rewards.augmentation import Augmentation
from nemo_aligner_diffusion.rewards.base import Reward
from nemo_aligner_diffusion.rewards.settings import RewardSettings
from nemo_aligner_diffusion.rewards.support.augmented import augmented
from nemo_aligner_diffusion.rewards.support.custom import CustomReward
from nemo_aligner_diffusion.runtime.messages import with_quiet_libraries
from nemo_aligner_diffusion.runtime.signals import Interrupted, Interruption
from nemo_aligner_diffusion.training.run import Given, train
from nemo_aligner_diffusion.training.settings import ModelSettings, RunSettings
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
        recipe, own_method, words = _read_method(method)
        pipe, model_words = _read_model(model)
        own_reward, reward_words = _read_reward(reward)
        words += [*model_words, *reward_words, f"exp_manager.explicit_log_dir={_written(str(folder))}"]
        words.append("exp_manager.requeue_on_preemption=false")
        if output is None:
            words += ["exp_manager.create_tensorboard_logger=false", "report.enable=false"]
            if validation_prompts is None:
                words.append(f"trainer.{recipe}.val_check_interval=0")
        if isinstance(prompts, str | os.PathLike):
            _check_paths(prompts)
            words.append(f"model.data.train.webdataset.local_root_path={_written(os.fspath(prompts))}")
        elif prompts is not None:
            files["prompts.txt"] = _read_prompts(prompts, "prompts")
            words.append(f"model.data.train.webdataset.local_root_path={_written(str(folder / 'prompts.txt'))}")
        if validation_prompts is not None:
            texts = files["validation_prompts.txt"] = _read_prompts(validation_prompts, "validation_prompts")
            words.append(f"model.data.validation.max_prompts={len(texts)}")
            place = _written(str(folder / "validation_prompts.txt"))
            words.append(f"model.data.validation.webdataset.local_root_path={place}")
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
        if "prompts.txt" in files and run.reads_pairs(own_method or run.method()):
            raise ConfigurationError(
                f"method={run.model.algorithm} learns from pairs of pictures, and prompts is a list of texts: give a "
                "folder of preference shards as prompts (docs/reward_training.md), or overrides="
                '["model.preference.pairs=online"]: the model draws pairs, the reward prefers one'
            )
        if pipe is not None:
            _check_pipeline(pipe, run.model)
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
    batch_size = settings["batch_size"][1]
    if isinstance(batch_size, int) and batch_size > 0 and not any("micro_batch_size=" in word for word in overrides):
        usual = load_settings(recipe, [*words, *overrides], fetch=True).model.micro_batch_size
        size = next(size for size in range(min(usual, batch_size), 0, -1) if batch_size % size == 0)
        words.append(f"model.micro_batch_size={size}")
    words += [f"{key}={_written(value)}" for key, value in chosen.values()]
    try:
        run = load_settings(recipe, [*words, *overrides], fetch=True)
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


def _read_method(method: Method | str) -> tuple[str, Method | None, list[str]]:
    """Recipe, the method itself where the configuration cannot make it, and words of the command line."""
    known = methods()
    kind = known["draft"]  # its recipe has what every method reads, and nothing of one's own
    own, words = None, []
    if isinstance(method, str) and ":" in method:
        words = [f"model.algorithm={quoted(method)}"]
    elif isinstance(method, str):
        spelt = method.lower().replace("-", "_")
        named = [one for one in known.values() if spelt in (one.name, one.option)]
        if not named:
            raise ConfigurationError(
                f"method={method!r}: no such method{closest(method, known)}; there are {', '.join(known)}"
            )
        kind = named[0]
    elif isinstance(method, TrainingMethod) and known.get(method.name) is type(method):
        kind = type(method)
        words = [f"{key}={_written(getattr(method, field))}" for field, key in method.keys().items()]
    elif inspect.isclass(method) or not (isinstance(method, Method) or callable(method)):
        hint = f"; a class was given: {method.__name__}()" if inspect.isclass(method) else ""
        raise ConfigurationError(
            f"method={method!r}: expected a method such as DRTune(train_steps=4), its name, or a rule "
            f"(path, rng) -> Plan{hint}"
        )
    else:
        name = _name(method)
        own, words = CustomMethod(method, f"method={name}"), [f"model.algorithm={quoted(name)}"]
    recipe = {"draft_plus": "draftp"}.get(kind.option, kind.option) + "_sd"
    if recipe not in recipes():
        recipe, words = "draftp_sd", [f"algorithm={kind.option}", *words]
    return recipe, own, words


def _read_model(model: Any) -> tuple[Any, list[str]]:
    if model is None:
        return None, []
    if isinstance(model, str | os.PathLike):
        return None, [f"model.from_pretrained={quoted(os.fspath(model))}"]
    if not isinstance(model, diffusers.DiffusionPipeline):
        raise ConfigurationError(
            f"model is a {type(model).__name__}; expected a diffusers pipeline, its folder or hub id, or None"
        )
    device: torch.device = model.device  # type: ignore[attr-defined]
    family, because = family_of(of_pipeline(type(model).__name__, lambda part: getattr(model, part).config))
    words = [f"family={family}", f"model.family_because={quoted(because)}"]
    return model, [*words, f"trainer.devices=[{device.index}]"] if device.type == "cuda" and device.index else words


def _check_pipeline(pipe: Any, section: ModelSettings) -> None:
    """What is known to be wrong about a pipeline object before anything of it is changed."""
    for path in (section.from_pretrained, section.denoiser_path, section.vae_path, section.text_path):
        if path is not None:
            raise ConfigurationError(f"overrides name {path!r}, but model is a pipeline already; load it into that")
    networks = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    for name, part in networks.items():
        if any(hasattr(module, "_hf_hook") for module in part.modules()):
            raise ConfigurationError(
                f"the pipeline's {name} is off-loaded or spread by accelerate; call pipeline.remove_all_hooks(), or "
                "load it without enable_model_cpu_offload and device_map"
            )
        adapters: dict[str, Any] = getattr(part, "peft_config", {})
        if adapters:
            raise ConfigurationError(
                f"the pipeline's {name} has the adapter {next(iter(adapters))!r} already: a base model to tune "
                "from is needed; load it anew, or make the adapter part of it by pipeline.fuse_lora() and "
                "pipeline.unload_lora_weights()"
            )
    if not section.peft.is_lora:
        for name in (name for name in DENOISERS if name in networks):
            if networks[name].dtype in (torch.float16, torch.bfloat16):
                raise ConfigurationError(
                    f"every_weight=True with a pipeline whose {name} is in {networks[name].dtype}, too coarse for an "
                    "optimizer's steps: load it with torch_dtype=torch.float32, or train an adapter"
                )


def _read_reward(reward: Any) -> tuple[Reward | None, list[str]]:
    """The reward itself where it is an object, and words of the command line."""
    if isinstance(reward, os.PathLike) or (isinstance(reward, str) and reward.endswith(".nemo")):
        return None, [f"rm.model.restore_from_path={quoted(os.fspath(reward))}"]
    if isinstance(reward, str):
        names = groups()["rm"]
        if ":" in reward:
            return None, ["rm=custom", f"rm.import_path={quoted(reward)}"]
        if reward not in names:
            raise RewardError(
                f"reward={reward!r}: no such reward{closest(reward, names)}; expected a function, a .nemo file, or one "
                f"of {', '.join(names)}"
            )
        return None, [f"rm={reward}"]
    if isinstance(reward, RewardSettings):
        reward = reward.build()
    if inspect.isclass(reward):
        raise RewardError(f"reward={reward.__name__} is a class; expected an object of it: {reward.__name__}(…)")
    if not callable(reward):
        raise RewardError(
            f"reward={reward!r:.80}: expected a function (images, prompts) -> one score for each picture, a Reward, a "
            ".nemo file or a name"
        )
    name = _name(reward)
    origin = f"reward={name.rpartition('.')[2] if '<locals>' in name else name.partition(':')[2]}"
    if inspect.isroutine(reward):
        check_call(reward, {}, origin, "", ("images", "prompts"), RewardError)
    return CustomReward(reward, origin), ["rm=custom", f"rm.import_path={quoted(name)}"]


def _check_paths(prompts: str | os.PathLike[str]) -> None:
    try:
        expand_paths(prompts)
    except DataError as error:
        hint = f"; prompts themselves come in a list: prompts=[{str(prompts)!r}]"
        raise DataError(f"prompts: {error}{hint}") from error


def _read_prompts(prompts: Any, argument: str) -> list[str]:
    """The prompts of a list as lines of a file."""
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        raise DataError(f"{argument} is a {type(prompts).__name__}; expected a list of prompts")
    texts = list(prompts)
    if not texts:
        raise DataError(f"{argument}=[] has no prompt; expected one at least")
    lines = []
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"{argument}[{number}] is a {type(text).__name__} ({text!r:.80}); expected a string")
        try:
            lines.append(clean_prompt(re.sub(r"\s*[\r\n]\s*", " ", text.strip("\r\n"))))
        except ValueError as error:
            raise DataError(f"{argument}[{number}] {error}") from error
    return lines


def _name(thing: Any) -> str:
    """``module:name``, of an object its class's."""
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}:{named.__qualname__}"


def _written(value: Any) -> str:
    """As the command line writes it."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_written, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
