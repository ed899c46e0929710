"""A ``diffusers`` pipeline's own loop, run with taps where it meets its parts.

The pipeline's ``__call__``, without its ``no_grad`` decorator, runs on a shallow copy whose components are proxies;
nothing of the caller's pipeline changes. Tapped is the interface between a pipeline and its parts:

* a network's call: without gradient, or recomputed in its backward pass at the plan's active steps, or skipped;
* ``scheduler.step``: counts steps, sees the guided prediction, may put other latents in the place of its own;
* ``decode`` of the VAE: begins a new graph at a leaf, so that the decoder's and the denoiser's never live together.

Two devices make every method fit. *Skipping*: network calls return their last output and steps return given latents,
so that the loop runs on, at no cost, to the pipeline's own decoding (early stop, DRaFT-LV). *Replay*: a second
``__call__`` whose network calls return the frozen model's stored outputs and whose steps return the first call's
latents; what then arrives at ``scheduler.step`` is the frozen model's guided prediction, whatever the guidance is.
"""

from __future__ import annotations

import copy
import functools
import inspect
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.profiler import record_function
from torch.utils._pytree import tree_map

from nemo_aligner_diffusion.diffusion.decoding import decode_as_set_up
from nemo_aligner_diffusion.diffusion.plan import Plan, PlanRule, drawn
from nemo_aligner_diffusion.diffusion.schedule import (
    KeyedNoise,
    SchedulerPath,
    clean_estimate,
    noise_level,
    untapped,
    without_global_noise,
)
from nemo_aligner_diffusion.diffusion.taps import (
    Proxy,
    RecordedTrace,
    any_gradient,
    called_in_mode,
    detached,
    in_form_of,
    in_place_of,
    no_autocast_cache,
    processors_of,
    quiet_pipeline,
    recomputed,
    refuse_state,
    share,
    shared,
    undecorated,
)
from nemo_aligner_diffusion.errors import AlignerError, ConfigurationError, first_line

if TYPE_CHECKING:
    from nemo_aligner_diffusion.diffusion.model import DiffusionModel
    from nemo_aligner_diffusion.diffusion.network.rollout_network import RolloutNetwork

Mode = Literal["train", "sample", "replay", "last step"]


