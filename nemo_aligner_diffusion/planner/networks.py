"""The pipeline and the reward of a plan, built from configurations; a ``diffusers`` pipeline's own ``__call__`` runs on
them (:func:`call_pipeline`). Stand-ins are what matters by its numbers only: the tokenizers and the scheduler.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor
from transformers import BatchEncoding

from nemo_aligner_diffusion.diffusion.decoding import load_small_decoder, set_up_decoder
from nemo_aligner_diffusion.diffusion.lora import add_lora
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.diffusion.taps import Proxy, in_place_of, undecorated
from nemo_aligner_diffusion.errors import AlignerError, ConfigurationError, first_line
from nemo_aligner_diffusion.planner.presets import REWARDS, ModelSpec
from nemo_aligner_diffusion.planner.settings import Case, Settings
from nemo_aligner_diffusion.rewards.base import Reward
from nemo_aligner_diffusion.training.build import FROZEN_DTYPES, convert_frozen


class FixedLengthTokenizer:
    """Any prompt is ``length`` tokens: the counts depend on nothing else."""

    def __init__(self, length: int) -> None:
        self.model_max_length = length

    def __call__(self, text: str | Sequence[str], **options: Any) -> BatchEncoding:
        length = min(self.model_max_length, int(options.get("max_length") or self.model_max_length))
        if options.get("padding") == "longest" and not options.get("truncation"):
            length = 1  # pipelines ask so whether a prompt was cut: none was
        rows = 1 if isinstance(text, str) else len(text)
        ids, mask = ([[number] * length] * rows for number in (0, 1))
        if options.get("return_tensors") == "pt":  # real ones, whose values pipelines may look at
            return BatchEncoding({"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)})
        return BatchEncoding({"input_ids": ids[0] if isinstance(text, str) else ids})

    def encode(self, prompt: str) -> list[int]:
        return [0] * 8

    def tokenize(self, prompt: str) -> list[str]:
        """None of a prompt's words is one that textual inversion added."""
        return []

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        return "a chat"


class AnyScheduler(SchedulerMixin, ConfigMixin):
    """A scheduler's arithmetic is elementwise on latents; which numbers it multiplies by is no matter here."""

    order, init_noise_sigma = 1, 1.0

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000) -> None:
        self.stepped: Callable[[Tensor], None] = lambda prediction: None

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None, **others: Any
    ) -> None:
        steps = len(sigmas) if num_inference_steps is None else num_inference_steps
        self.timesteps = torch.tensor([999 * (1 - i / steps) for i in range(steps)])

    def set_begin_index(self, begin_index: int = 0) -> None:
        pass

    def scale_model_input(self, sample: Tensor, *_: Any) -> Tensor:
        return sample

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:
        self.stepped(model_output)
        after = torch.add(sample * 0.5, model_output, alpha=0.5)
        return SimpleNamespace(prev_sample=after) if return_dict else (after,)


def build_model(spec: ModelSpec, **declared: Any) -> DiffusionModel:
    """The pipeline of ``spec`` in float32, on the default device; ``declared``: the ``model.pipeline`` section."""
    import diffusers
    import transformers

    parts: dict[str, Any] = {}
    for name, (kind, config) in spec.components.items():
        if hasattr(diffusers, kind):
            parts[name] = getattr(diffusers, kind)(**config)
        else:
            network_class = getattr(transformers, kind)
            parts[name] = network_class(network_class.config_class(**config))
            # some have no limit and others a far one: pipelines say what they want
            length = getattr(parts[name].config, "max_position_embeddings", None) or 512
            parts[name.replace("text_encoder", "tokenizer")] = FixedLengthTokenizer(length)
    pipeline_class = getattr(diffusers, spec.pipeline)
    needed = [p.name for p in inspect.signature(pipeline_class).parameters.values() if p.default is p.empty]
    pipe = pipeline_class(**{**dict.fromkeys(needed), **spec.options, **parts, "scheduler": AnyScheduler()})
    return DiffusionModel(pipe, **declared)


