"""Given pictures as the latents that a pipeline's denoiser is handed, and what is stored of them."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemo_aligner_diffusion.diffusion.schedule import KeyedNoise
from nemo_aligner_diffusion.errors import ConfigurationError

if TYPE_CHECKING:
    from nemo_aligner_diffusion.diffusion.model import DiffusionModel

_ENCODES_BY = ("act_fn", "norm_num_groups", "down_block_types")  # what shapes of weights do not show


def encode(
    model: DiffusionModel,
    pictures: Tensor,
    generators: Sequence[torch.Generator] | None = None,
    *,
    latent_shape: Sequence[int] | None = None,
) -> Tensor:
    """Latents ``(B, *latent_shape)`` of pictures, as the denoiser is handed them; no gradient, at least float32.

    Args:
        pictures: ``(B, 3, H, W)`` in [0, 1].
        generators: a CPU generator for each row: a sample of the VAE's posterior; ``None``: its mode.
        latent_shape: of one sample, as :attr:`.DirectCalls.latent_shape` says.

    Raises:
        ConfigurationError: the pipeline's VAE encodes no pictures, or to another shape.
    """
    return from_moments(model, moments(model, pictures), generators, latent_shape=latent_shape)


@torch.no_grad()
def moments(model: DiffusionModel, pictures: Tensor) -> Tensor:
    """Mean and standard deviation of the VAE's posterior, not scaled, ``(B, 2, C, h, w)``, at least float32.

    They are the VAE's own, outside of any autocast, in its own dtype; in float32 where a half-precision VAE's
    configuration says ``force_upcast``. A VAE without a posterior has deviation 0.

    Args:
        pictures: ``(B, 3, H, W)`` in [0, 1].

    Raises:
        ConfigurationError: the pipeline has no VAE that encodes pictures.
    """
    vae = _vae(model)
    model.offload.bring("vae", model.device)
    parameter = next(vae.parameters())
    before = dtype = parameter.dtype
    if dtype in (torch.float16, torch.bfloat16) and vae.config.get("force_upcast"):
        dtype = torch.float32
        vae.to(dtype)
    try:
        with torch.autocast(parameter.device.type, enabled=False):
            # contiguous as stored ones are: kernels, and so rounding, are chosen by the layout, too
            return _posterior(vae, 2 * pictures.to(parameter.device, dtype) - 1).contiguous()
    finally:
        if dtype != before:
            vae.to(before)
        model.offload.release("vae")


def from_moments(
    model: DiffusionModel,
    moments: Tensor,
    generators: Sequence[torch.Generator] | None = None,
    *,
    latent_shape: Sequence[int] | None = None,
) -> Tensor:
    """Latents ``(B, *latent_shape)`` of :func:`moments`: mode or sample, scaled and packed as the pipeline does."""
    mean, deviation = moments.unbind(1)
    if generators is not None:
        mean = mean + deviation * KeyedNoise(generators).draw(mean.shape, mean)
    latents = from_vae(model, mean.unsqueeze(2) if _of_videos(_vae(model)) else mean)
    if latent_shape is not None and latents.shape[1:] != tuple(latent_shape):
        raise ConfigurationError(
            f"{type(model.pipe).__name__}: pictures became latents {tuple(latents.shape[1:])} and its denoiser is "
            f"called with {tuple(latent_shape)}; expected pictures of model.infer.height × width, from a "
            f"text-to-image pipeline"
        )
    return latents


def from_vae(model: DiffusionModel, latents: Tensor) -> Tensor:
    """A VAE's own latents ``(B, C, …)`` as the pipeline's denoiser is handed them: scaling, shift, packing."""
    config = _vae(model).config
    scaling = config.get("scaling_factor") or 1.0
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, std = (
            torch.as_tensor(config[name]).to(latents).reshape(1, -1, *[1] * (latents.ndim - 2))
            for name in ("latents_mean", "latents_std")
        )
        latents = (latents - mean) * scaling / std
    else:
        latents = (latents - (config.get("shift_factor") or 0.0)) * scaling
    pack = getattr(model.pipe, "_pack_latents", None)
    if pack is not None and len(inspect.signature(pack).parameters) == 5:
        latents = pack(latents, len(latents), latents.shape[1], *latents.shape[-2:])
    return latents


def vae_fingerprint(model: DiffusionModel) -> str:
    """sha256 of what :func:`moments` depends on: the VAE's class, its weights but the decoder's, how it encodes.

    Of weights what bfloat16 keeps counts: a VAE is the same in float32 and in bfloat16. Every process of a group that
    shards it must call this.
    """
    vae = _vae(model)
    told = {name: vae.config.get(name) for name in _ENCODES_BY}
    digest = hashlib.sha256(repr((type(vae).__name__, told)).encode())
    for name, weight in sorted(vae.state_dict().items()):
        if not name.startswith(("decoder.", "post_quant_conv.")):
            whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
            digest.update(f"{name} {tuple(whole.shape)}".encode())
            digest.update(whole.to("cpu", torch.bfloat16).reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _vae(model: DiffusionModel) -> Any:
    vae = model.networks.get("vae")
    if vae is None or not hasattr(vae, "encode"):
        raise ConfigurationError(
            f"{type(model.pipe).__name__} has no VAE that encodes pictures, which training on given pictures needs; "
            f"expected a latent text-to-image pipeline"
        )
    return vae


def _of_videos(vae: Any) -> bool:
    """Whether it takes frames, ``(B, 3, F, H, W)``."""
    return next((p.ndim for p in vae.parameters() if p.ndim >= 4), 4) == 5


def _posterior(vae: Any, pictures: Tensor) -> Tensor:
    """``(B, 2, C, h, w)`` of pictures in [-1, 1]."""
    videos = _of_videos(vae)
    output = vae.encode(pictures.unsqueeze(2) if videos else pictures)
    posterior = getattr(output, "latent_dist", None)
    if posterior is not None:
        mean, deviation = posterior.mean, posterior.std
    else:
        mean = next(x for x in (getattr(output, name, None) for name in ("latent", "latents")) if x is not None)
        deviation = torch.zeros_like(mean)
    both = torch.stack([mean, deviation.to(mean)], 1)
    return (both.squeeze(3) if videos else both).to(torch.promote_types(both.dtype, torch.float32))
