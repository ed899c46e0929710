"""How pictures are decoded, by rows and tiles, and by what: at size, the gradient through the decoder is the peak.

What ``model.first_stage_config`` asks for holds for the picture that the reward scores in training. Validation and
``generate.py`` decode it by the pipeline's own VAE, whole.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from nemo_aligner_diffusion.diffusion.settings import DecoderSettings
from nemo_aligner_diffusion.errors import CheckpointError, ConfigurationError, first_line, printable
from nemo_aligner_diffusion.formats.checkpoints import component_config, read_tensors

if TYPE_CHECKING:
    from nemo_aligner_diffusion.diffusion.model import DiffusionModel

_OVERLAP = 4  # neighbouring tiles share a quarter of their side, as diffusers' do


def decode(
    vae: Any,
    latents: Tensor,
    rows_at_a_time: int | None,
    *args: Any,
    tile: int | None = None,
    outside_autocast: bool = False,
    **kwargs: Any,
) -> Any:
    """``vae.decode(latents, *args, **kwargs)`` in the VAE's own dtype.

    Args:
        rows_at_a_time: with gradient, the rows of a batch are decoded again in the backward pass, so many at a time;
            ``None``: all at once.
        tile: side in pixels of tiles, recomputed one by one in the backward pass; ``None``: whole pictures.
        outside_autocast: see :func:`overflows_in_autocast`.
    """
    dtype = getattr(vae, "dtype", latents.dtype)  # another than the denoiser's, where frozen parts have their own

    def call(z: Tensor) -> Any:
        precision = torch.autocast(z.device.type, enabled=False) if outside_autocast else contextlib.nullcontext()
        with precision, _tiled(vae, tile):
            return vae.decode(z.to(dtype), *args, **kwargs)

    size = rows_at_a_time or len(latents)
    if size >= len(latents):
        return call(latents)
    parts = [
        checkpoint(call, rows, use_reentrant=False) if rows.requires_grad else call(rows)
        for rows in latents.split(size)
    ]
    return tree_map(lambda *rows: torch.cat(rows) if isinstance(rows[0], Tensor) else rows[0], *parts)


def decode_as_set_up(
    model: DiffusionModel,
    vae: Any,
    latents: Tensor,
    rows_at_a_time: int | None,
    in_training: bool,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """:func:`decode` by ``vae``, which is the pipeline's or its small decoder, as ``model.decoder`` says."""
    tile = model.decoder.tiling if in_training and vae is getattr(model.pipe, "vae", None) else None
    # to a VAE of bfloat16 autocast would add norms in float32 alone, which make most of the decoder's memory
    apart = getattr(vae, "dtype", None) == torch.bfloat16 or overflows_in_autocast(model.pipe, vae, latents.device)
    return decode(vae, latents, rows_at_a_time, *args, tile=tile, outside_autocast=apart, **kwargs)


def overflows_in_autocast(pipe: Any, vae: Any, device: torch.device) -> bool:
    """Whether ``vae`` must be kept out of the autocast that is on: SDXL's makes NaN of pictures in float16.

    Its pipelines convert a VAE *of* float16 to float32 while it decodes, and know nothing of autocast.
    """
    half = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16
    return half and hasattr(pipe, "upcast_vae") and bool(vae.config.get("force_upcast"))


def set_up_decoder(model: DiffusionModel, settings: DecoderSettings, small: Any = None) -> None:
    """Let the pictures of training be decoded as ``settings`` say.

    Args:
        small: what :func:`load_small_decoder` gave for ``settings.small_decoder``.

    Raises:
        ConfigurationError: the pipeline's VAE has no such mode; the small decoder is not for its latents.
    """
    if settings == DecoderSettings():
        return
    pipe = type(model.pipe).__name__
    vae = getattr(model.pipe, "vae", None)
    if vae is None:
        raise ConfigurationError(f"model.first_stage_config: {pipe} has no VAE; leave its keys as they are by default")
    if small is not None:
        _check_small(settings.given("small_decoder"), vae, small)
        model.small_decoder = small.requires_grad_(False).eval()
    decoder = small or vae
    if settings.activation_checkpointing:
        if not decoder._supports_gradient_checkpointing:
            raise ConfigurationError(
                f"{settings.given('activation_checkpointing')}: diffusers has none for {type(decoder).__name__}; leave "
                f"it false, and use model.first_stage_config.tiling or model.decode_micro_batch_size=1"
            )
        decoder.enable_gradient_checkpointing()  # in force wherever a gradient is asked for, in evaluation mode too
    if settings.tiling is not None and small is None:
        _tile_sizes(vae, settings.tiling)
    model.decoder = settings


# small decoders


