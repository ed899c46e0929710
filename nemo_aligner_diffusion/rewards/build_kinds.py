"""How each kind of reward is made of its section; :mod:`.build` chooses."""

from __future__ import annotations

from typing import Any

from nemo_aligner_diffusion.embedded_assets import embedded_reward_path
from nemo_aligner_diffusion.errors import ConfigurationError, RewardError
from nemo_aligner_diffusion.rewards.base import Reward
from nemo_aligner_diffusion.rewards.build_sections import Section, check_keys, without_nulls

JPEG_KEYS = ("quality", "chroma_subsampling", "reduction")
RESTORED_KEYS = ("restore_from_path", "micro_batch_size", "activation_checkpointing", "score", "tokenizer")
PRETRAINED_KEYS = ("from_pretrained", "micro_batch_size", "activation_checkpointing")
SHAPING_KEYS = ("normalize", "clip", "clip_mode")


def clip(section: Section) -> Reward:
    from nemo_aligner_diffusion.rewards.restore import restore_reward

    model = section.model(RESTORED_KEYS)
    return restore_reward(
        model.get("restore_from_path") or embedded_reward_path(),
        device=section.device,
        dtype=section.dtype,
        tokenizer=model.get("tokenizer"),
        score=model.get("score"),
        micro_batch_size=model.get("micro_batch_size"),
        activation_checkpointing=bool(model.get("activation_checkpointing", False)),
    )


def symmetry(section: Section) -> Reward:
    from nemo_aligner_diffusion.rewards.symmetry import MirrorSymmetry

    return MirrorSymmetry()


def feature_symmetry(section: Section) -> Reward:
    from nemo_aligner_diffusion.rewards.feature_symmetry import FeatureSymmetry

    section.model(("restore_from_path", "micro_batch_size", "activation_checkpointing", "tokenizer"))
    return FeatureSymmetry(clip(section), **section.given("distance"))


def compressibility(section: Section) -> Reward:
    from nemo_aligner_diffusion.rewards.jpeg import JPEGCompressibility

    return JPEGCompressibility(**section.given(*JPEG_KEYS))


def incompressibility(section: Section) -> Reward:
    from nemo_aligner_diffusion.rewards.jpeg import JPEGCompressibility

    return JPEGCompressibility(**section.given(*JPEG_KEYS), incompressible=True)


def classifier(section: Section) -> Reward:
    from nemo_aligner_diffusion.rewards.classifier import ClassifierReward

    source, settings = _pretrained(section, "google/vit-base-patch16-224")
    target = section.needed("target_class", "goldfish, or a class's index")
    reward = ClassifierReward.from_pretrained(
        source, target, f"{section.where}.model.from_pretrained", **settings, **section.given("views")
    )
    return reward.to(section.device, section.dtype)


def detection(section: Section) -> Reward:
    from nemo_aligner_diffusion.rewards.detection import DetectionReward

    source, settings = _pretrained(section, "google/owlv2-base-patch16-ensemble")
    settings |= section.given("query", "remove", "temperature")
    reward = DetectionReward.from_pretrained(source, where=f"{section.where}.model.from_pretrained", **settings)
    return reward.to(section.device, section.dtype)


def custom(section: Section) -> Reward:
    from nemo_aligner_diffusion.rewards.custom import load_custom

    import_path = section.needed("import_path", "my_package.my_module:my_reward")
    kwargs = section.settings.get("kwargs") or {}
    without_nulls(kwargs, f"{section.where}.kwargs")  # it must be a section; a null in it is the user's own
    return load_custom(str(import_path), kwargs, section.where)


def composite(section: Section) -> Reward:
    from nemo_aligner_diffusion.rewards.composite import CompositeReward
    from nemo_aligner_diffusion.rewards.parts import Part

    parts: dict[str, tuple[float, Reward | Part]] = {}
    for name, settings in _parts(section).items():
        weight = settings.pop("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ConfigurationError(f"{section.where}.parts.{name}.weight={weight!r}; expected a number.")
        parts[name] = (weight, _part(section, name, settings))
    return CompositeReward(parts, section.where)


def ensemble(section: Section) -> Reward:
    from nemo_aligner_diffusion.rewards.ensemble import EnsembleReward

    parts = {}
    for name, settings in _parts(section).items():
        if "weight" in settings:
            raise ConfigurationError(
                f"{section.where}.parts.{name}.weight: an ensemble's parts count alike; bring them to one scale with "
                "normalize, or use name: composite."
            )
        parts[name] = _part(section, name, settings)
    return EnsembleReward(parts, **section.given("aggregate", "std_weight"), label=section.where)


def _pretrained(section: Section, example: str) -> tuple[str, dict[str, Any]]:
    model = section.model(PRETRAINED_KEYS)
    source = model.pop("from_pretrained", None)
    if source is None:
        raise ConfigurationError(
            f"{section.where}.name={section.settings['name']} needs {section.where}.model.from_pretrained: the folder "
            f"of a transformers model, or its id on the Hugging Face hub such as {example}."
        )
    return str(source), {key: value for key, value in model.items() if key in PRETRAINED_KEYS}


def _parts(section: Section) -> dict[str, dict[str, Any]]:
    where = f"{section.where}.parts"
    parts = without_nulls(section.settings.get("parts"), where)
    if not parts:
        raise ConfigurationError(
            f"{section.where}.name={section.settings['name']} needs {where}, e.g. "
            "{clip: {weight: 1.0}, symmetry: {weight: 20.0}}."
        )
    return {name: without_nulls(settings, f"{where}.{name}") for name, settings in parts.items()}


def _part(section: Section, name: str, settings: dict[str, Any]) -> Any:
    """A part's reward and shaping; ``settings`` without its weight."""
    from nemo_aligner_diffusion.rewards.parts import Part, Shaping

    where = f"{section.where}.parts.{name}"
    shaping: dict[str, Any] = {key: settings.pop(key) for key in SHAPING_KEYS if key in settings}
    if "reward" in settings:
        inner = without_nulls(settings.pop("reward"), f"{where}.reward")
        check_keys(settings, ("weight", *SHAPING_KEYS, "reward"), where)
        settings = inner
    settings.setdefault("name", name)
    normalize = shaping.get("normalize")
    if isinstance(normalize, dict):
        check_keys(normalize, ("mean", "std"), f"{where}.normalize")
        figures: list[Any] = [normalize.get("mean"), normalize.get("std")]
        if any(isinstance(figure, bool) or not isinstance(figure, int | float) for figure in figures):
            raise ConfigurationError(f"{where}.normalize={normalize!r}; expected {{mean: …, std: …}}, or base.")
        shaping["normalize"] = tuple(map(float, figures))
    elif normalize is not None and not isinstance(normalize, str):
        raise ConfigurationError(f"{where}.normalize={normalize!r}; expected {{mean: …, std: …}}, or base.")
    bounds = shaping.get("clip")
    if bounds is not None:
        numbers = isinstance(bounds, list | tuple) and len(bounds) == 2
        if not numbers or any(isinstance(b, bool) or not isinstance(b, int | float | None) for b in bounds):
            raise ConfigurationError(f"{where}.clip={bounds!r}; expected [low, high]; one of them may be null.")
        shaping["clip"] = tuple(bounds)
    try:
        shaped = Shaping(**shaping)
    except RewardError as error:
        raise ConfigurationError(f"{where}.{error}") from error
    return Part(section.build(settings, where), shaped)
