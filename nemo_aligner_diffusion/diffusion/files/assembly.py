"""A pipeline out of single files: denoiser and VAE, or the whole model in one, of a recognised architecture."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

import torch

from nemo_aligner_diffusion.diffusion.files.architectures import ARCHITECTURES, Architecture, fitted, plain
from nemo_aligner_diffusion.diffusion.files.parts import check_vae, network_of_file, text_parts
from nemo_aligner_diffusion.diffusion.recognition import Recognised, denoiser_shapes, vae_shapes
from nemo_aligner_diffusion.errors import CheckpointError, printable
from nemo_aligner_diffusion.formats.checkpoints import component_config
from nemo_aligner_diffusion.formats.files import read_json
from nemo_aligner_diffusion.formats.weight_files import find_weights, read_shapes

log = logging.getLogger(__name__)

_TOKENIZERS = {"CLIP": "CLIPTokenizer", "T5En": "T5TokenizerFast"}


def assemble(
    found: Recognised,
    denoiser: Path,
    vae: Path | None,
    text: str | None,
    dtype: torch.dtype,
    revision: str | None = None,
    whole: Path | None = None,
) -> Any:
    """The pipeline.

    Args:
        found: what ``denoiser`` is.
        denoiser: its file or folder.
        vae: its file or folder; ``None``: in ``whole``.
        text: folder or hub id of text encoders and tokenizers; ``None``: the architecture's.
        whole: a file that may hold text encoders, too, and the VAE.

    Raises:
        CheckpointError: a part is missing, does not fit, or is of an architecture that is read from folders alone.
    """
    import diffusers

    kind = ARCHITECTURES.get(found.architecture)
    if kind is None or not kind.in_files:
        raise CheckpointError(
            f"{denoiser}: the transformer of {found.pipeline}, which is not put together from single files here. Give "
            f"its diffusers folder or hub id as model.from_pretrained"
        )
    vae = vae or whole or denoiser
    vaes = vae_shapes(read_shapes(find_weights(vae, "vae")[0]))
    if not vaes:
        raise CheckpointError(
            f"{vae}: holds no VAE; give that of {kind.title} as model.first_stage_config.from_pretrained"
        )
    own = denoiser_shapes(read_shapes(find_weights(denoiser, kind.denoiser)[0]))
    parts = {
        kind.denoiser: _network(kind, kind.denoiser, denoiser, own, dtype),
        "vae": _network(kind, "vae", vae, vaes, dtype),
    }
    check_vae(parts["vae"], kind.components["vae"][1], vae)
    encoders = {name: part for name, (part, _) in kind.components.items() if name.startswith("text_encoder")}
    tokenizers = {n.replace("text_encoder", "tokenizer"): _TOKENIZERS[part[:4]] for n, part in encoders.items()}
    configs = {name: kind.components[name][1] for name in encoders}
    file = whole if whole is not None and whole.is_file() else None
    sources, of = ([text], revision) if text else (kind.text, None)
    given, folder, texts = text_parts(encoders, tokenizers, sources, dtype, of, file, configs)
    parts |= given
    _check_width(parts, denoiser, folder)
    parts["scheduler"] = marked(_scheduler(kind, folder, found), found)
    pipeline_class = getattr(diffusers, kind.pipeline)
    parameters = inspect.signature(pipeline_class.__init__).parameters.values()
    parts |= {p.name: None for p in parameters if p.default is p.empty and p.name not in ("self", *parts)}
    for option in ("requires_safety_checker", "add_watermarker"):
        if option in {p.name for p in parameters}:
            parts[option] = False
    log.info("%s: %s; %s", denoiser, kind.title, texts)
    return pipeline_class(**parts)


def _network(kind: Architecture, name: str, path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> Any:
    import diffusers

    part, published = kind.components[name]
    if not shapes and component_config(path, name) is None:
        raise CheckpointError(f"{path}: holds no {name} of {kind.title}")
    try:
        config = component_config(path, name) or fitted(part, published, shapes)
    except (KeyError, IndexError) as error:
        raise CheckpointError(
            f"{path}: lacks tensors of a {kind.title} {name}, such as {error}; fetch it again"
        ) from error
    return network_of_file(getattr(diffusers, part), name, config, path, dtype)


def _check_width(parts: dict[str, Any], denoiser: Path, folder: Path) -> None:
    if "unet" not in parts:
        return
    width = parts["unet"].config.cross_attention_dim
    widths = [part.config.hidden_size for name, part in parts.items() if name.startswith("text_encoder")]
    if sum(widths) != width:
        raise CheckpointError(
            f"{folder}: its text encoder gives {' + '.join(map(str, widths))} numbers a token, the UNet in {denoiser} "
            f"reads {width}; give model.cond_stage_config.from_pretrained, or --text, that belongs to it"
        )


def _scheduler(kind: Architecture, folder: Path, found: Recognised) -> Any:
    """The one beside the text encoders, where that is a pipeline's folder; else the architecture's."""
    import diffusers

    name, config = kind.scheduler
    file = folder / "scheduler" / "scheduler_config.json"
    if file.is_file():
        config = read_json(file, CheckpointError)
        name = str(config.get("_class_name"))
        known = getattr(diffusers, name, None)
        if not (isinstance(known, type) and issubclass(known, diffusers.SchedulerMixin)):
            raise CheckpointError(f"{file}: names {printable(name)!r}, which is no scheduler of diffusers")
    elif config.get("prediction_type") == "v_prediction" and not found.v_prediction:
        log.warning(
            "taken to predict v, as %s does; its 512-pixel base model predicts noise: give that one's repository as "
            "model.cond_stage_config.from_pretrained, whose scheduler is read",
            kind.title,
        )
    return getattr(diffusers, name).from_config(config)


def marked(scheduler: Any, found: Recognised) -> Any:
    """``scheduler`` as the denoiser's file says that it was trained: ``v_pred`` and ``ztsnr`` among its tensors."""
    import diffusers

    changes: dict[str, Any] = {"prediction_type": "v_prediction"} if found.v_prediction else {}
    if found.zero_snr:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if not changes:
        return scheduler
    kind: Any = type(scheduler)
    if not set(changes) <= set(inspect.signature(kind.__init__).parameters):  # PNDM cannot begin without signal
        kind = diffusers.DDIMScheduler
    log.info("marked in the file: %s", ", ".join(f"{name} = {value}" for name, value in changes.items()))
    return kind.from_config({**plain(dict(scheduler.config)), **changes})
