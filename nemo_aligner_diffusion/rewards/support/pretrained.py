"""Networks out of Hugging Face folders and repositories.

No code of a model repository is ever run (``trust_remote_code`` stays off), safetensors come before pickles, and
pickled weights are read as tensors only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from nemo_aligner_diffusion.errors import CheckpointError, RewardError, first_line, printable
from nemo_aligner_diffusion.formats.files import read_json
from nemo_aligner_diffusion.formats.hub import locate
from nemo_aligner_diffusion.formats.weight_files import check_folder
from nemo_aligner_diffusion.rewards.base import NetworkReward
from nemo_aligner_diffusion.rewards.settings import HuggingFaceSettings
from nemo_aligner_diffusion.rewards.support.image_processor import ImageProcessor
from nemo_aligner_diffusion.runtime.messages import with_quiet_libraries

# what transformers and the libraries below it raise for files that they cannot use
_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError, AttributeError, SafetensorError)
_SMALL_FILES = ("*.json", "merges.txt", "vocab.txt")
PATTERNS = ((*_SMALL_FILES, "model*.safetensors"), (*_SMALL_FILES, "pytorch_model*.bin"))


def load_network(settings: HuggingFaceSettings, where: str = "rm.model.from_pretrained") -> NetworkReward:
    """The reward of a folder or hub id, on the CPU in float32; ``where`` is the key that named it.

    Raises:
        RewardError: there is no such network, its preprocessing is not known here, or the settings don't fit it.
    """
    files = "config.json, model.safetensors, preprocessor_config.json"
    wanted = f"the folder of a transformers model, {settings.what} ({files})"
    try:
        folder = locate(settings.from_pretrained or "", PATTERNS, holds_weights, wanted)
    except CheckpointError as error:
        raise RewardError(f"{where}: {error}") from error
    place = f"{where} = {str(folder)!r}"
    model = load_model(settings.auto_class, folder, place, settings.what, settings.model_types, torch.float32)
    tokenizer = load_processor("AutoTokenizer", folder, place, "its tokenizer") if settings.reads_prompts else None
    processor = load_processor("AutoImageProcessor", folder, place, "an image processor")
    return NetworkReward(settings, model, ImageProcessor.of(processor, where), tokenizer)


def holds_weights(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in ("model*.safetensors", "pytorch_model*.bin"))


def load_model(
    auto_class: str,
    folder: Path,
    place: str,
    what: str,
    model_types: tuple[str, ...] = (),
    dtype: torch.dtype | str = "auto",
) -> Any:
    """A network all of whose weights came from ``folder``, in evaluation mode.

    Args:
        auto_class: of transformers, which loads it.
        place, what: where it was looked for and what it should be, for messages.
        model_types: of ``config.json`` that will do; empty: any that ``auto_class`` loads.
        dtype: to convert to; ``auto``: as it was saved.

    Raises:
        RewardError: there is no such network, it is of another kind, or weights are missing.
    """
    import transformers

    config = read_json(folder / "config.json", RewardError)
    if model_types and config.get("model_type") not in model_types:
        raise RewardError(
            f"{place} is a model of type {printable(config.get('model_type'))!r}; expected {' or '.join(model_types)}."
        )
    check_folder(folder, RewardError)
    with _explained(place, what), with_quiet_libraries():
        model, report = getattr(transformers, auto_class).from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
    missing = sorted(report.get("missing_keys", ()))
    if missing:  # transformers fills them with random numbers, after a warning
        architectures = getattr(model.config, "architectures", None) or ["no architecture"]
        raise RewardError(
            f"{place} lacks {len(missing)} weights of {what}, e.g. {missing[0]}: its config.json names "
            f"{', '.join(map(str, architectures))}. Give a model that was trained for this task."
        )
    return model.eval()


def load_processor(auto_class: str, folder: Path, place: str, what: str) -> Any:
    """A tokenizer or an image processor's settings, from the same folder as the model."""
    import transformers

    with _explained(place, what):
        return getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=False)


@contextlib.contextmanager
def _explained(place: str, what: str) -> Iterator[None]:
    try:
        yield
    except _ERRORS as error:
        raise RewardError(f"{place}: {what} cannot be had from it: {first_line(error)}") from error