def call_pipeline(
    model: DiffusionModel,
    inputs: dict[str, Any],
    network: Callable[..., Any],
    stepped: Callable[[Tensor], None] = lambda prediction: None,
    decode: Callable[..., Any] | None = None,
    vae: Any = None,
) -> Tensor:
    """The pipeline's own ``__call__`` on ``inputs``; latents, or pictures with ``decode``.

    Args:
        network: called in the trained network's place.
        stepped: called with the guided prediction of every step.
        decode: called in the place of the VAE's.
        vae: the one that it decodes by; ``None``: the pipeline's.

    Raises:
        ConfigurationError: the pipeline does not run on shapes, or not with these stand-ins.
    """
    tapped, scheduler, vae = copy.copy(model.pipe), AnyScheduler(), vae or model.pipe.vae
    scheduler.stepped = stepped
    parts = {model.trained: Proxy(model.denoiser, {"__call__": network}), "scheduler": scheduler}
    if decode is not None:
        parts["vae"] = Proxy(vae, {"decode": in_place_of(vae.decode, decode)})
    parts |= dict.fromkeys({"safety_checker", "watermark"} & vars(tapped).keys())  # numpy
    tapped.__dict__.update(parts)
    tapped.set_progress_bar_config(disable=True)
    given = {name: list(value) if isinstance(value, list) else value for name, value in inputs.items()}
    try:
        return undecorated(type(model.pipe))(
            tapped, **given, output_type="latent" if decode is None else "pt", return_dict=False
        )[0]
    except AlignerError:
        raise
    except Exception as error:  # whatever diffusers and transformers make of tensors without values
        raise ConfigurationError(
            f"{type(model.pipe).__name__} cannot be planned: on tensors that have shapes only, with a stand-in for its "
            f"tokenizers, it ends with {type(error).__name__}: {first_line(error)}"
        ) from error


def preset_reward(name: str, **model_settings: Any) -> Reward:
    """A CLIP reward of a published size; ``model_settings``: ``CLIPReward``'s keyword arguments."""
    from transformers import CLIPConfig, CLIPModel

    from nemo_aligner_diffusion.rewards.clip.reward import CLIPReward

    config: Any = CLIPConfig(**REWARDS[name])
    tokenizer: Any = FixedLengthTokenizer(config.text_config.max_position_embeddings)
    return CLIPReward(CLIPModel(config), tokenizer, **model_settings)


def model_of(settings: Settings, case: Case) -> DiffusionModel:
    """As ``training.build`` does, from an architecture instead of weights."""
    section = settings.run.model
    model = build_model(settings.spec, **section.pipeline.declared())
    with torch.device("cpu"):
        small = section.decoder.small_decoder and load_small_decoder(section.decoder.small_decoder)
    set_up_decoder(model, section.decoder, small)
    if settings.lora is not None:
        tuning = settings.lora
        targets = list(tuning.target_modules or model.lora_targets)
        rank = tuning.adapter_dim or 32  # a file's is not looked up: that of most families
        add_lora(model.denoiser, rank, tuning.alpha, tuning.dropout, targets)
    else:
        model.denoiser.requires_grad_(True)
        model.keep_reference()
    if case.activation_checkpointing:
        model.denoiser.enable_gradient_checkpointing()
    weights, vae = getattr(torch, settings.precision[0]), model.pipe.vae
    model.to(weights)  # the reward has a precision of its own
    if section.frozen_precision is not None:
        convert_frozen(model, FROZEN_DTYPES[section.frozen_precision] or weights)
    if weights == torch.float16 and hasattr(model.pipe, "upcast_vae") and vae.config.get("force_upcast"):
        vae.float()  # as its pipeline does for the decoding: a conversion that fakes refuse
    model.denoiser.train()
    return model


def reward_of(settings: Settings) -> Reward:
    from nemo_aligner_diffusion.rewards.augmentation import Augmentation
    from nemo_aligner_diffusion.rewards.registry import build_reward
    from nemo_aligner_diffusion.rewards.settings import PRECISIONS
    from nemo_aligner_diffusion.rewards.support.augmented import augmented

    rm = settings.run.rm
    if settings.reward is None:
        with torch.device("cpu"):
            return build_reward(rm)
    model, trainer = rm.get("model", {}), rm.get("trainer", {})
    reward = preset_reward(
        settings.reward,
        micro_batch_size=model.get("micro_batch_size"),
        activation_checkpointing=bool(model.get("activation_checkpointing", False)),
    )
    precision = PRECISIONS[str(trainer.get("precision", 32))]
    return augmented(reward.to(getattr(torch, precision)), Augmentation(**rm.get("augment", {})))
