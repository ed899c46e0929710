"""What a pipeline class declares beyond what can be read off it: one row each, found by the class's name.

A family is facts, no code: which network is trained and where LoRA goes, what the guidance argument is called, which
arguments are always given. A class without a row is read off its signature and components. How the published models are
sampled and trained stands in ``conf/family``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

UNET_LORA = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
             "conv_shortcut")  # fmt: skip
ATTENTION_LORA = ("to_q", "to_k", "to_v", "to_out.0")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
# both streams of an MM-DiT; the text's of its last block may have no effect on the picture
_JOINT = (*ATTENTION_LORA, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_FLUX2_LORA = (*_JOINT, "to_qkv_mlp_proj", "ff.linear_in", "ff.linear_out")
_HIDREAM_LORA = ("to_q", "to_k", "to_v", "to_out", "to_q_t", "to_k_t", "to_v_t", "to_out_t")
_KANDINSKY5_LORA = ("to_query", "to_key", "to_value", "feed_forward.in_layer", "feed_forward.out_layer")

# networks that predict in a pipeline's loop; the first that there is is the trained one
DENOISERS = ("unet", "transformer", "transformer_2", "prior", "decoder")

# arguments of a pipeline's call that are given here -> by what
OURS = {"prompt": "model.data", "num_inference_steps": "model.infer.inference_steps", "height": "model.infer.height",
        "width": "model.infer.width", "eta": "model.infer.eta", "generator": "model.seed",
        "output_type": "the training loop", "return_dict": "the training loop"}  # fmt: skip
# what pipelines call their guidance, the first that there is; and what sets it here
GUIDANCE = ("guidance_scale", "true_cfg_scale")
GUIDANCE_KEY = "model.infer.unconditional_guidance_scale"


@dataclass(frozen=True)
class Family:
    """Facts about a pipeline class.

    Attributes:
        trained: name of the component that is trained; ``None``: the first of :data:`DENOISERS` there is.
        lora_targets: ends of the names of modules that get an adapter by default, as far as there are such modules;
            ``None``: :data:`UNET_LORA` or :data:`ATTENTION_LORA`.
        guidance: the argument that guidance goes to.
        arguments: given in every call.
        gradient_in_training: class names of modules that run without gradient in evaluation mode: they are put into
            training mode for calls with gradient, alone of their network.
        signed: pictures come out in [-1, 1]; rewards get them in [0, 1].
        stateless: class names of objects handed to networks that carry nothing from call to call.
    """

    trained: str | None = None
    lora_targets: tuple[str, ...] | None = None
    guidance: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    stateless: tuple[str, ...] = ()
    gradient_in_training: tuple[str, ...] = ()
    signed: bool = False


# by the class's name without "Pipeline"
FAMILIES: dict[str, Family] = {
    "StableDiffusion3": Family(lora_targets=(*_JOINT, *_FEED_FORWARD)),
    "Flux": Family(lora_targets=(*_JOINT, *_FEED_FORWARD, "proj_mlp")),
    "Flux2": Family(lora_targets=_FLUX2_LORA),
    "Flux2Klein": Family(lora_targets=_FLUX2_LORA),
    # true guidance is off without a negative prompt
    "QwenImage": Family(lora_targets=(*_JOINT, "img_mlp.net.0.proj", "img_mlp.net.2"), guidance="true_cfg_scale",
                        arguments={"negative_prompt": " "}),
    "ZImage": Family(lora_targets=(*ATTENTION_LORA, "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")),
    "PixArtAlpha": Family(arguments={"use_resolution_binning": False}),
    "PixArtSigma": Family(arguments={"use_resolution_binning": False}),
    "Sana": Family(arguments={"use_resolution_binning": False}),
    "SanaSprint": Family(arguments={"use_resolution_binning": False}),
    "IF": Family(signed=True),
    "GlmImage": Family(stateless=("GlmImageKVCache",)),
    # the routed experts; in training mode the whole network would give patches, no latents
    "HiDreamImage": Family(lora_targets=_HIDREAM_LORA, gradient_in_training=("MOEFeedForwardSwiGLU",)),
    "Kandinsky5T2I": Family(lora_targets=_KANDINSKY5_LORA),
    "PRX": Family(arguments={"use_resolution_binning": False}),
}  # fmt: skip


def lora_targets(family: Family, trained: str) -> tuple[str, ...]:
    """Of the network that is the component ``trained``, for ``model.peft.lora_tuning.target_modules=null``."""
    return family.lora_targets or (UNET_LORA if trained == "unet" else ATTENTION_LORA)


def family_of(pipeline_class: type) -> Family:
    """The row of a pipeline class; an empty one where there is none."""
    return FAMILIES.get(pipeline_class.__name__.removesuffix("Pipeline"), Family())


def as_pipelines_write(value: Any) -> Any:
    """Sizes as tuples, which pipelines add to other tuples; a configuration has lists only."""
    numbers = isinstance(value, list) and all(isinstance(entry, int | float) for entry in value)
    return tuple(value) if numbers else value
