"""The sampler: a ``diffusers`` scheduler, read once as a table of coefficients.

Every deterministic or noise-driven ODE/SDE solver that ``diffusers`` ships is *linear* in the latents ``z_j``, the
network's predictions ``e_j`` and the injected noise ``n_i``:

    z_{i+1} = Σ_{j≤i} a_ij z_j + Σ_{j≤i} b_ij e_j + c_i n_i          (multistep solvers look back, j < i)
    Ẑ_i     = p_i z_i + q_i e_i                                       (the clean-latent estimate)

So the scheduler's own ``step`` is run once, in float64, on basis vectors instead of latents, and what comes out are
the coefficients. This keeps `diffusers` the only authority on the arithmetic of a solver, and makes a step stateless
(any step can be replayed in any order), differentiable at full precision (several schedulers cast to float32 inside)
and free of host-device synchronisation. Design note: ``docs/decisions/001-linear-sampler.md``.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

from nemo_aligner_diffusion.errors import ConfigurationError

# name in `model.infer.sampler_type` -> (diffusers class, configuration that makes it that sampler)
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpm++2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
SAMPLER_ALIASES = {"dpm": "dpm++2m", "dpmsolver++": "dpm++2m", "para_ddim": "ddim"}

Terms = tuple[tuple[int, float], ...]  # (step j, coefficient), only the nonzero ones


@dataclass(frozen=True)
class StepCoefficients:
    """One row of the table; all coefficients are dimensionless float64."""

    input_scale: float  # the network is called with input_scale * z_i
    latents: Terms
    predictions: Terms
    noise: float
    clean_latent: float
    clean_prediction: float


def sampler_name(sampler_type: str) -> str:
    """The canonical name of a ``model.infer.sampler_type``; NeMo's upper-case spellings are accepted."""
    name = sampler_type.lower()
    name = SAMPLER_ALIASES.get(name, name)
    if name not in SAMPLERS:
        near = difflib.get_close_matches(name, SAMPLERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigurationError(
            f"model.infer.sampler_type={sampler_type!r} is not a known sampler (known: {', '.join(SAMPLERS)}){hint}"
        )
    return name


def build_scheduler(scheduler_config: Mapping[str, Any], sampler_type: str) -> Any:
    """A ``diffusers`` scheduler of the asked kind with the noise schedule of ``scheduler_config``."""
    class_name, overrides = SAMPLERS[sampler_name(sampler_type)]
    config = {key: value for key, value in scheduler_config.items() if not key.startswith("_")}
    if class_name == scheduler_config.get("_class_name"):
        config = {**config, **overrides}
    else:  # options of another solver (its order, its algorithm) must not leak into this one
        shared = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
                  "timestep_spacing", "steps_offset", "rescale_betas_zero_snr", "set_alpha_to_one")  # fmt: skip
        config = {**{key: config[key] for key in shared if key in config}, **overrides}
        if class_name == "DDIMScheduler":
            config["clip_sample"] = False
    return getattr(diffusers, class_name).from_config(config)


