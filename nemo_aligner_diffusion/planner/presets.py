"""What a plan's model is made of: a published architecture (``diffusion/architectures.yaml``), or a folder's words.

No torch here: ``--help`` lists the names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_aligner_diffusion.diffusion.files.architectures import ARCHITECTURES, REWARDS, plain
from nemo_aligner_diffusion.diffusion.recognition import recognise
from nemo_aligner_diffusion.diffusion.settings import WeightsSettings
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.formats.files import read_json

__all__ = ["MODELS", "REWARDS", "ModelSpec", "model_name", "model_spec"]

_LEFT_OUT = ("safety_checker", "image_encoder", "feature_extractor")  # no part of a picture from a prompt
DEFAULT_SCHEDULER: tuple[str, dict[str, Any]] = ("DDIMScheduler", {"clip_sample": False})


@dataclass(frozen=True)
class ModelSpec:
    """What a model is made of.

    Attributes:
        name: as printed.
        pipeline: name of its ``diffusers`` pipeline class.
        components: its networks by the pipeline's names: (class of ``diffusers`` or ``transformers``, what its
            constructor or its configuration is given).
        reward: the reward preset a plan takes when the recipe names no reward file; ``None``: the embedded one.
        scheduler: class of ``diffusers`` and its configuration: how many steps it makes, on which noise levels.
        options: further arguments of the pipeline's constructor.
    """

    name: str
    pipeline: str
    components: dict[str, tuple[str, dict[str, Any]]]
    reward: str | None = None
    scheduler: tuple[str, dict[str, Any]] = DEFAULT_SCHEDULER
    options: dict[str, Any] = field(default_factory=dict)


MODELS: dict[str, ModelSpec] = {
    name: ModelSpec(known.title, known.pipeline, known.components, reward="clip-h", scheduler=known.scheduler)
    for name, known in ARCHITECTURES.items()
}


def model_name(weights: WeightsSettings) -> str | None:
    """What a recipe's model is planned as: its folder, or the preset that single files are recognised as."""
    folder = weights.from_pretrained
    if folder is not None and Path(folder).expanduser().is_dir():
        return folder
    return next((name for name in MODELS if name == recognise(weights).architecture), folder)


def model_spec(name: str) -> ModelSpec:
    """A preset by its name, or what a ``diffusers`` folder's configuration files say (no weight is read).

    Raises:
        ConfigurationError: neither a preset nor such a folder.
    """
    if name in MODELS:
        return MODELS[name]
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ConfigurationError(
            f"--model {name!r}: neither a preset ({', '.join(MODELS)}) nor a diffusers folder on this machine"
        )
    index = read_json(folder / "model_index.json", ConfigurationError)
    components: dict[str, tuple[str, dict[str, Any]]] = {}
    for part, value in index.items():
        is_network = isinstance(value, list) and (folder / part / "config.json").is_file()
        if is_network and part not in _LEFT_OUT:
            components[part] = value[1], plain(read_json(folder / part / "config.json", ConfigurationError))
    if "vae" not in components:
        raise ConfigurationError(
            f"{folder}: a plan needs a vae/config.json; there are networks in {', '.join(components) or 'no folder'}"
        )
    options = {key: value for key, value in plain(index).items() if not isinstance(value, list)}
    scheduler = DEFAULT_SCHEDULER
    if "scheduler" in index:
        scheduler = index["scheduler"][1], read_json(folder / "scheduler" / "scheduler_config.json", ConfigurationError)
    return ModelSpec(folder.name, str(index["_class_name"]), components, scheduler=scheduler, options=options)
