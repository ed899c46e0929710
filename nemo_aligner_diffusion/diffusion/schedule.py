"""What has to be known of a ``diffusers`` scheduler beyond its ``step``: noise levels, clean estimates, weights."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nemo_aligner_diffusion.diffusion.settings import SAMPLER_ALIASES, SAMPLERS
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.keys import closest

# what the noise schedule is; a solver's own options (its order, its algorithm) must not leak into another solver
_NOISE_SCHEDULE = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "timestep_spacing", "steps_offset", "rescale_betas_zero_snr", "set_alpha_to_one", "use_karras_sigmas",
)  # fmt: skip


def sampler_name(sampler_type: str) -> str:
    """The name in :data:`.SAMPLERS` of a ``model.infer.sampler_type``; case does not count."""
    known = {name.lower(): name for name in SAMPLERS} | {name.lower(): of for name, of in SAMPLER_ALIASES.items()}
    if sampler_type.lower() not in known:
        raise ConfigurationError(
            f"model.infer.sampler_type={sampler_type!r} is not a known sampler (known: {', '.join(SAMPLERS)})"
            f"{closest(sampler_type, known.values())}"
        )
    return known[sampler_type.lower()]


def build_scheduler(own: Any, sampler_type: str | None, eta: float = 0.0) -> Any:
    """The solver asked for, with the noise schedule of a pipeline's own scheduler.

    Args:
        own: the pipeline's scheduler.
        sampler_type: one of :data:`.SAMPLERS` (NeMo's spellings accepted); ``None``: ``own``.
        eta: DDIM's η in ``[0, 1]``; other solvers accept only 0.

    Raises:
        ConfigurationError: unknown, of another kind of model (DDIM on a flow), an η the solver has no use for, or one
            that clips its samples.
    """
    import diffusers

    if sampler_type is None:
        scheduler = own
    else:
        class_name, options = SAMPLERS[sampler_name(sampler_type)]
        known = [kind.__name__ for kind in own.compatibles]
        if class_name not in known:
            raise ConfigurationError(
                f"model.infer.sampler_type={sampler_type} ({class_name}) cannot take the noise schedule of this "
                f"pipeline's {type(own).__name__}; leave it null for the pipeline's own"
            )
        config = dict(own.config)
        if class_name != type(own).__name__:
            config = {key: config[key] for key in _NOISE_SCHEDULE if key in config}
        scheduler = getattr(diffusers, class_name).from_config({**config, **options})
    for option in ("clip_sample", "thresholding"):
        if scheduler.config.get(option, False):
            raise ConfigurationError(
                f"the scheduler configuration sets {option}=true, which has no place in latent diffusion and has "
                f"no useful gradient; set it to false in the model's scheduler/scheduler_config.json"
            )
    if eta and "eta" not in inspect.signature(scheduler.step).parameters:
        raise ConfigurationError(
            f"model.infer.eta={eta} works with sampler_type=ddim only, not {sampler_type or type(own).__name__!r}"
        )
    return scheduler


class SchedulerPath:
    """A scheduler whose timesteps are set, as a :class:`.SamplingPath`; what costs a call is found when first asked."""

    def __init__(self, scheduler: Any, steps: int | None = None) -> None:
        """``steps``: how many of the scheduler's timesteps the pipeline visits, its last ones; ``None``: all."""
        self._scheduler = copy.deepcopy(untapped(scheduler))
        begin = getattr(scheduler, "begin_index", None) or 0
        for index in ("_begin_index", "_step_index"):  # levels are asked for by timestep, not for the present step
            if hasattr(self._scheduler, index):
                setattr(self._scheduler, index, None)
        every = self._scheduler.timesteps
        self._timesteps = every[begin:] if steps is None else every[len(every) - steps :]
        self.steps = len(self._timesteps)
        self.flow = prediction_type(self._scheduler) == "flow_prediction"

    @cached_property
    def levels(self) -> Sequence[tuple[float, float]]:
        return [*(noise_level(self._scheduler, t) for t in self._timesteps), (1.0, 0.0)]

    @cached_property
    def weights(self) -> Sequence[float]:
        """The solver's steps taken on basis vectors: every solver is linear in the predictions."""
        size = self.steps
        basis = torch.eye(size, dtype=torch.float64).reshape(size, 1, size, 1, 1)

        def end(predictions: Tensor) -> Tensor:
            scheduler, z = copy.deepcopy(self._scheduler), torch.zeros_like(basis[0])
            for e, t in zip(predictions, self._timesteps, strict=True):
                if hasattr(scheduler, "scale_model_input"):  # some solvers count their steps there
                    scheduler.scale_model_input(z, t)
                z = scheduler.step(e, t, z, return_dict=False)[0].double()
            return z.flatten()

        with torch.no_grad(), _NoNoise():
            return (end(basis) - end(torch.zeros_like(basis))).tolist()

    def clean(self, step: int, latents: Tensor, prediction: Tensor) -> Tensor:
        return self._solved(step, latents, prediction)[0]

    def noise(self, step: int, latents: Tensor, prediction: Tensor) -> Tensor:
        return self._solved(step, latents, prediction)[1]

    def _solved(self, step: int, z: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        return solve(self._scheduler, self.levels[step], z, e)

    def prediction_scale(self, step: int, space: str | None) -> float:
        """How much larger a difference of predictions is in another space.

        Args:
            space: ``prediction`` (1), ``epsilon`` (of the noise), ``velocity`` (``n − x`` of a flow, else the ``v`` of
                Salimans & Ho, 2022); ``None``: velocity for a flow, else epsilon (as NeMo-Aligner's KL).
        """
        space = space or ("velocity" if self.flow else "epsilon")
        if space == "prediction":
            return 1.0
        alpha, sigma = self.levels[step]
        a, b = predicted(self._scheduler, alpha, sigma)
        determinant = alpha * b - sigma * a
        if space == "epsilon":
            return alpha / determinant
        return (alpha + sigma if self.flow else (alpha**2 + sigma**2) ** 0.5) / determinant


def timed(scheduler: Any, steps: int) -> Any:
    """A copy with ``steps`` timesteps, outside of a pipeline's call, which may shift them by the picture's size."""
    scheduler = copy.deepcopy(scheduler)
    if scheduler.config.get("use_dynamic_shifting"):
        scheduler.register_to_config(use_dynamic_shifting=False)
    scheduler.set_timesteps(steps)
    return scheduler


def path_of(scheduler: Any, steps: int) -> SchedulerPath:
    """The path of :func:`timed`."""
    return SchedulerPath(timed(scheduler, steps))


def untapped(scheduler: Any) -> Any:
    """A shallow copy without the instance attributes of a tap."""
    plain = copy.copy(scheduler)
    for name in ("step", "__deepcopy__"):
        plain.__dict__.pop(name, None)
    return plain


def noise_level(scheduler: Any, timestep: Any) -> tuple[float, float]:
    """``(α, σ)`` with ``z = α x + σ n`` at this timestep, in the scheduler's own variable ``z``."""
    t = torch.as_tensor(timestep).reshape(-1)[:1]
    if scheduler.config.get("prediction_type") == "trigflow":  # SCMScheduler cannot add noise
        return float(t.double().cos()), float(t.double().sin()) * scheduler.config.sigma_data
    basis = torch.eye(2, dtype=torch.float64, device=t.device).reshape(2, 1, 2, 1, 1)
    add = getattr(scheduler, "add_noise", None)
    noised = add(basis[0], basis[1], t) if add is not None else scheduler.scale_noise(basis[0], t, basis[1])
    alpha, sigma = noised.flatten().tolist()
    return (sigma, alpha) if scheduler.config.get("invert_sigmas") else (alpha, sigma)


def prediction_type(scheduler: Any) -> str:
    """``epsilon``, ``v_prediction``, ``sample``, ``flow_prediction`` or what else the scheduler names."""
    flow = type(scheduler).__name__.startswith("FlowMatch")
    return scheduler.config.get("prediction_type") or ("flow_prediction" if flow else "epsilon")


def predicted(scheduler: Any, alpha: float, sigma: float) -> tuple[float, float]:
    """``(a, b)`` of ``e = a x + b n``: what the network predicts."""
    norm, kind = (alpha**2 + sigma**2) ** 0.5, prediction_type(scheduler)
    known = {
        "epsilon": (0.0, 1.0),
        "sample": (1.0, 0.0),
        "flow_prediction": (-1.0, 1.0),
        "v_prediction": (-sigma / norm, alpha / norm),
        "trigflow": (-sigma / norm, alpha / norm),
    }
    if kind not in known:
        raise ConfigurationError(
            f"{type(scheduler).__name__} predicts {kind!r}, which this method cannot turn into a clean estimate "
            f"(known: {', '.join(known)}); choose a method that reads z_T, such as draft_k"
        )
    a, b = known[kind]
    return (-a, -b) if scheduler.config.get("invert_sigmas") else (a, b)


def solve(scheduler: Any, level: tuple[float, float], z: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """``(x, n)`` of ``z = α x + σ n`` and ``e = a x + b n``."""
    alpha, sigma = level
    a, b = predicted(scheduler, alpha, sigma)
    determinant = alpha * b - sigma * a
    return (z * b - e * sigma) / determinant, (e * alpha - z * a) / determinant


def clean_estimate(scheduler: Any, prediction: Tensor, timestep: Any, sample: Tensor, output: Any) -> Tensor:
    """``Ẑ``: the scheduler's own estimate where its ``output`` has one, else from the noise level.

    Args:
        scheduler: as it was before the step that gave ``output``.
    """
    for name in ("pred_original_sample", "denoised"):  # LCM's is the latter
        own = getattr(output, name, None)
        if own is not None:
            return own
    level = noise_level(scheduler, timestep)
    if hasattr(scheduler, "precondition_outputs"):  # EDM
        sigma = torch.tensor(level[1], dtype=torch.float64)
        return scheduler.precondition_outputs(sample, prediction, sigma)
    return solve(scheduler, level, sample, prediction)[0]


class KeyedNoise(TorchFunctionMode):
    """Noise that a scheduler draws from the global generator comes from the samples' own generators instead."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        self.generators = generators

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.randn, torch.randn_like) and kwargs.get("generator") is None:
            like = args[0] if func is torch.randn_like else torch.empty(0, dtype=kwargs.get("dtype"),
                                                                        device=kwargs.get("device"))  # fmt: skip
            shape = args[0].shape if func is torch.randn_like else args[0]
            if not isinstance(shape, int) and len(shape) and shape[0] == len(self.generators):
                return self.draw(shape, like)
        return func(*args, **kwargs)

    def draw(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Standard normal of ``shape``, row by row from the samples' generators; float32, then as ``like``."""
        rows = [torch.randn(tuple(shape[1:]), generator=g, dtype=torch.float32) for g in self.generators]
        return torch.stack(rows).to(like)


class _NoNoise(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        drawn = func(*args, **(kwargs or {}))
        return torch.zeros_like(drawn) if func in (torch.randn, torch.randn_like) else drawn


@contextlib.contextmanager
def without_global_noise(seed: int) -> Iterator[None]:
    """Inside, the global generators start from ``seed``; afterwards they are as they were."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
