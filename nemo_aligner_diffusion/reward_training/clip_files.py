"""A CLIP to start from, out of a ``.nemo`` or a Hugging Face folder, and the trained one back into a ``.nemo``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_aligner_diffusion.embedded_assets import embedded_reward_path
from nemo_aligner_diffusion.errors import ArchiveError, CheckpointError, ConfigurationError, RewardError
from nemo_aligner_diffusion.formats.open_clip import OpenClipChoices
from nemo_aligner_diffusion.reward_training.configuration import RewardModelSettings
from nemo_aligner_diffusion.rewards.clip.archive import convert_hf_clip_to_nemo
from nemo_aligner_diffusion.rewards.clip.reward import CLIPReward
from nemo_aligner_diffusion.rewards.clip.sources import read_clip
from nemo_aligner_diffusion.rewards.clip.tokenizer import pair_of_files, read_tokenizer_files, tokenizer_from_bytes
from nemo_aligner_diffusion.rewards.restore import restore_reward

SAVE_DTYPES = {"32": torch.float32, "16": torch.float16, "bf16": torch.bfloat16}


def load_start(section: RewardModelSettings) -> CLIPReward:
    """The CLIP that the training starts from."""
    if section.from_pretrained is not None:
        return load_hugging_face_clip(section.from_pretrained)
    return load_nemo_clip(section.restore_from_path or embedded_reward_path(), section.tokenizer)


def load_nemo_clip(path: str | Path, tokenizer: str | Path | None = None) -> CLIPReward:
    """The CLIP in a ``.nemo``, whoever wrote it, scoring as PickScore does.

    Raises:
        ArchiveError: the archive is unusable.
        ConfigurationError: it holds a reward of another kind.
    """
    reward = restore_reward(path, tokenizer=tokenizer)
    if type(reward) is not CLIPReward:
        raise ConfigurationError(
            f"model.restore_from_path = {str(path)!r} holds a {type(reward).__name__}; expected a CLIP (PickScore, "
            "HPS, CLIPScore or another), which is what can be trained here"
        )
    reward.score_type = "pickscore"
    return reward


def load_hugging_face_clip(folder: str | Path) -> CLIPReward:
    """The CLIP in a Hugging Face folder: ``config.json``, weights, tokenizer files, ``preprocessor_config.json``.

    Raises:
        CheckpointError: the folder is missing, or does not hold these.
    """
    folder = Path(folder).expanduser()
    try:
        model, preprocessing = read_clip(folder, OpenClipChoices())
        files = read_tokenizer_files(folder)
        tokenizer = tokenizer_from_bytes(files["vocab.json"], files["merges.txt"], str(folder))
        return CLIPReward(model, tokenizer, preprocessing=preprocessing).float()
    except (ArchiveError, CheckpointError, RewardError) as error:
        raise CheckpointError(f"model.from_pretrained (a Hugging Face CLIP folder): {error}") from error


def save_clip_reward(
    reward: CLIPReward, path: str | Path, *, dtype: torch.dtype | None = None, extra: Mapping[str, Any] | None = None
) -> Path:
    """Write ``reward`` as a ``.nemo`` that :func:`restore_reward` reads, whole or not at all.

    Args:
        dtype: of the saved weights; their own when left out.
        extra: further entries of its configuration, such as where it comes from.
    """
    return convert_hf_clip_to_nemo(
        reward.model,
        tokenizer_files(reward.tokenizer),
        path,
        score=reward.score_type,
        preprocessing=reward.preprocessing,
        prompt_prefix=reward.prompt_prefix,
        max_length=reward.max_length,
        dtype=dtype,
        name=reward.name,
        extra=extra,
    )


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """``vocab.json`` and ``merges.txt`` of a byte-pair tokenizer, wherever it was loaded from."""
    return pair_of_files(tokenizer.backend_tokenizer.to_str().encode(), "the reward's tokenizer")
