"""Stable Diffusion 1.x and 2.x (and the embedded model): one text encoder, a UNet with cross-attention, a KL VAE."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nemo_aligner_diffusion.diffusion.checkpoints import Component, component_config, empty_module, load_component
from nemo_aligner_diffusion.diffusion.conditioning import Conditioning
from nemo_aligner_diffusion.diffusion.lora import adapters_off, has_lora
from nemo_aligner_diffusion.errors import CheckpointError, first_line


class StableDiffusion(nn.Module):
    """Everything a trajectory needs of a latent diffusion model, and nothing else.

    Args:
        denoiser: ``UNet2DConditionModel``; the only part that is ever trained.
        vae: ``AutoencoderKL``, frozen.
        text_encoder: ``CLIPTextModel``, frozen.
        tokenizer: its tokenizer; ``model_max_length`` bounds a prompt.
        scheduler_config: configuration of the scheduler the model was trained with.

    Example::

        model = StableDiffusion.from_pretrained("path/to/diffusers/folder")
        conditioning = model.encode_prompts(["red apple"])
    """

    def __init__(
        self,
        denoiser: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        scheduler_config: dict[str, Any],
    ) -> None:
        super().__init__()
        # `Any`: diffusers' and transformers' models have attributes that a plain nn.Module has not
        self.denoiser: Any = denoiser
        self.vae: Any = vae.requires_grad_(False).eval()
        self.text_encoder: Any = text_encoder.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.scheduler_config = scheduler_config
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.default_height = self.default_width = denoiser.config.sample_size * self.vae_scale_factor
        self.truncated_prompts = 0  # prompts so far that were longer than the tokenizer's limit
        self.reference_denoiser: Any = None  # frozen copy, full fine-tuning with KL only
        self._unconditional: Conditioning | None = None

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        unet_path: str | Path | None = None,
        vae_path: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> StableDiffusion:
        """Load a ``diffusers`` pipeline folder; UNet and VAE weights may come from elsewhere.

        Args:
            folder: a Stable Diffusion pipeline folder with ``unet``, ``vae``, ``text_encoder``, ``tokenizer``,
                ``scheduler``.
            unet_path: ``model.unet_config.from_pretrained``: a folder or single file that replaces the UNet weights.
            vae_path: ``model.first_stage_config.from_pretrained``, the same for the VAE.
            dtype: of all weights.

        Raises:
            CheckpointError: a part is missing or does not fit.
        """
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        folder = Path(folder).expanduser()
        if not (folder / "model_index.json").is_file():
            raise CheckpointError(
                f"{folder}: no model_index.json there; model.from_pretrained must name a diffusers pipeline folder"
            )
        try:
            text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype, local_files_only=True)
            tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
            scheduler_config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text("utf-8"))
            parts = []
            sources: tuple[tuple[Any, Component, str | Path | None], ...] = (
                (UNet2DConditionModel, "unet", unet_path),
                (AutoencoderKL, "vae", vae_path),
            )
            for part_class, name, path in sources:
                if path is None:
                    part = part_class.from_pretrained(folder / name, torch_dtype=dtype, local_files_only=True)
                else:  # architecture: what the weights' own folder says, else the pipeline folder's
                    config = component_config(path, name) or component_config(folder / name, name)
                    part = empty_module(partial(part_class.from_config, config), dtype)
                    load_component(part, name, path)
                parts.append(part)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}: not a complete Stable Diffusion folder: {first_line(error)}") from error
        return cls(parts[0], parts[1], text_encoder, tokenizer, scheduler_config)

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.vae.parameters()).dtype

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Token states ``(B, L, C)``; longer prompts are truncated and counted in ``truncated_prompts``."""
        tokens = self.tokenizer(list(prompts), padding="max_length", truncation=False)
        limit = self.tokenizer.model_max_length
        self.truncated_prompts += sum(len(ids) > limit for ids in tokens.input_ids)
        tokens = self.tokenizer(
            list(prompts), padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
        )
        mask = None
        if getattr(self.text_encoder.config, "use_attention_mask", False):  # as diffusers' pipeline decides
            mask = tokens.attention_mask.to(self.device)
        states = self.text_encoder(tokens.input_ids.to(self.device), attention_mask=mask)[0]
        return Conditioning(states)

    def unconditional(self, batch_size: int) -> Conditioning:
        """The empty prompt, encoded once."""
        if self._unconditional is None or self._unconditional.encoder_hidden_states.device != self.device:
            self._unconditional = self.encode_prompts([""])
        return self._unconditional.expand(batch_size)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """``(C, h, w)`` of the latents of a ``height × width`` picture (pixels)."""
        height, width = height or self.default_height, width or self.default_width
        factor = self.vae_scale_factor
        return self.denoiser.config.in_channels, height // factor, width // factor

    @property
    def latent_like(self) -> Tensor:
        """An empty tensor of the device and dtype in which latents are kept: at least float32, whatever the weights."""
        return torch.empty(0, device=self.device, dtype=torch.promote_types(self.dtype, torch.float32))

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """One network call: latents ``(B, C, h, w)``, a timestep ``()`` or ``(B,)`` → prediction of the same shape.

        Computed in the denoiser's dtype (or autocast's), returned in the latents'.
        """
        dtype = self.denoiser.dtype
        prediction = self.denoiser(
            latents.to(dtype),
            timestep.to(latents.device),
            encoder_hidden_states=conditioning.encoder_hidden_states.to(dtype),
            return_dict=False,
        )[0]
        return prediction.to(latents.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents ``(B, C, h, w)`` → images ``(B, 3, H, W)`` in [0, 1], at least float32, differentiable."""
        config = self.vae.config
        scaled = latents.to(self.dtype) / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        decoded = self.vae.decode(scaled, return_dict=False)[0]
        return (decoded.to(self.latent_like.dtype) / 2 + 0.5).clamp(0, 1)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within, ``predict`` is the frozen pre-trained model θ₀ (LoRA: adapter off; full: the frozen copy)."""
        if has_lora(self.denoiser):
            with adapters_off(self.denoiser):
                yield
        elif self.reference_denoiser is not None:
            trained, self.denoiser = self.denoiser, self.reference_denoiser
            try:
                yield
            finally:
                self.denoiser = trained
        else:
            raise ValueError("full fine-tuning keeps no frozen copy; call keep_reference() before training")

    def keep_reference(self) -> None:
        """Full fine-tuning: copy the present weights as θ₀ (LoRA needs no copy)."""
        import copy

        if not has_lora(self.denoiser) and self.reference_denoiser is None:
            self.reference_denoiser = copy.deepcopy(self.denoiser).requires_grad_(False).eval()
