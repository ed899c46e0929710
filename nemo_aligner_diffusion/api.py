"""Fine-tuning from a program or a notebook: :func:`tune`, whose objects and defaults are the command line's."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from omegaconf import DictConfig

from nemo_aligner_diffusion.algorithms.base import Method
from nemo_aligner_diffusion.algorithms.custom import CustomMethod
from nemo_aligner_diffusion.algorithms.registry import methods
from nemo_aligner_diffusion.data.paths import expand_paths
from nemo_aligner_diffusion.data.prompt_files import clean_prompt
from nemo_aligner_diffusion.diffusion.families import DENOISERS
from nemo_aligner_diffusion.errors import ConfigurationError, DataError, RewardError
from nemo_aligner_diffusion.import_path import check_call
from nemo_aligner_diffusion.rewards.base import Reward
from nemo_aligner_diffusion.rewards.build import augmented
from nemo_aligner_diffusion.rewards.custom import CustomReward
from nemo_aligner_diffusion.training.config import groups, load_config, recipes
from nemo_aligner_diffusion.training.config_layers import closest
from nemo_aligner_diffusion.training.faults import watched
from nemo_aligner_diffusion.training.run import Given, train
from nemo_aligner_diffusion.training.run_frame import hushed, plain
from nemo_aligner_diffusion.training.schema_checks import world_size
from nemo_aligner_diffusion.training.signals import Interrupted, Interruption
from nemo_aligner_diffusion.tuned import Tuned

# arguments of tune that set one key each, in the order of the keys there
_ARGUMENTS = ("steps", "batch_size", "lr", "kl_coeff", "guidance_scale", "inference_steps", "seed", "lora_rank",
              "validation_seeds")  # fmt: skip
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
    directory = tempfile.TemporaryDirectory(prefix="nad-") if output is None else None
    folder = Path(directory.name if directory is not None else output).expanduser().absolute()  # type: ignore[arg-type]
    files: dict[str, list[str]] = {}

    def named(name: str, texts: list[str]) -> str:
        files[f"{name}.txt"] = texts
        return str(folder / f"{name}.txt")

    recipe, given_method, words = _method(method)
    words += [f"exp_manager.explicit_log_dir={_quoted(str(folder))}", "exp_manager.requeue_on_preemption=false"]
    if directory is not None:
        words += ["exp_manager.create_tensorboard_logger=false", "report.enable=false"]
        if validation_prompts is None:
            words.append(f"trainer.{recipe}.val_check_interval=0")
    pipe, model_words = _model(model)
    judge, reward_words = _reward(reward)
    words += [*model_words, *reward_words]
    if prompts is not None:
        path = _prompts(prompts, "prompts")
        path = named("prompts", path) if isinstance(path, list) else path
        words.append(f"model.data.train.webdataset.local_root_path={_quoted(path)}")
    if validation_prompts is not None:
        texts = _prompts(validation_prompts, "validation_prompts")
        if not isinstance(texts, list):
            raise DataError(f"validation_prompts={validation_prompts!r}: expected a list of prompts")
        path = named("validation_prompts", texts)
        words += [
            f"model.data.validation.webdataset.local_root_path={_quoted(path)}",
            f"model.data.validation.max_prompts={len(texts)}",
        ]
    settings = {
        f"trainer.{recipe}.max_steps": steps,
        "model.global_batch_size": batch_size,
        "model.optim.lr": lr,
        "model.kl_coeff": kl_coeff,
        "model.infer.unconditional_guidance_scale": guidance_scale,
        "model.infer.inference_steps": inference_steps,
        "model.seed": seed,
        "model.peft.lora_tuning.adapter_dim": lora_rank,
        "model.data.validation.seeds": None if validation_seeds is None else list(validation_seeds),
    }
    given_settings = {key: value for key, value in settings.items() if value is not None}
    words += [f"{key}={_written(value)}" for key, value in given_settings.items()]
    if every_weight:
        if lora_rank is not None:
            raise ConfigurationError(f"every_weight=True with lora_rank={lora_rank}: expected one of them")
        words.append("peft=none")
    if isinstance(overrides, str):
        raise ConfigurationError(f"overrides={overrides!r} is one text; expected a list of them: [{overrides!r}]")
    try:
        cfg = _load(recipe, words, overrides, batch_size)
    except ConfigurationError as error:
        told = str(error)
        for key, argument in zip(settings, _ARGUMENTS, strict=True):
            told = told.replace(f"{key} = ", f"{argument} ({key}) = ") if key in given_settings else told
        raise ConfigurationError(told) from None
    if world_size(cfg) > 1:
        raise ConfigurationError(
            f"tune works in one process, but trainer.devices × trainer.num_nodes = {world_size(cfg)}; for several use "
            "the command line"
        )
    if pipe is not None:
        _check_pipeline(pipe, cfg)
    if judge is not None:
        judge = augmented(judge, plain(cfg.rm.get("augment")) or {}, "rm")
    given = Given(pipe, judge, given_method, files, silent=not progress, keep=output is not None)
    interruption = Interruption((signal.SIGINT,), then="" if output is None else ", then export and report")
    try:
        with _callers_state(), hushed(), watched(cfg) as watch:
            ended = train(cfg, watch, interruption, given)
    except BaseException as error:
        for part in pipe.components.values() if pipe is not None else ():
            if getattr(part, "peft_config", None):  # what failed can be tried again
                part.unload_lora()
        if isinstance(error, Interrupted):
            raise KeyboardInterrupt("interrupted before the first step: nothing was learnt") from None
        raise
    return Tuned(ended, interrupted=interruption.requested is not None, temporary=directory)


def _method(method: Method | str) -> tuple[str, Method | None, list[str]]:
    """Recipe, the method itself where the configuration cannot make it, and words of the command line."""
    known = methods()
    if isinstance(method, str) and ":" not in method:
        spellings = {spelling.lower(): kind for kind in known.values()
                     for spelling in (kind.title, kind.__name__, kind.section, kind.name)}  # fmt: skip
        if method.lower() not in spellings:
            raise ConfigurationError(
                f"method={method!r}: no such method{closest(method, known)}; there are {', '.join(known)}"
            )
        recipe, words = _recipe(spellings[method.lower()].section)
        return recipe, None, words
    if isinstance(method, Method) and known.get(method.name) is type(method):
        recipe, words = _recipe(method.section)
        values = {key: getattr(method, field) for field, key in method.keys().items()}
        return recipe, None, [*words, *(f"{key}={_written(value)}" for key, value in values.items())]
    recipe, words = _recipe("draft")  # what every method reads, and nothing of one's own
    if isinstance(method, str):
        return recipe, None, [*words, f"model.algorithm={_quoted(method)}"]
    if inspect.isclass(method) or not (isinstance(method, Method) or callable(method)):
        hint = f"; a class was given: {method.__name__}()" if inspect.isclass(method) else ""
        raise ConfigurationError(
            f"method={method!r}: expected a method such as DRTune(train_steps=4), its name, or a rule "
            f"(path, rng) -> Plan{hint}"
        )
    return (
        recipe,
        CustomMethod(method, f"method={_name(method)}"),
        [*words, f"model.algorithm={_quoted(_name(method))}"],
    )


def _recipe(section: str) -> tuple[str, list[str]]:
    """The recipe of a method, or one that is turned into it."""
    name = {"draft_plus": "draftp"}.get(section, section) + "_sd"
    return (name, []) if name in recipes() else ("draftp_sd", [f"algorithm={section}"])


def _model(model: Any) -> tuple[Any, list[str]]:
    if model is None:
        return None, []
    if isinstance(model, str | os.PathLike):
        return None, [f"model.from_pretrained={_quoted(os.fspath(model))}"]
    if not isinstance(model, diffusers.DiffusionPipeline):
        raise ConfigurationError(
            f"model is a {type(model).__name__}; expected a diffusers pipeline, its folder or hub id, or None"
        )
    device: torch.device = model.device  # type: ignore[attr-defined]
    return model, [f"trainer.devices=[{device.index}]"] if device.type == "cuda" and device.index else []


def _check_pipeline(pipe: Any, cfg: DictConfig) -> None:
    """What is known to be wrong about a pipeline object before anything of it is changed."""
    for section in (cfg.model, cfg.model.unet_config, cfg.model.first_stage_config):
        if section.from_pretrained is not None:
            raise ConfigurationError(
                f"overrides name {section.from_pretrained!r}, but model is a pipeline already; load it into that"
            )
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
    if cfg.model.peft.peft_scheme == "none":
        for name in (name for name in DENOISERS if name in networks):
            if networks[name].dtype in (torch.float16, torch.bfloat16):
                raise ConfigurationError(
                    f"every_weight=True with a pipeline whose {name} is in {networks[name].dtype}, too coarse for an "
                    "optimizer's steps: load it with torch_dtype=torch.float32, or train an adapter"
                )


def _reward(reward: Any) -> tuple[Reward | None, list[str]]:
    """The reward itself where it is an object, and words of the command line."""
    if isinstance(reward, os.PathLike) or (isinstance(reward, str) and reward.endswith(".nemo")):
        return None, [f"rm.model.restore_from_path={_quoted(os.fspath(reward))}"]
    if isinstance(reward, str):
        names = groups()["rm"]
        if ":" in reward:
            return None, ["rm=custom", f"rm.import_path={_quoted(reward)}"]
        if reward not in names:
            raise RewardError(
                f"reward={reward!r}: no such reward{closest(reward, names)}; expected a function, a .nemo file, or one "
                f"of {', '.join(names)}"
            )
        return None, [f"rm={reward}"]
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
    return CustomReward(reward, origin), ["rm=custom", f"rm.import_path={_quoted(name)}"]


def _prompts(prompts: Any, argument: str) -> list[str] | str:
    """The prompts of a list as lines of a file, or where they are."""
    if isinstance(prompts, str | os.PathLike):
        try:
            expand_paths(prompts)
        except DataError as error:
            hint = f"; prompts themselves come in a list: {argument}=[{str(prompts)!r}]"
            raise DataError(f"{argument}: {error}{hint}") from error
        return os.fspath(prompts)
    try:
        texts = list(prompts)
    except TypeError:
        raise DataError(f"{argument} is a {type(prompts).__name__}; expected a list of prompts") from None
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


def _load(recipe: str, words: list[str], overrides: Sequence[str], batch_size: int | None) -> DictConfig:
    """The configuration; a batch that is no multiple of the recipe's micro-batch is handled in smaller ones."""
    every = [*words, *overrides]
    if batch_size is not None and batch_size > 0 and not any("micro_batch_size=" in word for word in overrides):
        usual = load_config(recipe, []).model.micro_batch_size
        size = next(size for size in range(min(usual, batch_size), 0, -1) if batch_size % size == 0)
        every.insert(0, f"model.micro_batch_size={size}")
    return load_config(recipe, every)


def _name(thing: Any) -> str:
    """``module:name``, of an object its class's."""
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}:{named.__qualname__}"


def _written(value: Any) -> str:
    """As the command line writes it."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_written, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _quoted(text: str) -> str:
    """A text in Hydra's grammar: backslashes count before quotes only."""
    inside = re.sub(r"(\\*)'", lambda found: found[1] * 2 + "\\'", text)
    trailing = len(inside) - len(inside.rstrip("\\"))
    return f"'{inside}{chr(92) * trailing}'"


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
