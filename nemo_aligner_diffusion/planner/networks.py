"""The model and the reward of a plan, as modules whose tensors have shapes and no memory.

They are built on the meta device and turned into PyTorch's fake tensors at the end (:func:`without_memory`), with which
the code that trains runs unchanged. The modules are those that train: ``StableDiffusion`` with
``diffusers``' networks, peft's adapters, the reward that the configuration builds. SDXL and the FLUX-shaped transformer
have no family in ``diffusion/families`` yet; what a family would do for them is written here, to plan ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from nemo_aligner_diffusion.diffusion.conditioning import Conditioning
from nemo_aligner_diffusion.diffusion.families.stable_diffusion import StableDiffusion
from nemo_aligner_diffusion.planner.presets import REWARDS, ModelSpec
from nemo_aligner_diffusion.rewards.base import Reward

# diffusers' defaults: a scheduler's arithmetic is elementwise on latents, and published models differ in numbers only
SCHEDULER: dict[str, Any] = {}


class FixedLengthTokenizer:
    """Any prompt is ``length`` tokens: the counts depend on nothing else."""

    def __init__(self, length: int) -> None:
        self.model_max_length = length

    def __call__(self, prompts: str | Sequence[str], **options: Any) -> Any:
        one = isinstance(prompts, str)
        length = min(self.model_max_length, int(options.get("max_length") or self.model_max_length))
        rows = 1 if one else len(prompts)
        if options.get("return_tensors") == "pt":
            ids: Any = torch.zeros(rows, length, dtype=torch.long)
            return SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))
        ids = [[0] * length for _ in range(rows)]
        return SimpleNamespace(input_ids=ids[0] if one else ids)


class PlannedSDXL(StableDiffusion):
    """Two text encoders side by side, and the pooled text and the picture's size as extra conditioning."""

    def __init__(self, denoiser: Any, vae: Any, text_encoders: list[Any], length: int) -> None:
        super().__init__(denoiser, vae, text_encoders[0], FixedLengthTokenizer(length), SCHEDULER)
        self.text_encoder_2 = text_encoders[1].requires_grad_(False).eval()

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        tokens = self.tokenizer(list(prompts), return_tensors="pt").input_ids
        first = self.text_encoder(tokens, output_hidden_states=True)
        second = self.text_encoder_2(tokens, output_hidden_states=True)
        states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        sizes = torch.zeros(len(prompts), 6, dtype=states.dtype)
        return Conditioning(states, {"text_embeds": second.text_embeds, "time_ids": sizes})

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        dtype = self.denoiser.dtype
        return self.denoiser(
            latents.to(dtype),
            timestep,
            encoder_hidden_states=conditioning.encoder_hidden_states.to(dtype),
            added_cond_kwargs={name: value.to(dtype) for name, value in conditioning.extra.items()},
            return_dict=False,
        )[0].to(latents.dtype)


class PlannedFlux(StableDiffusion):
    """Latents packed 2×2 into tokens beside the text's tokens; CLIP's pooled state modulates every block."""

    def __init__(self, denoiser: Any, vae: Any, text_encoders: list[Any], length: int) -> None:
        denoiser.register_to_config(sample_size=1)  # a transformer has no size of its own
        super().__init__(denoiser, vae, text_encoders[0], FixedLengthTokenizer(length), SCHEDULER)
        self.text_encoder_2 = text_encoders[1].requires_grad_(False).eval()

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        tokens = self.tokenizer(list(prompts), return_tensors="pt").input_ids
        pooled = self.text_encoder(tokens[:, :77]).pooler_output
        return Conditioning(self.text_encoder_2(tokens)[0], {"pooled": pooled})

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        height, width = height or self.default_height, width or self.default_width
        return self.vae.config.latent_channels, height // self.vae_scale_factor, width // self.vae_scale_factor

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        dtype = self.denoiser.dtype
        b, c, h, w = latents.shape
        packed = latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)
        text = conditioning.encoder_hidden_states.to(dtype)
        guidance = torch.ones(b, dtype=dtype) if self.denoiser.config.guidance_embeds else None
        prediction = self.denoiser(
            hidden_states=packed.to(dtype),
            encoder_hidden_states=text,
            pooled_projections=conditioning.extra["pooled"].to(dtype),
            timestep=timestep.expand(b).to(dtype) / 1000,
            img_ids=torch.zeros(packed.shape[1], 3),
            txt_ids=torch.zeros(text.shape[1], 3),
            guidance=guidance,
            return_dict=False,
        )[0]
        rows = prediction.view(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return rows.reshape(b, c, h, w).to(latents.dtype)


def build_model(spec: ModelSpec) -> StableDiffusion:
    """The model of ``spec`` in float32 on the meta device."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    vae = AutoencoderKL(**spec.vae)
    encoders: list[Any] = []
    for position, (kind, config) in enumerate(spec.text_encoders):
        if kind == "t5":
            encoders.append(T5EncoderModel(T5Config(**config)))
        else:
            with_projection = spec.family == "sdxl" and position == 1
            encoder_class = CLIPTextModelWithProjection if with_projection else CLIPTextModel
            encoders.append(encoder_class(CLIPTextConfig(**config)))
    if spec.family == "flux":
        transformer = FluxTransformer2DModel(**spec.denoiser)
        model: StableDiffusion = PlannedFlux(transformer, vae, encoders, spec.text_length)
        model.default_height = model.default_width = spec.sample_size * model.vae_scale_factor
        return model
    unet = UNet2DConditionModel(**spec.denoiser)
    if spec.family == "sdxl":
        return PlannedSDXL(unet, vae, encoders, spec.text_length)
    return StableDiffusion(unet, vae, encoders[0], FixedLengthTokenizer(spec.text_length), SCHEDULER)


def preset_reward(name: str, model_settings: dict[str, Any]) -> Reward:
    """A CLIP reward of a published size; ``model_settings``: ``CLIPReward``'s keyword arguments."""
    from transformers import CLIPConfig, CLIPModel

    from nemo_aligner_diffusion.rewards.clip import CLIPReward

    text, vision = REWARDS[name]
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=text["projection_dim"])
    tokenizer: Any = FixedLengthTokenizer(text["max_position_embeddings"])
    return CLIPReward(CLIPModel(config), tokenizer, **model_settings)


def without_memory(module: nn.Module, mode: Any) -> None:
    """Replace a module's tensors, real ones or the meta device's, by fake CPU tensors of ``mode``.

    (Built on the meta device first: peft and ``Module.to`` cannot convert fake tensors.)
    """
    made: dict[int, Tensor] = {}  # tied weights stay tied

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            with mode:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
        return made[id(tensor)]

    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in list(tensors.items()):
                if tensor is not None:
                    tensors[name] = fake(tensor)  # type: ignore[assignment]
