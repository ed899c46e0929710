"""``export/``: the tuned weights in the format of plain ``diffusers``, complete or not there at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_aligner_diffusion.diffusion.lora import has_lora, lora_state_dict, save_lora_weights
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.parallel.parallelism import Parallelism
from nemo_aligner_diffusion.runtime.files import UNFINISHED, remove_leftovers


def export_weights(
    model: DiffusionModel, directory: Path, parallel: Parallelism | None = None, write: bool = True
) -> Path | None:
    """Write what was trained; an export that is already there is replaced only once the new one is complete.

    Args:
        model: its denoiser may be cut and sharded; the files are whole whatever the layout.
        directory: ``export/``.
        parallel: how the denoiser is laid out; then every process must call this.
        write: whether this process writes. The others help to gather.

    Returns:
        ``pytorch_lora_weights.safetensors`` (LoRA, for ``pipeline.load_lora_weights``) or a folder such as ``unet/``
        (full fine-tuning, for ``UNet2DConditionModel.from_pretrained``); ``None`` where nothing was written.
    """
    parallel = parallel or Parallelism()
    denoiser = model.denoiser
    if parallel.holds_whole_weights and not write:
        return None
    if has_lora(denoiser):
        adapter = whole_adapter(denoiser, parallel)
        return save_lora_weights(denoiser, directory, adapter, pipeline_class=type(model.pipe)) if write else None
    weights = {}
    for name, parameter in denoiser.state_dict().items():
        whole = parallel.placement(name).full(parameter)  # on all processes, one after the other
        if write:
            weights[name] = whole.cpu()
    return _write_denoiser(denoiser, weights, directory, model.trained) if write else None


def whole_adapter(denoiser: Any, parallel: Parallelism) -> dict[str, Tensor]:
    """The adapter's tensors under the names that ``peft`` exports, each of them whole; on every process."""
    adapted = [(name, parameter) for name, parameter in denoiser.named_parameters() if ".lora_" in name]
    return lora_state_dict(denoiser, state={name: parallel.placement(name).full(value) for name, value in adapted})


def _write_denoiser(denoiser: Any, weights: dict[str, Tensor], directory: Path, component: str) -> Path:
    names = (component, f".{component}{UNFINISHED}", f".{component}.old{UNFINISHED}")
    target, fresh, old = (directory / name for name in names)
    directory.mkdir(parents=True, exist_ok=True)
    remove_leftovers(directory)
    import diffusers

    with torch.device("meta"):  # the class and the shapes as they were before anything was cut
        # not type(denoiser), which FSDP changes; a network that was never loaded has no name in its configuration
        kind = denoiser.config.get("_class_name", type(denoiser).__name__)
        plain = getattr(diffusers, kind).from_config(denoiser.config)
    plain.load_state_dict(weights, assign=True)
    plain.save_pretrained(fresh, safe_serialization=True)
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    return target