class Sampler:
    """``num_inference_steps`` steps of a solver, stateless and differentiable.

    Args:
        scheduler_config: a ``diffusers`` scheduler configuration (noise schedule, prediction type, spacing).
        sampler_type: one of :data:`SAMPLERS` (NeMo spellings accepted).
        num_inference_steps: ``T`` in the design notes; at least 1.
        eta: DDIM's η in ``[0, 1]``; 0 is deterministic. Other samplers accept only 0.

    Raises:
        ConfigurationError: unknown sampler, an η the sampler has no use for, or a scheduler that is not linear
            (sample clipping or thresholding).
    """

    def __init__(
        self, scheduler_config: Mapping[str, Any], sampler_type: str, num_inference_steps: int, eta: float = 0.0
    ) -> None:
        if num_inference_steps < 1:
            raise ConfigurationError(f"model.infer.inference_steps must be at least 1, got {num_inference_steps}")
        self.sampler_type = sampler_name(sampler_type)
        self.num_inference_steps = num_inference_steps
        self.eta = eta
        self._scheduler_config = dict(scheduler_config)
        scheduler = self._new_scheduler()
        for option in ("clip_sample", "thresholding"):
            if scheduler.config.get(option, False):
                raise ConfigurationError(
                    f"the scheduler configuration sets {option}=true, which has no place in latent diffusion and has "
                    f"no useful gradient; set it to false in the model's scheduler/scheduler_config.json"
                )
        parameters = inspect.signature(scheduler.step).parameters
        if eta != 0.0 and "eta" not in parameters:
            raise ConfigurationError(f"model.infer.eta={eta} works with sampler_type=ddim only, not {sampler_type!r}")
        self.prediction_type: str = scheduler.config.prediction_type
        self.initial_scale = float(scheduler.init_noise_sigma)
        self.timesteps: list[Tensor] = [t.detach().clone() for t in scheduler.timesteps]
        self.steps = self._probe(scheduler)
        # DRaFT-LV takes the last step alone, from a freshly noised latent: no history, first order
        self._last_alone = self._probe(self._new_scheduler(), first=len(self.timesteps) - 1)[0]
        self.last_level = self._noise_level(self._new_scheduler(), self.timesteps[-1])

    def __len__(self) -> int:
        """Number of network calls; equals ``num_inference_steps`` for all samplers but PLMS, which adds one."""
        return len(self.timesteps)

    def network_input(self, i: int, latents: Tensor) -> Tensor:
        scale = self.steps[i].input_scale
        return latents if scale == 1.0 else latents * scale

    def step(
        self, i: int, latents: Sequence[Tensor], predictions: Sequence[Tensor], noise: Tensor | None = None
    ) -> Tensor:
        """``z_{i+1} = S_i(z_i, e_i)``.

        Args:
            i: step, counted in sampler order from pure noise.
            latents: ``z_0 … z_i`` (entries that the solver does not look at may be anything).
            predictions: guided predictions ``e_0 … e_i``.
            noise: ``n_i``, needed where the solver injects noise.
        """
        return _combine(self.steps[i], latents, predictions, noise)

    def clean_estimate(self, i: int, latents: Tensor, prediction: Tensor) -> Tensor:
        """``Ẑ_i(z_i, e_i)``, the scheduler's ``pred_original_sample``."""
        coefficients = self.steps[i]
        return coefficients.clean_latent * latents + coefficients.clean_prediction * prediction

    def renoise(self, latents: Tensor, noise: Tensor) -> Tensor:
        """Noise finished latents ``z_T`` to the level of the last sampling step (DRaFT-LV)."""
        signal, sigma = self.last_level
        return signal * latents + sigma * noise

    def last_step_alone(self, latents: Tensor, prediction: Tensor, noise: Tensor | None = None) -> Tensor:
        """The last sampling step from ``latents`` with no history (first order for multistep solvers)."""
        return _combine(self._last_alone, [latents], [prediction], noise)

    def _new_scheduler(self) -> Any:
        scheduler = build_scheduler(self._scheduler_config, self.sampler_type)
        scheduler.set_timesteps(self.num_inference_steps)
        return scheduler

    def _probe(self, scheduler: Any, first: int = 0) -> list[StepCoefficients]:
        """Run the scheduler on basis vectors: row block 0 is ``z_j``, 1 is ``e_j``, 2 is ``n_j``."""
        steps = range(first, len(self.timesteps))
        size = len(steps)
        basis = torch.eye(3 * size, dtype=torch.float64).unsqueeze(1)  # a batch of one: UniPC wants two dimensions
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        takes_noise = "variance_noise" in inspect.signature(scheduler.step).parameters
        rows = []
        for local, i in enumerate(steps):
            z, e, n = basis[local], basis[size + local], basis[2 * size + local]
            t = scheduler.timesteps[i]
            scale = float(scheduler.scale_model_input(torch.ones(1, dtype=torch.float64), t)[0])
            options: dict[str, Any] = {"variance_noise": n} if takes_noise else {}
            if self.eta:
                options["eta"] = self.eta
            output = scheduler.step(e, t, z, **options)
            after = output.prev_sample.double()[0]
            clean = _clean_estimate(scheduler, output, t, z, e)[0]
            rows.append(
                StepCoefficients(
                    input_scale=scale,
                    latents=_terms(after[:size]),
                    predictions=_terms(after[size : 2 * size]),
                    noise=float(after[2 * size + local]),
                    clean_latent=float(clean[local]),
                    clean_prediction=float(clean[size + local]),
                )
            )
        return rows

    def _noise_level(self, scheduler: Any, timestep: Tensor) -> tuple[float, float]:
        basis = torch.eye(2, dtype=torch.float64)
        noised = scheduler.add_noise(basis[:1], basis[1:], timestep.reshape(1))
        return float(noised[0, 0]), float(noised[0, 1])


def _clean_estimate(scheduler: Any, output: Any, timestep: Tensor, z: Tensor, e: Tensor) -> Tensor:
    clean = getattr(output, "pred_original_sample", None)
    if clean is None:
        history = getattr(scheduler, "model_outputs", None)
        if history and (
            "dpmsolver++" in str(scheduler.config.get("algorithm_type")) or scheduler.config.get("predict_x0")
        ):
            clean = history[-1]  # these solvers convert the prediction to x_0 before they keep it
        else:
            cumulative = scheduler.alphas_cumprod[int(timestep)].double()
            alpha, sigma = float(cumulative.sqrt()), float((1 - cumulative).sqrt())
            if scheduler.config.prediction_type == "v_prediction":
                clean = alpha * z - sigma * e
            else:
                clean = (z - sigma * e) / alpha
    return clean.double()


def _terms(row: Tensor) -> Terms:
    return tuple((j, float(value)) for j, value in enumerate(row.tolist()) if value != 0.0)


def _combine(
    coefficients: StepCoefficients, latents: Sequence[Tensor], predictions: Sequence[Tensor], noise: Tensor | None
) -> Tensor:
    total: Tensor | None = None
    for source, terms in ((latents, coefficients.latents), (predictions, coefficients.predictions)):
        for j, value in terms:
            total = source[j] * value if total is None else torch.add(total, source[j], alpha=value)
    assert total is not None, "a solver step that depends on nothing"
    if coefficients.noise:
        if noise is None:
            raise ValueError("this sampler injects noise at this step: pass `noise`")
        total = torch.add(total, noise, alpha=coefficients.noise)
    return total
