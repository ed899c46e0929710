"""Networks from Hugging Face folders or hub ids, for the rewards that take any network of a kind.

No code of a model repository is ever run (``trust_remote_code`` stays off), safetensors come before pickles, and
pickled weights are read as tensors only.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from nemo_aligner_diffusion.errors import RewardError, first_line
from nemo_aligner_diffusion.rewards.base import NetworkReward
from nemo_aligner_diffusion.rewards.settings import HuggingFaceSettings
from nemo_aligner_diffusion.rewards.support.image_processor import ImageProcessor

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def load_network(settings: HuggingFaceSettings, where: str = "rm.model.from_pretrained") -> NetworkReward:
    """The reward of a folder or hub id, on the CPU in float32; ``where`` is the key that named it.

    Raises:
        RewardError: there is no such network, its preprocessing is not known here, or the settings don't fit it.
    """
    import transformers

    source = existing_source(settings.from_pretrained or "", where)
    if settings.model_types:
        config = load_processor(transformers.AutoConfig, source, where, f"the configuration of {settings.what}")
        if config.model_type not in settings.model_types:
            raise RewardError(
                f"{where} = {source!r} is a model of type {config.model_type!r}; expected one of "
                f"{', '.join(settings.model_types)}, such as {settings.needs['from_pretrained']}."
            )
    model = load_model(getattr(transformers, settings.auto_class), source, where, settings.what)
    tokenizer = (
        load_processor(transformers.AutoTokenizer, source, where, "its tokenizer") if settings.reads_prompts else None
    )
    processor = load_processor(transformers.AutoImageProcessor, source, where, "an image processor")
    return NetworkReward(settings, model, ImageProcessor.of(processor, where), tokenizer)


def existing_source(source: str | Path, where: str) -> str:
    """``source`` as transformers takes it: an existing folder, or something that can be a hub id.

    Raises:
        RewardError: it is neither.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise RewardError(
                f"{where} = {str(source)!r}: the folder has no config.json, so it is no transformers model."
            )
        return str(path)
    if path.exists() or not _HUB_ID.fullmatch(str(source)) or str(source).endswith((".nemo", ".pt", ".safetensors")):
        raise RewardError(
            f"{where} = {str(source)!r}: expected the folder of a transformers model (config.json, model.safetensors, "
            "preprocessor_config.json), or a model's id on the Hugging Face hub such as google/vit-base-patch16-224."
        )
    return str(source)


def load_model(auto_class: Any, source: str, where: str, kind: str) -> Any:
    """A model in float32 and evaluation mode, all of whose weights came from ``source``.

    Args:
        auto_class: a class of transformers with ``from_pretrained``.
        source: from :func:`existing_source`.
        where: the key that named it, for messages.
        kind: what it should be, in words.

    Raises:
        RewardError: there is no such model, it is of another kind, or weights are missing.
    """
    with _explained(source, where, kind):
        model, report = auto_class.from_pretrained(
            source, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
    missing = sorted(report.get("missing_keys", ()))
    if missing:  # transformers fills them with random numbers, after a warning
        raise RewardError(
            f"{where} = {source!r} lacks {len(missing)} weights of {kind}, e.g. {missing[0]}: its config.json names "
            f"{_architecture(model)}. Give a model that was trained for this task."
        )
    return model.eval()


def load_processor(auto_class: Any, source: str, where: str, kind: str) -> Any:
    """A tokenizer or an image processor's settings, from the same place as the model."""
    with _explained(source, where, kind):
        return auto_class.from_pretrained(source, trust_remote_code=False)


@contextlib.contextmanager
def _explained(source: str, where: str, kind: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError, AttributeError) as error:
        place = "the folder" if Path(source).is_dir() else "the hub (is it reachable, and is the id right?)"
        raise RewardError(f"{where} = {source!r}: {kind} cannot be had from {place}: {first_line(error)}") from error


def _architecture(model: Any) -> str:
    names = getattr(model.config, "architectures", None) or []
    return ", ".join(map(str, names)) or "no architecture"
