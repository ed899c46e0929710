"""The settings of the model, of sampling and of what is trained. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.settings import (
    BOOL,
    FRACTION,
    FREE,
    PATH,
    Kind,
    Settings,
    choice,
    integer,
    number,
    part,
    setting,
)

# name in `model.infer.sampler_type` -> (diffusers class, configuration that makes it that sampler)
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {"clip_sample": False}),
    "PLMS": ("PNDMScheduler", {"skip_prk_steps": True}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "DPM++2M": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "DPM++2M_SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "UniPC": ("UniPCMultistepScheduler", {}),
}
# model.family: what recognition.py tells apart, and all others
FAMILIES = (
    "embedded",
    "sd15",
    "sd21",
    "sdxl",
    "sd35",
    "flux1",
    "flux2",
    "flux2_klein",
    "qwen_image",
    "z_image",
    "other",
)
SAMPLER_ALIASES = {"DPM": "DPM++2M", "DPMSolver++": "DPM++2M", "PARA_DDIM": "DDIM"}


@dataclass(frozen=True)
class PipelineSettings(Settings):
    """What is declared about the pipeline, beyond what docs/models.md lists for its class."""

    section = "model.pipeline"

    trained: str | None = setting(
        None,
        Kind("text", nullable=True),
        "component that is trained; null: its denoiser (unet or transformer)",
    )
    stateless: tuple[str, ...] | None = setting(
        None,
        Kind("texts", nullable=True),
        "class names of objects it hands to its networks that remember nothing from call to call; null: none",
    )
    arguments: dict[str, Any] = setting(
        {},
        FREE,
        "further arguments of the pipeline's call: {max_sequence_length: 256, negative_prompt: blurry}",
    )

    def declared(self) -> dict[str, Any]:
        """As the model takes it."""
        return {"trained": self.trained, "stateless": list(self.stateless or ()), "arguments": self.arguments}


@dataclass(frozen=True)
class SamplingSettings(Settings):
    """How pictures are sampled, in training and validation."""

    section = "model.infer"

    unconditional_guidance_scale: float | None = setting(
        None,
        number(0, nullable=True),
        "classifier-free guidance as the pipeline means it (usually 1: none); null: the pipeline's default",
    )
    inference_steps: int | None = setting(
        None,
        Kind("int", low=1, high=1000, nullable=True),
        "sampling steps T; integer >= 1, null: the pipeline's default",
    )
    sampler_type: str | None = setting(
        None,
        choice(*SAMPLERS, *SAMPLER_ALIASES, nullable=True),
        "null: the pipeline's own scheduler; DDIM, PLMS, Euler, DPM++2M, DPM++2M_SDE or UniPC, in any case",
    )
    eta: float = setting(
        0.0,
        Kind("float", low=0, high=1),
        "DDIM's noise in each step: 0 none, 1 as much as DDPM; in [0, 1]; 0 with every other sampler",
    )
    height: int | None = setting(
        None, integer(8, nullable=True), "picture height in pixels; multiple of 8, null: the model's own"
    )
    width: int | None = setting(
        None, integer(8, nullable=True), "picture width in pixels; multiple of 8, null: the model's own"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for side in ("height", "width"):
            pixels = getattr(self, side)
            if pixels is not None and pixels % 8:
                raise ConfigurationError(
                    f"model.infer.{side} = {pixels}: expected a multiple of 8 pixels, such as {pixels // 8 * 8 or 8} "
                    f"or {pixels // 8 * 8 + 8}"
                )
        if self.eta and SAMPLER_ALIASES.get(self.sampler_type or "", self.sampler_type) not in (None, "DDIM"):
            raise ConfigurationError(
                f"{self.given('eta')} with {self.given('sampler_type')}: eta is DDIM's own; expected 0, or "
                "sampler_type=DDIM"
            )


@dataclass(frozen=True)
class DecoderSettings(Settings):
    """How pictures are decoded for the reward in training; validation and generate.py use the plain VAE."""

    section = "model.first_stage_config"

    activation_checkpointing: bool = setting(
        False, BOOL, "recompute the decoder's blocks in its backward pass: less memory, one forward pass more"
    )
    tiling: int | None = setting(
        None,
        Kind("int", low=64, nullable=True),
        "in training, decode by tiles of N pixels a side: little memory, another picture at seams; multiple of 64",
    )
    small_decoder: str | None = setting(
        None,
        PATH,
        "in training, decode by this one (TAESD or like it: diffusers folder, or file); null: by the VAE",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tiling is not None and self.tiling % 64:
            raise ConfigurationError(
                f"{self.given('tiling')}: expected a multiple of 64 pixels, such as {self.tiling // 64 * 64}"
            )

    def unread(self) -> dict[str, str]:
        return {} if self.small_decoder is None or self.tiling is None else {"tiling": "a small decoder decodes whole"}

    @property
    def other_picture(self) -> str | None:
        """What the reward sees in training in the place of the VAE's picture, in words; ``None``: that picture."""
        if self.small_decoder is not None:
            return f"pictures of the small decoder {self.small_decoder}"
        return None if self.tiling is None else f"pictures decoded by tiles of {self.tiling} pixels"


