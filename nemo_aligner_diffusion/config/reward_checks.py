"""Checks of the ``rm`` section that need more than one key, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_aligner_diffusion.config.reward_keys import (
    CLIP_MODES,
    MODEL_KEYS,
    NEEDED,
    REWARD_KEYS,
    REWARDS,
)
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.keys import closest, flatten
from nemo_aligner_diffusion.settings import choice, number

_PARTED = ("composite", "ensemble")
_SHAPING = ("normalize", "clip", "clip_mode")


def check_reward(cfg: DictConfig) -> None:
    """Raises :class:`ConfigurationError` for a reward that lacks a key, or has one that cannot act."""
    settings: dict[str, Any] = OmegaConf.to_container(cfg.rm)  # type: ignore[assignment]
    name = settings["name"]
    _check_model("rm", name, settings.get("model") or {})
    _check_needed("rm", name, settings)
    if name not in _PARTED:
        return
    measured = list(_check_parts("rm", name, settings.get("parts")))
    loops = [section for section in cfg.trainer.values() if isinstance(section, DictConfig)]
    if measured and any(loop.val_check_interval == 0 for loop in loops):
        raise ConfigurationError(
            f"{measured[0]}.normalize = base measures the base model's validation pictures, but val_check_interval = 0 "
            "says that there are none: expected val_check_interval >= 1, or numbers such as "
            f"{measured[0]}.normalize={{mean:20,std:1.5}}"
        )


def _check_model(where: str, name: str, model: Mapping[str, Any]) -> None:
    path, pretrained = model.get("restore_from_path"), model.get("from_pretrained")
    known = MODEL_KEYS.get(name, ())
    if path is not None and "restore_from_path" not in known:
        instead = f", or {where}.model.from_pretrained" if "from_pretrained" in known else ", or no path"
        raise ConfigurationError(
            f"{where}.model.restore_from_path = {path!r} with {where}.name = {name}, which restores no file: "
            f"expected {where}.name=clip{instead}"
        )
    if pretrained is not None and "from_pretrained" not in known:
        raise ConfigurationError(
            f"{where}.model.from_pretrained = {pretrained!r} with {where}.name = {name}, which takes no such folder: "
            "expected classifier or detection; for CLIP-like models convert the folder with "
            f"examples/mm/clip/convert_reward_to_nemo.py and give {where}.model.restore_from_path"
        )


def _check_needed(where: str, name: str, settings: Mapping[str, Any]) -> None:
    leaves = flatten(settings)
    for key, example in NEEDED.get(name, {}).items():
        if leaves.get(key) is None:
            raise ConfigurationError(f"{where}.name = {name} needs {where}.{key}, such as {where}.{key}={example}")


def _check_parts(where: str, kind: str, parts: Any) -> Iterator[str]:
    """The parts of a composite or ensemble: each ``{weight, normalize, clip, clip_mode, name, its keys}`` or ``{weight,
    …, reward: {name, its keys}}``. Gives the places of those that are normalised by the base model's pictures."""
    if not isinstance(parts, Mapping) or not parts:
        raise ConfigurationError(
            f"{where}.name = {kind} needs {where}.parts, such as "
            f"{where}.parts={{clip:{{weight:1.0}},symmetry:{{weight:10.0}}}}"
        )
    if kind == "ensemble" and len(parts) < 2:
        raise ConfigurationError(
            f"{where}.name = ensemble has one part, {next(iter(parts))!r}, with nothing to agree with: add another, "
            f"such as {where}.parts.second={{name:clip,model:{{restore_from_path:second.nemo}}}}"
        )
    for label, part in parts.items():
        here = f"{where}.parts.{label}"
        if not isinstance(part, Mapping):
            raise ConfigurationError(f"{here} = {part!r}: expected keys, such as {{weight: 1.0}}")
        settings = dict(part)
        if kind == "ensemble" and settings.get("weight") is not None:
            raise ConfigurationError(
                f"{here}.weight = {settings['weight']!r}: an ensemble's parts count alike; expected no weight, or "
                f"{where}.name=composite"
            )
        weight = settings.pop("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ConfigurationError(f"{here}.weight = {weight!r}: expected a number")
        shaping = {key: settings.pop(key) for key in _SHAPING if key in settings}
        if _check_shaping(here, shaping):
            yield here
        if "reward" in settings:
            inner = settings.pop("reward")
            if settings or not isinstance(inner, Mapping):
                raise ConfigurationError(
                    f"{here}: expected only weight and reward, and {', '.join(_SHAPING)}; the reward's keys stand "
                    "below reward"
                )
            settings, here = dict(inner), f"{here}.reward"
        name = settings.pop("name", str(label))
        if name not in REWARDS:
            known = ", ".join(REWARDS)
            hint = closest(str(name), REWARDS)
            raise ConfigurationError(f"{here}.name = {name!r}: expected one of {known}{hint}")
        if name in _PARTED:
            yield from _check_parts(here, name, settings.pop("parts", None))
        _check_part_keys(here, name, settings, ("weight", *_SHAPING) if kind == "composite" else _SHAPING)


def _check_shaping(here: str, shaping: Mapping[str, Any]) -> bool:
    """Whether the part is normalised by the base model's pictures."""
    normalize, clip = shaping.get("normalize"), shaping.get("clip")
    if isinstance(normalize, Mapping):
        wrong = [key for key in normalize if key not in ("mean", "std")]
        if wrong or set(normalize) != {"mean", "std"}:
            raise ConfigurationError(
                f"{here}.normalize = {dict(normalize)!r}: expected mean and std, or base"
                + (closest(str(wrong[0]), ("mean", "std")) if wrong else "")
            )
        number().read(f"{here}.normalize.mean", normalize["mean"])
        number(above=0).read(f"{here}.normalize.std", normalize["std"])
    elif normalize not in (None, "base"):
        raise ConfigurationError(f"{here}.normalize = {normalize!r}: expected {{mean: …, std: …}}, or base")
    if clip is not None:
        if not isinstance(clip, list) or len(clip) != 2 or clip == [None, None]:
            raise ConfigurationError(f"{here}.clip = {clip!r}: expected [low, high]; one of them may be null")
        low, high = (number(nullable=True).read(f"{here}.clip", bound) for bound in clip)
        if low is not None and high is not None and not low < high:
            raise ConfigurationError(f"{here}.clip = {clip!r}: expected low < high")
    mode = choice(*CLIP_MODES).read(f"{here}.clip_mode", shaping.get("clip_mode") or "hard")
    if mode == "smooth" and (clip is None or None in clip):
        raise ConfigurationError(f"{here}.clip_mode = smooth: it needs both bounds, such as {here}.clip=[-3,3]")
    return bool(normalize == "base")


def _check_part_keys(here: str, name: str, settings: Mapping[str, Any], parts_own: Sequence[str]) -> None:
    sections = [section for section in REWARDS[name] if section not in ("trainer", "parts")]
    known = [key.removeprefix("rm.") for key in REWARD_KEYS if key.partition(".")[2].partition(".")[0] in sections]
    known = [key for key in known if not key.startswith("model.") or key.partition(".")[2] in MODEL_KEYS[name]]
    for key, value in flatten(settings).items():
        if key == "trainer.precision":
            raise ConfigurationError(f"{here}.{key}: all parts compute alike; set rm.trainer.precision")
        if key.partition(".")[0] == "kwargs" and "kwargs" in sections:
            continue  # the user's own
        if key not in known and not (value in (None, {}) and key in sections):
            hint = closest(key, [*parts_own, *known]) or f"; {name} reads {', '.join([*parts_own, *known])}"
            raise ConfigurationError(f"unknown key {f'{here}.{key}'!r}{hint}")
        if key in known and value is not None:
            REWARD_KEYS[f"rm.{key}"].read(f"{here}.{key}", value)
    _check_needed(here, name, settings)
