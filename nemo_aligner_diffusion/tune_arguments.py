"""The arguments of :func:`.tune` as words of the command line, and as objects where it has no words for them."""

from __future__ import annotations

import inspect
import os
import re
from typing import Any

import diffusers
import torch

from nemo_aligner_diffusion.algorithms.base import Method
from nemo_aligner_diffusion.algorithms.custom import CustomMethod
from nemo_aligner_diffusion.algorithms.registry import methods
from nemo_aligner_diffusion.config.recipes import groups, recipes
from nemo_aligner_diffusion.config.words import quoted
from nemo_aligner_diffusion.data.paths import expand_paths
from nemo_aligner_diffusion.data.prompt_files import clean_prompt
from nemo_aligner_diffusion.diffusion.families import DENOISERS
from nemo_aligner_diffusion.errors import ConfigurationError, DataError, RewardError
from nemo_aligner_diffusion.import_path import check_call
from nemo_aligner_diffusion.keys import closest
from nemo_aligner_diffusion.rewards.base import Reward
from nemo_aligner_diffusion.rewards.settings import RewardSettings
from nemo_aligner_diffusion.rewards.support.custom import CustomReward
from nemo_aligner_diffusion.training.settings import ModelSettings


def read_method(method: Method | str) -> tuple[str, Method | None, list[str]]:
    """Recipe, the method itself where the configuration cannot make it, and words of the command line."""
    known = methods()
    if isinstance(method, str) and ":" not in method:
        spellings = {spelling.lower(): kind for kind in known.values()
                     for spelling in (kind.title, kind.__name__, kind.option, kind.name)}  # fmt: skip
        if method.lower() not in spellings:
            raise ConfigurationError(
                f"method={method!r}: no such method{closest(method, known)}; there are {', '.join(known)}"
            )
        return _recipe(spellings[method.lower()])
    if isinstance(method, Method) and known.get(method.name) is type(method):
        values = {key: getattr(method, field) for field, key in method.keys().items()}
        return _recipe(type(method), *(f"{key}={written(value)}" for key, value in values.items()))
    bare = known["draft"]  # its recipe has what every method reads, and nothing of one's own
    if isinstance(method, str):
        return _recipe(bare, f"model.algorithm={quoted(method)}")
    if inspect.isclass(method) or not (isinstance(method, Method) or callable(method)):
        hint = f"; a class was given: {method.__name__}()" if inspect.isclass(method) else ""
        raise ConfigurationError(
            f"method={method!r}: expected a method such as DRTune(train_steps=4), its name, or a rule "
            f"(path, rng) -> Plan{hint}"
        )
    name = _name(method)
    return _recipe(bare, f"model.algorithm={quoted(name)}", own=CustomMethod(method, f"method={name}"))


def _recipe(kind: type[Method], *words: str, own: Method | None = None) -> tuple[str, Method | None, list[str]]:
    """The recipe of a method, or one that is turned into it."""
    name = {"draft_plus": "draftp"}.get(kind.option, kind.option) + "_sd"
    if name in recipes():
        return name, own, [*words]
    return "draftp_sd", own, [f"algorithm={kind.option}", *words]


def read_model(model: Any) -> tuple[Any, list[str]]:
    if model is None:
        return None, []
    if isinstance(model, str | os.PathLike):
        return None, [f"model.from_pretrained={quoted(os.fspath(model))}"]
    if not isinstance(model, diffusers.DiffusionPipeline):
        raise ConfigurationError(
            f"model is a {type(model).__name__}; expected a diffusers pipeline, its folder or hub id, or None"
        )
    device: torch.device = model.device  # type: ignore[attr-defined]
    return model, [f"trainer.devices=[{device.index}]"] if device.type == "cuda" and device.index else []


def check_pipeline(pipe: Any, section: ModelSettings) -> None:
    """What is known to be wrong about a pipeline object before anything of it is changed."""
    for path in (section.from_pretrained, section.denoiser_path, section.vae_path):
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


def read_reward(reward: Any) -> tuple[Reward | None, list[str]]:
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


def read_prompt_argument(prompts: Any, argument: str) -> list[str] | str:
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


def _name(thing: Any) -> str:
    """``module:name``, of an object its class's."""
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}:{named.__qualname__}"


def written(value: Any) -> str:
    """As the command line writes it."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(map(written, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
