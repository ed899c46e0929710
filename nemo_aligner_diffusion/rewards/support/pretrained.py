"""Networks from Hugging Face folders or hub ids, for the rewards that take any network of a kind.

No code of a model repository is ever run (``trust_remote_code`` stays off), safetensors come before pickles, and
pickled weights are read as tensors only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from nemo_aligner_diffusion.errors import CheckpointError, RewardError, first_line, printable
from nemo_aligner_diffusion.formats.files import read_json
from nemo_aligner_diffusion.formats.hub import locate
from nemo_aligner_diffusion.keys import flatten
from nemo_aligner_diffusion.rewards.base import NetworkReward
from nemo_aligner_diffusion.rewards.settings import HuggingFaceSettings
from nemo_aligner_diffusion.rewards.support.image_processor import ImageProcessor

_SMALL_FILES = ("*.json", "merges.txt", "vocab.txt")


def load_network(settings: HuggingFaceSettings, where: str = "rm.model.from_pretrained") -> NetworkReward:
    """The reward of a folder or hub id, on the CPU in float32; ``where`` is the key that named it.

    Raises:
        RewardError: there is no such network, its preprocessing is not known here, or the settings don't fit it.
    """
    import transformers

    try:
        folder = locate(
            settings.from_pretrained or "",
            ((*_SMALL_FILES, "model*.safetensors"), (*_SMALL_FILES, "pytorch_model*.bin")),
            lambda found: any(found.glob("model*.safetensors")) or any(found.glob("pytorch_model*.bin")),
            f"the folder of a transformers model, {settings.what} (config.json, model.safetensors, "
            "preprocessor_config.json)",
        )
    except CheckpointError as error:
        raise RewardError(f"{where}: {error}") from error
    place = f"{where} = {str(folder)!r}"
    config = read_json(folder / "config.json", RewardError)
    if settings.model_types and config.get("model_type") not in settings.model_types:
        raise RewardError(
            f"{place} is a model of type {printable(config.get('model_type'))!r}; expected one of "
            f"{', '.join(settings.model_types)}, such as {settings.needs['from_pretrained']}."
        )
    for key, value in flatten(config, dotted=True).items():
        if key.endswith("attn_implementation") and "/" in str(value):  # transformers would fetch and run it
            raise RewardError(
                f"{place}: its config.json names code on the hub, {key} = {printable(value)!r}. Remove it."
            )
    with _explained(place, settings.what):
        model, report = getattr(transformers, settings.auto_class).from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
    missing = sorted(report.get("missing_keys", ()))
    if missing:  # transformers fills them with random numbers, after a warning
        architectures = getattr(model.config, "architectures", None) or ["no architecture"]
        raise RewardError(
            f"{place} lacks {len(missing)} weights of {settings.what}, e.g. {missing[0]}: its config.json names "
            f"{', '.join(map(str, architectures))}. Give a model that was trained for this task."
        )
    tokenizer: Any = None
    if settings.reads_prompts:
        with _explained(place, "its tokenizer"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    with _explained(place, "an image processor"):
        processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    return NetworkReward(settings, model, ImageProcessor.of(processor, where), tokenizer)


@contextlib.contextmanager
def _explained(place: str, kind: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError, AttributeError) as error:
        raise RewardError(f"{place}: {kind} cannot be had from it: {first_line(error)}") from error
