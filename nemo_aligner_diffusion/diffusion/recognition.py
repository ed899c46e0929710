"""Which architecture a checkpoint is of, read off the JSON beside its weights: no torch, no weights, no network unless
it is allowed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_aligner_diffusion.diffusion.settings import WeightsSettings
from nemo_aligner_diffusion.embedded_assets import embedded_model_path
from nemo_aligner_diffusion.errors import CheckpointError, printable
from nemo_aligner_diffusion.formats.files import read_json
from nemo_aligner_diffusion.formats.hub import is_hub_name

# pipeline class -> architecture; Stable Diffusion's own class is that of two, told apart by their text encoders' width
_OF_CLASS = {
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd35",
    "FluxPipeline": "flux1",
    "Flux2Pipeline": "flux2",
    "Flux2KleinPipeline": "flux2_klein",
    "QwenImagePipeline": "qwen_image",
    "ZImagePipeline": "z_image",
}
_OF_WIDTH = {768: "sd15", 1024: "sd21"}


@dataclass(frozen=True)
class Recognised:
    """What a checkpoint is.

    Attributes:
        architecture: ``embedded``, ``sd15``, ``sd21``, ``sdxl``, ``sd35``, ``flux1``, ``flux2``, ``flux2_klein``,
            ``qwen_image``, ``z_image``; empty: another, or not known.
        pipeline: name of the ``diffusers`` pipeline class; empty: not known.
        because: by what it was recognised, half a sentence.
    """

    architecture: str
    pipeline: str
    because: str


def recognise(weights: WeightsSettings, fetch: bool = False) -> Recognised:
    """The architecture of the model that ``weights`` names.

    Args:
        fetch: ask the hub for a repository's configuration where the local cache has none of it.

    Raises:
        CheckpointError: a file that tells it is damaged. What is missing is not this function's business.
    """
    if weights.from_pretrained is None:
        return _of_denoiser(weights.denoiser_path)
    source = weights.from_pretrained
    folder = Path(source).expanduser()
    if folder.is_dir() and folder.resolve() == embedded_model_path().resolve():
        return Recognised("embedded", "StableDiffusionPipeline", f"{folder} is the embedded model")

    def read(name: str) -> dict[str, Any]:
        file = _file(source, name, fetch)
        return {} if file is None else read_json(file, CheckpointError)

    found = read("model_index.json").get("_class_name")
    if not isinstance(found, str):
        return Recognised("", "", f"{source} has no model_index.json here")
    return of_pipeline(found, lambda part: read(f"{part}/config.json"))


def of_pipeline(kind: str, config_of: Callable[[str], Mapping[str, Any]]) -> Recognised:
    """The architecture of a pipeline.

    Args:
        kind: name of its class.
        config_of: component's name -> its configuration.
    """
    if kind != "StableDiffusionPipeline":
        return Recognised(_OF_CLASS.get(kind, ""), kind, f"it is a {printable(kind, 80)}")
    width = config_of("unet").get("cross_attention_dim")
    architecture = _OF_WIDTH.get(width, "") if isinstance(width, int) else ""
    return Recognised(architecture, kind, f"it is a {kind} with a text encoder {printable(width, 20)} wide")


def _of_denoiser(path: str | None) -> Recognised:
    """Of ``model.unet_config.from_pretrained`` alone, with the embedded model's other parts."""
    if path is None:
        return Recognised("embedded", "StableDiffusionPipeline", "no model is named")
    file = Path(path).expanduser() / "config.json"
    config = read_json(file, CheckpointError) if file.is_file() else {}
    is_xl = config.get("addition_embed_type") == "text_time"
    found = of_pipeline("StableDiffusionXLPipeline" if is_xl else "StableDiffusionPipeline", lambda part: config)
    return (
        found
        if found.architecture
        else Recognised("embedded", found.pipeline, "its denoiser has the embedded one's place")
    )


def _file(source: str, name: str, fetch: bool) -> Path | None:
    """``name`` in a folder, or in a repository of the hub."""
    folder = Path(source).expanduser()
    if folder.is_dir() or not is_hub_name(source):
        return folder / name if (folder / name).is_file() else None
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(source, name)
    if isinstance(cached, str):
        return Path(cached)
    if not fetch:
        return None
    try:
        return Path(hf_hub_download(source, name))
    except Exception:  # offline, gated, unknown, no such file: the loader says so
        return None