@dataclass(frozen=True)
class LoRASettings(Settings):
    """The adapters."""

    section = "model.peft.lora_tuning"

    adapter_dim: int | None = setting(
        8, integer(1, nullable=True), "rank r; integer >= 1, null: that of restore_from_path, and the default with it"
    )
    alpha: float | None = setting(
        32,
        number(above=0, nullable=True),
        "the adapter's output is scaled by alpha / r; > 0, null: r, that is 1",
    )
    dropout: float = setting(0.0, FRACTION, "share of the adapter's input dropped in training; in [0, 1)")
    target_modules: tuple[str, ...] | None = setting(
        None,
        Kind("texts", nullable=True),
        "ends of the names of the layers that get an adapter: [to_q, to_k, …]; null: its family's (docs/models.md)",
    )


@dataclass(frozen=True)
class TunedSettings(Settings):
    """What is trained."""

    section = "model.peft"
    title = "What is trained"

    peft_scheme: str = setting(
        "sdlora", choice("sdlora", "none"), "sdlora: LoRA; none: train every weight of the denoiser"
    )
    restore_from_path: str | None = setting(
        None,
        PATH,
        "LoRA to go on with: an export folder or a .safetensors file of any trainer; null: a new one",
    )
    lora_tuning: LoRASettings = part(LoRASettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.restore_from_path is not None and not self.is_lora:
            raise ConfigurationError(
                f"{self.given('restore_from_path')} with peft_scheme=none: an adapter is gone on with as one "
                "(peft_scheme=sdlora); to train every weight from it, merge it first: nad-export --to pipeline"
            )
        if self.restore_from_path is None and self.lora_tuning.adapter_dim is None:
            raise ConfigurationError(
                f"{self.lora_tuning.given('adapter_dim')} without model.peft.restore_from_path: expected 1 or more"
            )

    @property
    def is_lora(self) -> bool:
        return self.peft_scheme == "sdlora"

    def unread_keys(self) -> dict[str, str]:
        reason = "model.peft.peft_scheme=none trains every weight"
        return {} if self.is_lora else dict.fromkeys(LoRASettings.keys().values(), reason)


@dataclass(frozen=True)
class Float8Settings(Settings):
    """Products in float8, for trainer.precision=fp8 and model.rollout_precision=fp8."""

    section = "model.fp8"

    backend: str = setting(
        "torchao",
        choice("torchao", "transformer_engine"),
        "torchao, or transformer_engine (NVIDIA's containers have it)",
    )
    recipe: str = setting(
        "tensorwise", choice("tensorwise", "rowwise"), "a scale for each tensor, or for each row (slower)"
    )
    scope: tuple[str, ...] | None = setting(
        None, Kind("texts", nullable=True), "ends of the names of the linear layers; null: all inside of the blocks"
    )
    emulate: bool = setting(False, BOOL, "compute it in software: rounds alike, slow, on any device; for tests")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backend == "transformer_engine" and (self.emulate or self.recipe == "rowwise"):
            raise ConfigurationError(
                f"{self.given('backend')} with {self.given('recipe')}, {self.given('emulate')}: it has a scale a "
                "tensor and needs the hardware; expected recipe=tensorwise and emulate=false"
            )


@dataclass(frozen=True)
class WeightsSettings(Settings):
    """The model: any text-to-image pipeline of `diffusers`; with nothing set, the embedded one."""

    section = "model"

    family: str | None = setting(
        None,
        choice(*FAMILIES, nullable=True),
        "whose settings hold where nothing else is said: a file of conf/family; null: the checkpoint's",
    )
    family_because: str | None = setting(
        None, Kind("text", nullable=True), "by what the family was recognised; the program writes it"
    )
    from_pretrained: str | None = setting(
        None,
        PATH,
        "diffusers folder, hub id or one file of the whole pipeline; null: unet_config's, else the embedded",
    )
    revision: str | None = setting(
        None, Kind("text", nullable=True), "branch, tag or commit of a hub id; null: its main branch"
    )
    denoiser_path: str | None = setting(
        None,
        PATH,
        "diffusers folder or one file (.safetensors, .ckpt, .bin); diffusers', CompVis's or NeMo's; path, null: the "
        "model's",
        key="model.unet_config.from_pretrained",
    )
    vae_path: str | None = setting(None, PATH, "as above", key="model.first_stage_config.from_pretrained")
    text_path: str | None = setting(
        None,
        PATH,
        "folder or hub id of text encoders and tokenizers; null: the model's, or those published with its architecture",
        key="model.cond_stage_config.from_pretrained",
    )
    cache_prompts: int = setting(
        0,
        integer(0),
        "prompts whose embeddings are kept in host memory: each is encoded once, not in every step; 0: none",
        key="model.cond_stage_config.cache_prompts",
    )
    frozen_precision: str | None = setting(
        None,
        choice("32", "bf16", "int8", "fp8", nullable=True),
        "of frozen weights (encoders, VAE, base): 32, bf16, or linear layers' in int8 or fp8; null: as loaded",
    )
    fp8: Float8Settings = part(Float8Settings)
    decoder: DecoderSettings = part(DecoderSettings)
    pipeline: PipelineSettings = part(PipelineSettings)
    infer: SamplingSettings = part(SamplingSettings)
    peft: TunedSettings = part(TunedSettings)
