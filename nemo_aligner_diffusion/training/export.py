"""``export/``: the tuned weights in the format of plain ``diffusers``, complete or not there at all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemo_aligner_diffusion.diffusion.lora import has_lora, lora_state_dict, save_lora_weights
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.formats.checkpoints import save_component
from nemo_aligner_diffusion.formats.files import open_regular
from nemo_aligner_diffusion.formats.hub import is_hub_name
from nemo_aligner_diffusion.parallel.parallelism import Parallelism
from nemo_aligner_diffusion.runtime.files import atomic_folder, remove_leftovers

if TYPE_CHECKING:
    from nemo_aligner_diffusion.training.settings import RunSettings

# pipeline -> its name in sd-scripts' ss_base_model_version, and in modelspec.architecture
_ARCHITECTURES = {
    "StableDiffusionPipeline": ("sd_v1", "stable-diffusion-v1"),
    "StableDiffusionXLPipeline": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
    "StableDiffusion3Pipeline": ("sd3", "stable-diffusion-3"),
    "FluxPipeline": ("flux1", "flux-1-dev"),
}
_NOTED = ("algorithm", "infer", "optim", "kl_coeff", "kl_space", "reward_scale", "reward_margin", "truncation_steps")


def export_weights(
    model: DiffusionModel,
    directory: Path,
    parallel: Parallelism | None = None,
    write: bool = True,
    step: int | None = None,
) -> Path | None:
    """Write what was trained; an export that is already there is replaced only once the new one is complete.

    Args:
        model: its denoiser may be cut and sharded; the files are whole whatever the layout.
        directory: ``export/``.
        parallel: how the denoiser is laid out; then every process must call this.
        write: whether this process writes. The others help to gather.
        step: how far training has come, for the files' notes (:func:`export_notes`).

    Returns:
        ``pytorch_lora_weights.safetensors`` (LoRA, for ``pipeline.load_lora_weights``) or a folder such as ``unet/``
        (full fine-tuning, for ``UNet2DConditionModel.from_pretrained``); ``None`` where nothing was written.
    """
    parallel = parallel or Parallelism()
    denoiser = model.denoiser
    notes = {**model.notes, **({} if step is None else {"ss_steps": str(step)})}
    if parallel.holds_whole_weights and not write:
        return None
    if has_lora(denoiser):
        adapter = whole_adapter(denoiser, parallel)
        if not write:
            return None
        return save_lora_weights(denoiser, directory, adapter, pipeline_class=type(model.pipe), header=notes)
    weights = {}
    for name, parameter in denoiser.state_dict().items():
        whole = parallel.placement(name).full(parameter)  # on all processes, one after the other
        if write:
            weights[name] = whole.cpu()
    return _write_denoiser(denoiser, weights, directory / model.trained, notes) if write else None


def export_notes(settings: RunSettings, model: DiffusionModel, base: str | None = None) -> dict[str, str]:
    """What exported files' metadata says of their making, under sd-scripts' and modelspec's keys where there are such.

    Call it while the denoiser has its base weights: their fingerprint is among the notes. Paths are shortened to names.

    Args:
        base: what a pipeline that was not loaded from the settings' files is called.
    """
    section, optim, denoiser = settings.model, settings.model.optim, model.denoiser
    source = section.denoiser_path or section.from_pretrained or base
    is_name = source is not None and is_hub_name(source) and not Path(source).exists()
    version, architecture = _ARCHITECTURES.get(type(model.pipe).__name__, ("", ""))
    if version == "sd_v1" and denoiser.config.get("cross_attention_dim") == 1024:
        version, architecture = "sd_v2", "stable-diffusion-v2-512"
    reward = settings.rm.get("name")
    weights = settings.tree["rm"].get("model") or {}
    file = weights.get("restore_from_path") if isinstance(weights, dict) else None
    shown = settings.shown["model"]
    method = section.algorithm.replace("+", "_plus")
    noted = {key: shown[key] for key in (*_NOTED, method, section.algorithm) if key in shown}
    if section.peft.is_lora:
        noted["peft"] = {"lora_tuning": shown["peft"]["lora_tuning"]}
        architecture = architecture and f"{architecture}/lora"
    notes = {
        "ss_output_name": settings.name,
        "ss_sd_model_name": (source if is_name else Path(source).name) if source else "the embedded model",
        "ss_sd_model_hash": _model_hash(source),
        "ss_base_model_version": version,
        "ss_learning_rate": str(optim.lr),
        "ss_optimizer": optim.name,
        "ss_lr_scheduler": optim.sched.name,
        "ss_max_train_steps": str(settings.loop.max_steps),
        "ss_seed": str(section.seed),
        "ss_total_batch_size": str(section.global_batch_size),
        "ss_training_comment": f"fine-tuning by {section.algorithm}, reward {reward}",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": settings.name,
        "modelspec.architecture": architecture,
        "modelspec.implementation": "diffusers",
        "nemo_aligner_diffusion.base_model_fingerprint": fingerprint(denoiser),
        "nemo_aligner_diffusion.method": section.algorithm,
        "nemo_aligner_diffusion.reward": f"{reward}{f' ({Path(file).name})' if file else ''}",
        "nemo_aligner_diffusion.settings": json.dumps(noted, default=str),
    }
    return {key: value for key, value in notes.items() if value}


def fingerprint(network: Any) -> str:
    """SHA-256 of the names, shapes and first 64 values (in bfloat16) of all weights, whatever files they came from.

    A moment's work, and another one for every fine-tune; the same whether they lie in one file or in a folder's shards,
    and are loaded in float32 or bfloat16. It is no hash of a file.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(network.named_parameters(), key=lambda pair: pair[0]):
        first = (weight.detach()[:1] if weight.ndim else weight.detach()).reshape(-1)[:64]
        values = first.bfloat16().cpu().view(torch.int16).numpy().tobytes()
        digest.update(f"{name} {tuple(weight.shape)}\n".encode() + values)
    return digest.hexdigest()


def _model_hash(source: str | None) -> str:
    """Of a single file: the short hash of old A1111, which sd-scripts still writes: of 64 KiB after the first MiB."""
    try:
        with open_regular(Path(source or "").expanduser()) as stream:
            stream.seek(0x100000)
            data = stream.read(0x10000)
    except OSError:  # a folder or the name of one
        return ""
    return hashlib.sha256(data).hexdigest()[:8] if data else ""


def whole_adapter(denoiser: Any, parallel: Parallelism) -> dict[str, Tensor]:
    """The adapter's tensors under the names that ``peft`` exports, each of them whole; on every process."""
    adapted = [(name, parameter) for name, parameter in denoiser.named_parameters() if ".lora_" in name]
    return lora_state_dict(denoiser, state={name: parallel.placement(name).full(value) for name, value in adapted})


def _write_denoiser(denoiser: Any, weights: dict[str, Tensor], directory: Path, notes: dict[str, str]) -> Path:
    remove_leftovers(directory.parent)
    import diffusers

    with torch.device("meta"):  # the class and the shapes as they were before anything was cut
        # not type(denoiser), which FSDP changes; a network that was never loaded has no name in its configuration
        kind = denoiser.config.get("_class_name", type(denoiser).__name__)
        plain = getattr(diffusers, kind).from_config(denoiser.config)
    plain.load_state_dict(weights, assign=True)
    with atomic_folder(directory) as folder:
        save_component(plain, folder, notes)
    return directory
