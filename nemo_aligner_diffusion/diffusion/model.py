"""A ``diffusers`` pipeline as the model: its parts as modules, what is trained of them, and what it is called with."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import Parameter

from nemo_aligner_diffusion.diffusion.families import (
    DENOISERS,
    GUIDANCE,
    GUIDANCE_KEY,
    OURS,
    Family,
    as_pipelines_write,
    family_of,
    lora_targets,
)
from nemo_aligner_diffusion.diffusion.lora import adapters_off, has_lora
from nemo_aligner_diffusion.diffusion.network.offload import Offload
from nemo_aligner_diffusion.diffusion.network.rollout_network import RolloutNetwork
from nemo_aligner_diffusion.diffusion.schedule import build_scheduler
from nemo_aligner_diffusion.diffusion.settings import DecoderSettings
from nemo_aligner_diffusion.diffusion.taps import PromptCache
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.keys import closest

if TYPE_CHECKING:
    from nemo_aligner_diffusion.diffusion.network.compiled import Compiled
    from nemo_aligner_diffusion.diffusion.network.guidance_interval import GuidanceInterval


class DiffusionModel(nn.Module):
    """An unmodified ``diffusers`` pipeline, and what of it is trained.

    The networks are the pipeline's own objects: what is trained here is what ``pipe`` makes pictures with.

    Args:
        pipe: any text-to-image (or text-to-video) pipeline; its networks are frozen here.
        trained: name of the component to train; ``None``: its family's, else its denoiser.
        stateless: class names of objects that it hands to its networks and that carry nothing from call to call.
        arguments: given in every call of the pipeline, beside the family's.

    Raises:
        ConfigurationError: no pipeline that makes pictures from a prompt by a denoiser and a scheduler; a component or
            an argument that it does not have.

    Example::

        model = DiffusionModel(DiffusionPipeline.from_pretrained("path/to/folder"))
        pictures = generate(model, ["red apple"], [0], Sampling(steps=20, guidance_scale=4.0))
    """

    denoiser: Any  # the trained network

    def __init__(
        self,
        pipe: Any,
        trained: str | None = None,
        stateless: Sequence[str] = (),
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.pipe = pipe
        self.family: Family = family_of(type(pipe))
        self.stateless = {*stateless, *self.family.stateless}
        self.truncated_prompts = 0  # prompts so far that were longer than the tokenizer's limit
        self.reference_denoiser: Any = None  # frozen copy, full fine-tuning only
        self.rollout_network: RolloutNetwork | None = None  # in training, where one is asked for
        self.compiled: Compiled | None = None  # the trained network in calls with gradient, likewise
        self.guidance_interval: GuidanceInterval | None = None  # of its steps without gradient, likewise
        self.decoder = DecoderSettings()  # of the pictures in training: see decoding.set_up_decoder
        self.small_decoder: Any = None
        self.prompt_cache: PromptCache | None = None
        self.offload = Offload()
        self.notes: dict[str, str] = {}  # for the metadata of its exports
        self._as_reference = False
        names = [name for name, part in pipe.components.items() if isinstance(part, nn.Module)]
        self._check_kind()
        self.denoisers = frozenset(name for name in DENOISERS if name in names)
        self.trained = trained or self.family.trained or next(name for name in DENOISERS if name in names)
        if self.trained not in self.denoisers:
            raise ConfigurationError(
                f"{type(pipe).__name__} has no denoiser {self.trained!r} (it has {', '.join(sorted(self.denoisers))}): "
                f"name what is to be trained in model.pipeline.trained"
            )
        # whatever the component is called: in the checkpoints of a run its weights are model.denoiser.…
        self._names = {name: "denoiser" if name == self.trained else name for name in names}
        for name in names:
            self.add_module(self._names[name], pipe.components[name])
        self.requires_grad_(False).eval()
        given = {name: as_pipelines_write(value) for name, value in (arguments or {}).items()}
        self.arguments = {**self.family.arguments, **given}
        for name in self.arguments:
            self._check_argument(name)

    # what it is made of

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The pipeline's networks by component name."""
        return {name: self._modules[own] for name, own in self._names.items()}  # type: ignore[misc]

    @property
    def lora_targets(self) -> list[str]:
        """Ends of the names of the denoiser's modules that get an adapter by default."""
        names = [name for name, _ in self.denoiser.named_modules()]
        wanted = lora_targets(self.family, self.trained)
        return [target for target in wanted if any(n == target or n.endswith(f".{target}") for n in names)]

    def frozen_parts(self) -> dict[str, nn.Module]:
        """By the names that ``model.fsdp_frozen`` and ``offload`` know; several text encoders are one part."""
        encoders = {name: part for name, part in self.networks.items() if name.startswith("text_encoder")}
        decoders = [part for part in (self.networks.get("vae"), self.small_decoder) if part is not None]
        return {"text_encoder": nn.ModuleDict(encoders), **({"vae": nn.ModuleList(decoders)} if decoders else {})}

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def tokenizer(self) -> Any:
        return getattr(self.pipe, "tokenizer", None)

    def trainable_parameters(self) -> list[tuple[str, Parameter]]:
        """By their names in the denoiser."""
        return [(name, parameter) for name, parameter in self.denoiser.named_parameters() if parameter.requires_grad]

    def network(self, name: str) -> Any:
        """What is called for component ``name`` now: within :meth:`reference`, the frozen copy if there is one."""
        if self._as_reference and name == self.trained and self.reference_denoiser is not None:
            return self.reference_denoiser
        return self._modules[self._names[name]]

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Within, the model is the pre-trained one θ₀ (LoRA: adapters off; every weight: the frozen copy)."""
        adapted = has_lora(self.denoiser)
        if not adapted and self.reference_denoiser is None:
            raise ValueError("full fine-tuning keeps no frozen copy; call keep_reference() before training")
        before, self._as_reference = self._as_reference, True
        try:
            with adapters_off(self.denoiser) if adapted else contextlib.nullcontext():
                yield
        finally:
            self._as_reference = before

    def keep_reference(self) -> None:
        """Full fine-tuning: copy the present weights as θ₀ (LoRA needs no copy)."""
        if not has_lora(self.denoiser) and self.reference_denoiser is None:
            self.reference_denoiser = copy.deepcopy(self.denoiser).requires_grad_(False).eval()

    # what it is called with

    def set_scheduler(self, sampler_type: str | None, eta: float = 0.0) -> None:
        """Give the pipeline the solver ``model.infer.sampler_type``; ``None`` leaves its own."""
        if eta and "eta" not in self._signature:
            raise ConfigurationError(
                f"model.infer.eta = {eta}: {type(self.pipe).__name__} takes no eta; expected 0 with this pipeline"
            )
        self.pipe.scheduler = build_scheduler(self.pipe.scheduler, sampler_type, eta)

    @property
    def guidance_argument(self) -> str | None:
        known = [name for name in GUIDANCE if name in self._signature]
        return self.family.guidance or next(iter(known), None)

    def inputs(
        self,
        prompts: Sequence[str],
        steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        eta: float = 0.0,
    ) -> dict[str, Any]:
        """Arguments of the pipeline's call for a batch of prompts; what is ``None`` is left to the pipeline."""
        given: dict[str, Any] = {"prompt": list(prompts), "num_inference_steps": steps, "height": height,
                                 "width": width, "eta": eta or None}  # fmt: skip
        if guidance_scale is not None:
            if self.guidance_argument is None:
                raise ConfigurationError(f"{type(self.pipe).__name__} takes no guidance scale; leave it null")
            given[self.guidance_argument] = guidance_scale
        given.update(self.arguments)
        for name, value in given.items():  # pipelines want as many as there are prompts
            if name.startswith("negative_prompt") and isinstance(value, str):
                given[name] = [value] * len(prompts)
        return {name: value for name, value in given.items() if value is not None}

    @property
    def default_steps(self) -> int:
        """The pipeline's own number of sampling steps."""
        return default_steps(type(self.pipe))

    def described(self) -> dict[str, Any]:
        """What ``run.json`` says of the pipeline: how plain ``diffusers`` is to be called."""
        return {
            "class": type(self.pipe).__name__,
            "trained": self.trained,
            "guidance_argument": self.guidance_argument,
            "loads_lora": hasattr(self.pipe, "load_lora_weights"),
            "arguments": self.arguments,
            **({"reward_sees": seen} if (seen := self.decoder.other_picture) else {}),
        }

    @property
    def prompt_limit(self) -> int | None:
        """Tokens of a prompt that the pipeline reads, as far as it says."""
        said = self._signature.get("max_sequence_length")
        limit = self.arguments.get("max_sequence_length") or (said.default if said is not None else None)
        limit = limit or getattr(self.tokenizer, "model_max_length", None)
        known = self.tokenizer is not None and isinstance(limit, int) and limit < 100_000  # transformers' "no limit"
        return limit if known else None

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """How many prompts are longer than the tokenizer takes; added to ``truncated_prompts``."""
        limit = self.prompt_limit
        if limit is None:
            return 0
        tokens = self.tokenizer(list(prompts), padding=False, truncation=False, verbose=False).input_ids
        longer = sum(len(ids) > limit for ids in tokens)
        self.truncated_prompts += longer
        return longer

    @property
    def _signature(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(type(self.pipe).__call__).parameters

    def _check_kind(self) -> None:
        pipe, signature = self.pipe, self._signature
        missing = [
            what
            for what, there in (
                ("takes no `prompt`", "prompt" in signature),
                ("takes no `num_inference_steps`", "num_inference_steps" in signature),
                ("has no scheduler", getattr(pipe, "scheduler", None) is not None),
                ("has no denoiser", any(name in pipe.components for name in DENOISERS)),
            )
            if not there
        ]
        needed = [
            name for name, parameter in signature.items()
            if parameter.default is parameter.empty and name not in ("self", *OURS)
            and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        ]  # fmt: skip
        if needed:
            missing.append(f"needs {', '.join(needed)}")
        if missing:
            raise ConfigurationError(
                f"{type(pipe).__name__} makes no pictures from prompts alone: it {', and '.join(missing)}; expected a "
                f"text-to-image pipeline such as StableDiffusionXLPipeline"
            )

    def _check_argument(self, name: str) -> None:
        kind = type(self.pipe).__name__
        given = f"model.pipeline.arguments.{name}"
        ours = GUIDANCE_KEY if name == self.guidance_argument else OURS.get(name)
        if ours is not None:
            raise ConfigurationError(f"{given} is set by {ours}; leave it out of model.pipeline.arguments")
        if name not in self._signature or name == "self":
            free = [known for known in self._signature if known != "self" and known not in OURS]
            hint = closest(name, free) or f"; it takes {', '.join(free)}"
            raise ConfigurationError(f"{given} is no argument of {kind}{hint}")


def default_steps(pipeline: type) -> int:
    """A pipeline class's own number of sampling steps.

    Raises:
        ConfigurationError: it has none.
    """
    default = inspect.signature(pipeline.__call__).parameters["num_inference_steps"].default
    if not isinstance(default, int):
        raise ConfigurationError(
            f"{pipeline.__name__} has no number of sampling steps of its own; give one, such as "
            "model.infer.inference_steps=30"
        )
    return default