def load_small_decoder(path: str | Path) -> Any:
    """An autoencoder of ``diffusers`` from a folder, or TAESD's decoder from one file; float32, on the CPU.

    Args:
        path: a folder with ``config.json``; or a file of a decoder of TAESD's shape (TAESD, TAESDXL, TAESD3, TAEF1) in
            diffusers' names or in its author's (``1.weight``, ``3.conv.0.weight``, …).

    Raises:
        CheckpointError: not such a folder or file, or weights are missing; by name.
    """
    import diffusers

    path = Path(path).expanduser()
    small: Any
    if path.is_dir():
        config = component_config(path, "vae") or {}
        kind = getattr(diffusers, str(config.get("_class_name")), None)
        if not (isinstance(kind, type) and issubclass(kind, diffusers.models.autoencoders.vae.AutoencoderMixin)):
            raise CheckpointError(
                f"{path}: expected a small decoder with a config.json that names an autoencoder of diffusers, such as "
                f"AutoencoderTiny; it says {printable(str(config.get('_class_name')), 80)}"
            )
        known: Any = kind
        try:
            small, report = known.from_pretrained(path, local_files_only=True, output_loading_info=True)
        except Exception as error:  # a dozen types for what is damaged or missing
            raise CheckpointError(f"{path}: not a complete {kind.__name__} folder: {first_line(error)}") from error
        missing = [name for name in report["missing_keys"] if not name.startswith("encoder.")]
    else:
        tensors = {_diffusers_name(name): tensor for name, tensor in read_tensors(path).items()}
        first = tensors.get("decoder.layers.0.weight")
        if first is None or first.ndim != 4:
            raise CheckpointError(
                f"{path}: no decoder of TAESD's shape: expected 1.weight or decoder.layers.0.weight in it, found "
                f"{', '.join(printable(name, 60) for name in list(tensors)[:3])}"
            )
        small = diffusers.AutoencoderTiny(latent_channels=first.shape[1])
        decoder = {name: tensor for name, tensor in tensors.items() if name.startswith("decoder.")}
        try:
            missing = [n for n in small.load_state_dict(decoder, strict=False)[0] if not n.startswith("encoder.")]
        except RuntimeError as error:  # shapes
            raise CheckpointError(f"{path}: no decoder of TAESD's shape: {first_line(error)}") from error
    if missing:
        raise CheckpointError(f"{path}: lacks {len(missing)} weights of the decoder, such as {missing[0]}")
    tiny: Any = diffusers.AutoencoderTiny  # mypy would narrow to a class whose attributes it does not know
    if isinstance(small, tiny):
        small.encoder = None  # nothing is encoded
    return small


def _diffusers_name(name: str) -> str:
    """Of a tensor of TAESD's own decoder file: a sequence that begins with the clamp, which diffusers has outside."""
    found = re.fullmatch(r"(\d{1,3})\.(.+)", name)
    return name if found is None else f"decoder.layers.{int(found[1]) - 1}.{found[2]}"


def _check_small(given: str, vae: Any, small: Any) -> None:
    """The pipeline scales latents by its VAE's configuration: a decoder for them is of its class, or TAESD's for the
    class that TAESD was made for."""
    import diffusers

    tiny = isinstance(small, diffusers.AutoencoderTiny)
    channels = [part.config.get("latent_channels") for part in (vae, small)]
    if not (type(small) is type(vae) or (tiny and type(vae) is diffusers.AutoencoderKL)) or channels[0] != channels[1]:
        raise ConfigurationError(
            f"{given}: an {type(small).__name__} of {channels[1]} latent channels cannot decode for this pipeline's "
            f"{type(vae).__name__} of {channels[0]}; expected a small decoder that was made for this model's latents"
        )


# tiles


@contextlib.contextmanager
def _tiled(vae: Any, tile: int | None) -> Iterator[None]:
    """Within, ``vae`` decodes by tiles of its own, each recomputed in its backward pass."""
    if tile is None:
        yield
        return
    changed = {"use_tiling": True, **_tile_sizes(vae, tile)}
    before = {name: getattr(vae, name) for name in changed}
    whole = vae.decoder
    vae.__dict__.update(changed)
    vae._modules["decoder"] = _Recomputed(whole)
    try:
        yield
    finally:
        vae._modules["decoder"] = whole
        vae.__dict__.update(before)


class _Recomputed(nn.Module):
    """``module`` that keeps its inputs alone for the backward pass, and is called again in it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.module(*args, **kwargs)
        lists = {name: list(value) for name, value in kwargs.items() if isinstance(value, list)}
        first = True

        def call(*args: Any) -> Any:
            # decoders of videos write the last frames into lists that they are given: here as before the first call
            nonlocal first
            given, first = kwargs if first else {**kwargs, **{name: list(x) for name, x in lists.items()}}, False
            return self.module(*args, **given)

        return checkpoint(call, *args, use_reentrant=False)


def _tile_sizes(vae: Any, tile: int) -> dict[str, int]:
    """The attributes by which diffusers' autoencoders know their tiles, for tiles of ``tile`` pixels."""
    if getattr(vae, "tile_latent_min_size", 0):
        ratio = vae.tile_sample_min_size // vae.tile_latent_min_size
        return {"tile_sample_min_size": tile, "tile_latent_min_size": tile // ratio}
    if hasattr(vae, "tile_sample_stride_height"):
        ratio = vae.spatial_compression_ratio
        stride = (tile - tile // _OVERLAP) // ratio * ratio
        sides = ("height", "width")
        return {
            f"tile_sample_{what}_{side}": size for side in sides for what, size in (("min", tile), ("stride", stride))
        }
    raise ConfigurationError(
        f"model.first_stage_config.tiling = {tile}: diffusers cannot decode by tiles of a size with "
        f"{type(vae).__name__}; leave it null, and use model.decode_micro_batch_size=1"
    )