class Loop:
    """The pipeline's call under taps; several of them for one batch."""

    def __init__(
        self,
        model: DiffusionModel,
        generators: Sequence[torch.Generator],
        inputs: dict[str, Any],
        rule: PlanRule | None,
        rng: random.Random,
        reference: bool,
        kept_steps: int | None,
        decode_rows: int | None,
        tuned_weights: Callable[[int], Sequence[float]] | None = None,
        as_in_training: bool = False,
    ) -> None:
        self.model, self.pipe, self.inputs = model, model.pipe, inputs
        self.rule, self.rng, self.reference, self.kept_steps = rule, rng, reference, kept_steps
        self.decode_rows, self.tuned_weights = decode_rows, tuned_weights
        self.as_in_training = as_in_training or rule is not None  # how pictures are decoded
        self.seeds = [g.get_state() for g in generators]
        self.handle = torch.empty(0, requires_grad=True)
        self.calls = self.total = 0
        self.plan = Plan(active=())
        self.redo: Tensor | None = None  # the noise that "last step" adds to the finished latents
        self.final: Tensor | None = None  # the finished latents
        self.outputs: dict[str, Any] = {}  # last of each network, for skipped calls
        self.encoded: dict[str, list[Any]] = {}  # outputs before the loop, for every later call
        self.sample_weights: Tensor | None = None
        self.conversions: list[Callable[[], Any]] = []

    def run(self, mode: Mode) -> Tensor:
        """Pictures; ``ends``: the latents that were decoded, ``leaves``: what the decoder's graph begins with."""
        self.mode, self.i, self.started, self.skipping = mode, 0, False, mode == "last step"
        self.rollout_network: RolloutNetwork | None = None  # for calls without gradient
        self.cache_context = "both"  # as the pipeline names its call: "cond", "uncond"
        self.decoded = False
        self.ends: list[Tensor] = []
        self.leaves: list[Tensor] = []
        if mode != "replay":  # kept for it: by active step, guided predictions; latents of each step; raw outputs
            self.latents: list[Tensor] = []
            self.guided: dict[int, Tensor] = {}
            self.frozen: dict[int, Tensor] = {}
            self.frozen_outputs: dict[int, list[Any]] = {}
        self.encoded_queue = {name: iter(outputs) for name, outputs in self.encoded.items()}
        self.frozen_queue = {i: iter(outputs) for i, outputs in self.frozen_outputs.items()}
        self.generators = [torch.Generator() for _ in self.seeds]
        for generator, state in zip(self.generators, self.seeds, strict=True):
            generator.set_state(state)
        self.copied: Any = self._tapped()
        # lists of its own for each call: Z-Image writes into that of the prompts
        given = {name: list(value) if isinstance(value, list) else value for name, value in self.inputs.items()}
        inputs = {"output_type": "latent" if mode == "replay" else "pt", **given}
        # Gradient is off until the first active network call switches it on: everything before it runs exactly as at
        # inference. Noise that a pipeline draws from no generator is at least the same in every call for these samples.
        try:
            with torch.no_grad(), without_global_noise(self.generators[0].initial_seed()):
                out = self._call(inputs)
        finally:  # taps refer to this object, whose tensors would live until Python looks for cycles
            for name in ("step", "__deepcopy__"):
                self.scheduler.__dict__.pop(name, None)
            self.copied = None
            self.model.offload.release("text_encoder", *([] if self.reads else ["vae"]))
        if not self.started or self.i != self.total:
            raise ConfigurationError(
                f"{type(self.pipe).__name__} announced {self.total} steps and its scheduler made {self.i}: it steps "
                f"another scheduler than `pipeline.scheduler`, or runs other pipelines inside, and cannot be trained "
                f"as one; give the inner pipeline's folder"
            )
        if mode == "train" and self.rule is not None:
            self.sample_weights = self.plan.sample_weights(self.trace)
        if mode != "replay":
            self.states = [g.get_state() for g in self.generators]  # where further noise goes on
        out = torch.stack(list(out)) if isinstance(out, list) else out
        if self.reads and not self.leaves:  # in pixel space there is no decoder
            out = self._leaf(out)
        if self.model.family.signed:
            out = (out / 2 + 0.5).clamp(0, 1)
        return out

    @property
    def reads(self) -> bool:
        """Whether the reward looks at this run's picture."""
        if self.rule is None or self.mode == "replay":
            return False
        return self.mode == "last step" or self.plan.own_step or not self.plan.renoise

    def noises_after(self, count: int) -> list[Tensor]:
        """Noise for ``count`` re-noised latents, drawn after that of the trajectory."""
        self.final = self.sample.detach()
        for generator, state in zip(self.generators, self.states, strict=True):
            generator.set_state(state)
        drawn = [KeyedNoise(self.generators).draw(self.final.shape, self.final) for _ in range(count)]
        self.states = [g.get_state() for g in self.generators]
        return drawn

    def _tapped(self) -> Any:
        copied = copy.copy(self.pipe)
        copied.__dict__.pop("_num_timesteps", None)
        network: Any
        for name, network in self.model.networks.items():
            overrides: dict[str, Any] = {"__call__": record_function(name)(functools.partial(self._network, name))}
            if self.model.offload.parts:  # by its networks' a pipeline knows its own
                overrides["device"] = self.model.device
            if name == "vae" and self.as_in_training and self.model.small_decoder is not None:
                network = self.model.small_decoder  # with its configuration, by which the pipeline scales latents
            if hasattr(network, "decode"):
                overrides["decode"] = in_place_of(network.decode, functools.partial(self._decode, network))
                overrides["to"] = functools.partial(self._convert, network)
            if name == self.model.trained and hasattr(network, "cache_context"):
                overrides["cache_context"] = functools.partial(self._cache_context, network)
            copied.__dict__[name] = Proxy(network, overrides)
        self.scheduler: Any = copy.deepcopy(self.pipe.scheduler)
        copied.__dict__["scheduler"] = self.scheduler
        self.scheduler_step: Any = self.scheduler.step  # a deep copy, no proxy: Bria compares `type(self.scheduler)`
        self.step_signature = inspect.signature(self.scheduler_step)
        self.scheduler.step = in_place_of(self.scheduler_step, self._step)
        # LTX-2 deep-copies it, for sound
        self.scheduler.__deepcopy__ = lambda memo: copy.deepcopy(untapped(self.scheduler), memo)
        for name in ("safety_checker", "watermark"):  # numpy
            if name in copied.__dict__:
                copied.__dict__[name] = None
        copied.set_progress_bar_config(disable=True)
        return copied

    def _call(self, inputs: dict[str, Any]) -> Any:
        call = undecorated(type(self.pipe))
        try:
            with quiet_pipeline(), record_function("rollout"):
                return call(self.copied, generator=list(self.generators), return_dict=False, **inputs)[0]
        except AlignerError:
            raise
        except (ValueError, TypeError, LookupError, AttributeError, NameError, ImportError) as error:
            if self.started:
                raise
            cached = "" if self.model.prompt_cache is None else "model.cond_stage_config.cache_prompts=0 may help; "
            raise ConfigurationError(
                f"{type(self.pipe).__name__} refused what it was called with: {first_line(error)}; {cached}if it needs "
                f"more than a prompt, it is no text-to-image pipeline, or wants it in model.pipeline.arguments"
            ) from error

    def _start(self) -> None:
        """At the loop's first network call or step: only now is the number of steps known."""
        self.started = True
        self.model.offload.release("text_encoder")
        self.total = getattr(self.copied, "_num_timesteps", None) or len(self.scheduler.timesteps)
        if self.mode == "last step":
            self.active = frozenset({self.total - 1})
            return
        if self.mode == "replay":
            return
        if self.tuned_weights is not None:
            self.weights_of_steps = self.tuned_weights(self.total)
        if self.rule is None:
            self.active = frozenset()
            return
        self.rollout_network = self.model.rollout_network
        if self.rollout_network is not None:
            self.rollout_network.begin(self.model.denoiser)
        self.path = SchedulerPath(self.scheduler, self.total)
        self.plan = drawn(self.rule, self.path, self.rng)
        self.active = frozenset(self.plan.active)
        if self.plan.renoise:
            self.active = frozenset({self.total - 1} if self.plan.own_step else ())
        self.trace = RecordedTrace(self.path)

    # the three taps

    def _network(self, name: str, *args: Any, **kwargs: Any) -> Any:
        trained = name == self.model.trained
        if name in self.model.denoisers and not self.started:
            self._start()
        if not self.started:  # text and image encoders
            if self.mode in ("replay", "last step"):
                return next(self.encoded_queue[name])
            encoder: Any = functools.partial(self._encode, self.model.networks[name])
            if self.model.prompt_cache is not None and name.startswith("text_encoder"):
                encoder = functools.partial(self.model.prompt_cache, name, encoder)
            self.encoded.setdefault(name, []).append(encoder(*args, **kwargs))
            return self.encoded[name][-1]
        active = self.i in self.active and not self.skipping
        if self.mode == "replay" and active:
            return next(self.frozen_queue[self.i])
        if self.mode == "replay" or self.skipping:
            # a second denoiser may not have been called yet: any output of that shape does
            return self.outputs.get(name, next(iter(self.outputs.values())))
        network = self.model.network(name)
        if trained and self.rule is not None:
            refuse_state((args, kwargs), self.model.stateless, f"{type(self.pipe).__name__} hands its {name}")
        if active:
            torch.set_grad_enabled(True)  # from here on
        plan = self.plan
        factor = plan.input_share.get(self.i, 0.0 if plan.cut else 1.0) if self.mode == "train" else 1.0
        if active:
            args, kwargs = shared((args, kwargs), factor)
        self.calls += trained
        if active and (trained or any_gradient((args, kwargs))):
            with no_autocast_cache():
                call = self._call_of(network, gradient=True)
                later = sum(step > self.i for step in self.active)  # whose backward pass comes before
                kept = self.kept_steps is None or later < self.kept_steps
                out = call(*args, **kwargs) if kept else recomputed(network, call, args, kwargs, self.handle)
        else:
            call = self._call_of(network)
            interval = self.model.guidance_interval if trained and self.rule is not None else None
            part = "guided" if interval is None else interval.part_of(self.i, self.total)
            if trained and self.rollout_network is not None:
                self.rollout_network.cache_context = f"{self.cache_context} {part}"  # other rows, or other steps
                call = self.rollout_network
            elif trained and self.tuned_weights:
                call = functools.partial(self._annealed, name)
            if interval is not None and part != "guided":
                call = functools.partial(interval.unguided, call, len(self.seeds))
            with torch.no_grad():
                out = call(*args, **kwargs)
        self.outputs[name] = plain = detached(out)
        if active and self.reference:
            if trained:
                with torch.no_grad():
                    plain = self._frozen_output(name, network, args, kwargs)
            self.frozen_outputs.setdefault(self.i, []).append(plain)
        return out

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        if not self.started:
            self._start()
        i, self.i = self.i, self.i + 1
        bound = self.step_signature.bind(*args, **kwargs)
        given = bound.arguments
        prediction, timestep, latents = given["model_output"], given["timestep"], given["sample"]
        if self.mode == "replay":
            if i in self.active:
                self.frozen[i] = prediction.detach()
            return self._returned(self.latents[i])
        if self.mode == "last step" and i == self.total - 2:
            self.skipping = False
            assert self.redo is not None
            assert self.final is not None
            for generator, state in zip(self.generators, self.states, strict=True):
                generator.set_state(state)
            timestep, index = self.last_level
            if index is not None:  # a multistep solver has no history then: its last step is of first order
                self.scheduler._step_index = index
            alpha, sigma = noise_level(self.scheduler, timestep)
            out = self._returned((alpha * self.final + sigma * self.redo).to(self.final.dtype))
        elif self.skipping:
            out = self._returned(latents)
        else:
            out = self._real_step(i, bound, prediction, timestep, latents)
        self.sample = out[0]
        if self.reference:
            self.latents.append(self.sample.detach())
        return out

    def _real_step(self, i: int, bound: inspect.BoundArguments, prediction: Tensor, timestep: Any, z: Tensor) -> Any:
        active = i in self.active
        if active and self.reference:
            self.guided[i] = prediction
        if active and self.mode == "train" and (gain := self.plan.gain.get(i, 1.0)) != 1.0:
            bound.arguments["model_output"] = prediction = share(prediction, gain)
        if i == self.total - 1:
            self.last_level = timestep, getattr(self.scheduler, "_step_index", None)
        stop = self.rule is not None and self.mode == "train" and i == self.plan.stop
        before = untapped(self.scheduler) if stop else None
        in_form = bound.arguments.get("return_dict", True)
        if stop:
            bound.arguments["return_dict"] = True
        with KeyedNoise(self.generators):
            out = self.scheduler_step(*bound.args, **bound.kwargs)
        if stop:
            clean = clean_estimate(before, prediction, timestep, z, out).to(out[0].dtype)
            self.skipping = True
            self.step_output = out if in_form else out.to_tuple()
            return self._returned(clean, everywhere=True)
        self.step_output = out
        if self.rule is not None and self.mode == "train" and type(self.plan).carry is not Plan.carry:
            if not self.trace.latents:
                self.trace.latents.append(z)
            self.trace.predictions[i] = prediction
            carried = self._carried(i + 1, out[0])
            self.trace.latents.append(carried)
            out = self._returned(carried, everywhere=i == self.total - 1)
        return out

    def _carried(self, step: int, latents: Tensor) -> Tensor:
        """What the plan, maybe a user's own, puts in the place of ``latents``."""
        wanted = f"{type(self.plan).__name__}.carry, step {step}"
        try:
            carried = self.plan.carry(step, latents, self.trace)
        except AlignerError:
            raise
        except Exception as error:
            raise ConfigurationError(f"{wanted} failed with {type(error).__name__}: {first_line(error)}") from error
        if not isinstance(carried, Tensor) or carried.shape != latents.shape:
            got = tuple(carried.shape) if isinstance(carried, Tensor) else f"a {type(carried).__name__}"
            raise ConfigurationError(
                f"{wanted} gave {got}; expected {tuple(latents.shape)}, with the value of the latents it was given: "
                f"trace.connect(an estimate, latents)"
            )
        return carried

    @record_function("decode")
    def _decode(self, vae: Any, latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.decoded = True
        if self.reads:
            torch.set_grad_enabled(True)
            latents = self._leaf(latents)
        self.model.offload.bring("vae", self.model.device)
        return decode_as_set_up(self.model, vae, latents, self.decode_rows, self.as_in_training, *args, **kwargs)

    def _convert(self, network: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """SDXL's VAE is float32 while it decodes, and would be float16 again before the decoder's backward pass."""
        if self.decoded and self.reads:
            self.conversions.append(functools.partial(network.to, *args, **kwargs))
        else:
            network.to(*args, **kwargs)
        return network

    def convert_back(self) -> None:
        """Do what was put off until the decoder's graph, and the reward's, are gone."""
        for conversion in self.conversions:
            conversion()
        self.conversions = []
        self.model.offload.release()

    # what the taps need

    def _cache_context(self, network: Any, name: str, **place: Any) -> Any:
        self.cache_context = name
        return network.cache_context(name, **place)

    def _encode(self, encoder: Any, *args: Any, **kwargs: Any) -> Any:
        self.model.offload.bring("text_encoder", self.model.device)
        return encoder(*args, **kwargs)

    def _leaf(self, end: Tensor) -> Tensor:
        """Where the decoder's graph begins; some pipelines decode a video by parts, each of which has its own."""
        self.ends.append(end)
        self.leaves.append(end.detach().requires_grad_())
        return self.leaves[-1]

    def _returned(self, sample: Tensor, everywhere: bool = False) -> Any:
        """``sample`` in the form in which the scheduler's ``step`` last returned: see :func:`.in_form_of`."""
        out, self.step_output = in_form_of(self.step_output, sample, everywhere)
        return out

    def _call_of(self, network: Any, gradient: bool = False) -> Callable[..., Any]:
        declared, compiled = self.model.family.gradient_in_training, self.model.compiled
        if compiled is not None and gradient and network is self.model.denoiser:
            call = functools.partial(called_in_mode, compiled.network, declared, True)
            return compiled.timed()(call) if declared else compiled
        return functools.partial(called_in_mode, network, declared, gradient) if declared else network

    def _frozen_output(self, name: str, network: Any, args: Any, kwargs: Any) -> Any:
        with self.model.reference():
            frozen = self.model.network(name)
            with processors_of(frozen, getattr(network, "attn_processors", None)):
                return self._call_of(frozen)(*args, **kwargs)

    def _annealed(self, name: str, *args: Any, **kwargs: Any) -> Any:
        weight = self.weights_of_steps[self.i]
        if weight == 1.0:
            return self.model.network(name)(*args, **kwargs)
        with self.model.reference():
            base = self.model.network(name)(*args, **kwargs)
        if weight == 0.0:
            return base
        tuned = self.model.network(name)(*args, **kwargs)
        return tree_map(lambda b, t: torch.lerp(b, t, weight) if isinstance(b, Tensor) else b, base, tuned)
