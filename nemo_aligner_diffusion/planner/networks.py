"""The pipeline and the reward of a plan, as modules whose tensors have shapes and no memory.

They are built on the meta device and turned into PyTorch's fake tensors at the end (:func:`without_memory`), with which
a ``diffusers`` pipeline's own ``__call__`` runs unchanged (:meth:`PlannedPipeline.__call__`). Stand-ins are what only
matters by its numbers: the tokenizers and the scheduler.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from transformers import BatchEncoding

from nemo_aligner_diffusion.diffusion.lora import adapters_off, has_lora
from nemo_aligner_diffusion.planner.presets import REWARDS, ModelSpec
from nemo_aligner_diffusion.rewards.base import Reward


class FixedLengthTokenizer:
    """Any prompt is ``length`` tokens: the counts depend on nothing else."""

    def __init__(self, length: int) -> None:
        self.model_max_length = length

    def __call__(self, prompts: str | Sequence[str], **options: Any) -> BatchEncoding:
        one = isinstance(prompts, str)
        length = min(self.model_max_length, int(options.get("max_length") or self.model_max_length))
        if options.get("padding") == "longest" and not options.get("truncation"):
            length = 1  # pipelines ask so whether a prompt was cut, and would compare the tokens: these have no values
        rows = 1 if one else len(prompts)
        if options.get("return_tensors") == "pt":
            ids: Any = torch.zeros(rows, length, dtype=torch.long)
            return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        ids = [[0] * length for _ in range(rows)]
        return BatchEncoding({"input_ids": ids[0] if one else ids})

    def tokenize(self, prompt: str) -> list[str]:
        """None of a prompt's words is one that textual inversion added."""
        return []

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        return "a chat"


class AnyScheduler(SchedulerMixin, ConfigMixin):
    """A scheduler's arithmetic is elementwise on latents; which numbers it multiplies by is no matter here."""

    order, init_noise_sigma = 1, 1.0

    @register_to_config
    def __init__(self) -> None:
        self.stepped: Callable[[Tensor], None] = lambda prediction: None

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None, **others: Any
    ) -> None:
        steps = len(sigmas) if num_inference_steps is None else num_inference_steps
        self.timesteps = torch.linspace(999, 1, steps)

    def set_begin_index(self, begin_index: int = 0) -> None:
        pass

    def scale_model_input(self, sample: Tensor, *_: Any) -> Tensor:
        return sample

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:
        self.stepped(model_output)
        after = torch.add(sample * 0.5, model_output, alpha=0.5)
        return SimpleNamespace(prev_sample=after) if return_dict else (after,)


class _Tapped:
    """A component whose ``__call__`` or ``decode`` is another's; everything else is its own."""

    def __init__(self, target: Any, call: Callable[..., Any] | None = None, decode: Callable[..., Any] | None = None):
        self._target, self._call = target, call or target
        self.decode = decode or getattr(target, "decode", None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)


class PlannedPipeline:
    """A ``diffusers`` pipeline built from configurations, and the calls of its parts.

    Attributes:
        denoiser: the component that is trained.
        reference: its frozen copy (full fine-tuning), if there is one.
        vae: its decoder makes the pictures.
        encoders: all other networks.
    """

    def __init__(self, spec: ModelSpec, pipe: Any) -> None:
        self.pipe = pipe.set_progress_bar_config(disable=True) or pipe
        # `Any`: diffusers' models have attributes that a plain nn.Module has not
        self.denoiser: Any = pipe.components[spec.denoiser]
        self.vae: Any = pipe.vae
        self.encoders = nn.ModuleList(
            part for part in pipe.components.values()
            if isinstance(part, nn.Module) and part not in (self.denoiser, self.vae)
        )  # fmt: skip
        self.reference: Any = None
        self._denoiser_name = spec.denoiser
        # without torch.no_grad's wrapper
        self._call: Any = inspect.unwrap(type(pipe).__call__)
        for network in self.networks:
            network.requires_grad_(False).eval()

    @property
    def networks(self) -> nn.ModuleList:
        return nn.ModuleList(part for part in (self.denoiser, self.reference, self.vae, self.encoders) if part)

    def keep_reference(self) -> None:
        self.reference = copy.deepcopy(self.denoiser).requires_grad_(False).eval()

    @contextmanager
    def frozen(self) -> Iterator[Any]:
        """Within, the denoiser before training: the copy, or the same with its adapters off."""
        if has_lora(self.denoiser):
            with adapters_off(self.denoiser):
                yield self.denoiser
        else:
            yield self.reference

    def __call__(
        self,
        inputs: dict[str, Any],
        network: Callable[..., Any],
        stepped: Callable[[Tensor], None] = lambda prediction: None,
        decode: Callable[..., Any] | None = None,
    ) -> Tensor:
        """The pipeline's own ``__call__`` on ``inputs`` (those that it knows); latents, or pictures with ``decode``.

        Args:
            network: called in the denoiser's place.
            stepped: called with the guided prediction of every step.
            decode: called in the place of ``vae.decode``.
        """
        tapped, scheduler = copy.copy(self.pipe), AnyScheduler()
        scheduler.stepped = stepped
        denoiser, vae = _Tapped(self.denoiser, call=network), _Tapped(self.vae, decode=decode)
        tapped.__dict__.update({self._denoiser_name: denoiser, "vae": vae, "scheduler": scheduler})
        inputs = {**inputs, "output_type": "pt" if decode else "latent", "return_dict": False}
        known = inspect.signature(self._call).parameters
        return self._call(tapped, **{name: value for name, value in inputs.items() if name in known})[0]


def build_pipeline(spec: ModelSpec) -> PlannedPipeline:
    """The pipeline of ``spec`` in float32, on the default device."""
    import diffusers
    import transformers

    parts: dict[str, Any] = {}
    for name, (kind, config) in spec.components.items():
        if hasattr(diffusers, kind):
            parts[name] = getattr(diffusers, kind)(**config)
        else:
            network_class = getattr(transformers, kind)
            parts[name] = network_class(network_class.config_class(**config))
            # T5 has no limit and language models a far one: pipelines say what they want
            length = int(config.get("max_position_embeddings") or 512)
            parts[name.replace("text_encoder", "tokenizer")] = FixedLengthTokenizer(length)
    pipeline_class = getattr(diffusers, spec.pipeline)
    needed = [p.name for p in inspect.signature(pipeline_class).parameters.values() if p.default is p.empty]
    pipe = pipeline_class(**{**dict.fromkeys(needed), **spec.options, **parts, "scheduler": AnyScheduler()})
    pipe.vae.register_to_config(force_upcast=False)  # to float32 for the decoding: a conversion that fakes refuse
    return PlannedPipeline(spec, pipe)


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
