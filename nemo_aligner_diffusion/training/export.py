"""``export/``: the tuned weights in the format of plain ``diffusers``, complete or not there at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from nemo_aligner_diffusion.diffusion.families.stable_diffusion import StableDiffusion
from nemo_aligner_diffusion.diffusion.lora import has_lora, save_lora_weights


def export_weights(model: StableDiffusion, directory: Path) -> Path:
    """Write what was trained; an export that is already there is replaced only once the new one is complete.

    Returns:
        ``pytorch_lora_weights.safetensors`` (LoRA, for ``pipeline.load_lora_weights``) or the folder ``unet/`` (full
        fine-tuning, for ``UNet2DConditionModel.from_pretrained``).
    """
    if has_lora(model.denoiser):
        return save_lora_weights(model.denoiser, directory)
    target, fresh, old = directory / "unet", directory / f".unet.{os.getpid()}", directory / f".unet.{os.getpid()}.old"
    directory.mkdir(parents=True, exist_ok=True)
    model.denoiser.save_pretrained(fresh, safe_serialization=True)
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    return target
