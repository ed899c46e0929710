"""Optimizers by the names that NeMo configurations use (``model.optim``)."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.settings import BOOL, FRACTION, Kind, Settings, choice, number, part, setting
from nemo_aligner_diffusion.training.schedules import ScheduleSettings

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

OPTIMIZERS = ("fused_adam", "adamw", "adamw_8bit", "adam", "sgd")
_BLOCK, _LEAST = 256, 4096  # numbers: that share a scale; that a parameter must have (torchao's rule)


@dataclass(frozen=True)
class OptimizerSettings(Settings):
    """Optimizer."""

    section = "model.optim"
    title = "Optimizer"

    name: str = setting(
        "fused_adam",
        choice(*OPTIMIZERS),
        "fused_adam, adamw, adamw_8bit (moments in 8 bits: matters with peft=none; LoRA's are small), adam or sgd",
    )
    lr: float = setting(4e-4, number(above=0), "learning rate the schedule scales; > 0")
    weight_decay: float = setting(0.0, number(0), "decoupled weight decay; >= 0")
    betas: tuple[float, float] = setting(
        (0.9, 0.999),
        Kind("floats", low=0, high=1, open_high=True, length=2),
        "decay of the running mean of the gradient and of its square; each in [0, 1)",
    )
    eps: float = setting(1e-8, number(above=0), "added to the denominator; > 0")
    momentum: float = setting(0.0, FRACTION, "sgd: share of the last update that is kept; in [0, 1)")
    nesterov: bool = setting(False, BOOL, "sgd: look ahead along the momentum; true or false")
    sched: ScheduleSettings = part(ScheduleSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name == "sgd" and self.nesterov and self.momentum == 0:
            raise ConfigurationError("model.optim.nesterov = true needs model.optim.momentum above 0")
        if self.sched.name != "constant" and self.sched.min_lr > self.lr:
            raise ConfigurationError(f"{self.sched.given('min_lr')} is above {self.given('lr')}")

    @property
    def can_be_split(self) -> bool:
        """Whether the state can be that of a piece of a parameter."""
        return self.name != "adamw_8bit"

    def state_bytes(self, parameter: torch.Tensor) -> int:
        """What the optimizer keeps for ``parameter``."""
        tensors = 2 if self.name != "sgd" else int(self.momentum > 0)
        if self.name == "adamw_8bit" and _in_8_bits(parameter):
            return tensors * (parameter.numel() + 4 * (parameter.numel() // _BLOCK) + 4 * 256)  # codes, scales, table
        return tensors * parameter.nbytes

    def check_installed(self) -> None:
        """Raise a ConfigurationError where the package is missing that the optimizer is from."""
        if self.name == "adamw_8bit" and importlib.util.find_spec("torchao") is None:
            raise ConfigurationError(
                f"{self.given('name')} needs torchao, which is not installed: pip install "
                "'nemo-aligner-diffusion[quantization]', or set model.optim.name=adamw"
            )

    def unread(self) -> dict[str, str]:
        others = ("betas", "eps") if self.name == "sgd" else ("momentum", "nesterov")
        return dict.fromkeys(others, f"model.optim.name={self.name} does not read it")


def build_optimizer(
    named: Iterable[tuple[str, torch.nn.Parameter]], settings: OptimizerSettings, *, allow_fused: bool = True
) -> torch.optim.Optimizer:
    """The optimizer that ``model.optim`` names, over the parameters that require gradients.

    Args:
        settings: its ``sched`` is for :func:`.build_schedule`.
        allow_fused: False keeps to unfused kernels, which Lightning's float16 mixed precision needs to clip gradients.

    Weight decay leaves out parameters of fewer than two dimensions (biases, normalisation gains), as NeMo's
    ``get_params_for_weight_decay_optimization`` does. LoRA factors are matrices, so all of them decay.

    ``fused_adam`` is decoupled AdamW (apex's ``adam_w_mode``, its default): apex's kernel when apex is importable and
    all parameters are on CUDA, else ``torch.optim.AdamW``, fused where torch supports it. One log line says which.

    ``adamw_8bit`` is torchao's: the two moments of parameters of at least 4096 numbers (a multiple of 256) in 8 bits
    (arXiv 2110.02861), computed in float32.

    Raises:
        ConfigurationError: nothing to train, or a package is missing.
    """
    import torch

    settings.check_installed()
    trained = [parameter for _, parameter in named if parameter.requires_grad]
    if not trained:
        raise ConfigurationError(
            "nothing to train: no parameter of the model requires a gradient. Check model.peft.peft_scheme "
            "(sdlora or none) and model.peft.lora_tuning.target_modules."
        )
    groups = _decay_groups(trained, settings.weight_decay)
    lr, betas, eps = settings.lr, settings.betas, settings.eps
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=settings.momentum, nesterov=settings.nesterov)
    if settings.name == "adam":
        return torch.optim.Adam(groups, lr=lr, betas=betas, eps=eps)
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps)
    if settings.name == "adamw_8bit":
        return _adamw_8bit(groups, lr=lr, betas=betas, eps=eps)
    return _fused_adam(groups, lr, betas, eps, allow_fused)


def _fused_adam(
    groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float, allow_fused: bool
) -> torch.optim.Optimizer:
    import torch
    from pytorch_lightning.utilities.rank_zero import rank_zero_only

    parameters = [p for group in groups for p in group["params"]]
    devices = {p.device.type for p in parameters}
    say = rank_zero_only(log.info)
    if allow_fused and devices == {"cuda"}:
        try:
            from apex.optimizers import FusedAdam
        except Exception as error:  # apex without its CUDA build fails on import in several ways
            say(f"fused_adam: apex is not usable ({type(error).__name__}); torch.optim.AdamW(fused=True) instead")
        else:
            # The package index has an unrelated apex; only NVIDIA's FusedAdam takes adam_w_mode.
            if "adam_w_mode" in inspect.signature(FusedAdam).parameters:
                say("fused_adam: apex.optimizers.FusedAdam")
                return FusedAdam(groups, lr=lr, betas=betas, eps=eps, adam_w_mode=True)
    if allow_fused and len(devices) == 1 and all(p.is_floating_point() for p in parameters):
        with contextlib.suppress(RuntimeError):  # raised at construction where there is no fused kernel for the device
            optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
            say(f"fused_adam: torch.optim.AdamW(fused=True) on {devices.pop()}")
            return optimizer
    say("fused_adam: torch.optim.AdamW, without a fused kernel")
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps)


def _adamw_8bit(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    import torch
    from torchao.optim import AdamW8bit

    on_cpu = groups[0]["params"][0].device.type == "cpu"

    class AdamW(AdamW8bit):
        def step(self, closure: Any = None) -> Any:
            # torchao compiles a kernel for each shape of a parameter: ten seconds and more each on a CPU
            with torch.compiler.set_stance("force_eager") if on_cpu else contextlib.nullcontext():
                return super().step(closure)

    return AdamW(groups, **settings)


def _in_8_bits(parameter: torch.Tensor) -> bool:
    return parameter.numel() >= _LEAST and parameter.numel() % _BLOCK == 0


def saved_state(slots: Mapping[str, Any]) -> dict[str, Any]:
    """The state of one parameter for a checkpoint: moments in 8 bits by codes, uint8 of the parameter's shape, and
    scales, float32 ``(numbers / 256,)``."""
    return {
        slot: {"codes": value.codes, "scale": value.scale} if hasattr(value, "codes") else value
        for slot, value in slots.items()
    }


def restored_state(slots: Mapping[str, Any], optimizer: Any, parameter: torch.Tensor) -> dict[str, Any]:
    """The inverse of :func:`saved_state`: the same bits in an ``optimizer`` of 8 bits; any Adam goes on with any's."""
    wanted = hasattr(optimizer, "block_size") and _in_8_bits(parameter)  # torchao's
    restored = dict(slots)
    for slot, value in slots.items():
        saved = isinstance(value, Mapping)
        if saved or (wanted and slot.startswith("exp_avg")):
            OptimizerSettings(name="adamw_8bit").check_installed()
            from torchao.optim.subclass_8bit import OptimState8bit

            moment = OptimState8bit.zeros(tuple(parameter.shape), signed=slot == "exp_avg", block_size=_BLOCK)
            if saved:  # bit for bit, as quantising the numbers again is not: no code stands for -1
                moment.codes.copy_(value["codes"])
                moment.scale.copy_(value["scale"])
            else:
                moment.copy_(value)
            restored[slot] = moment if wanted else moment.dequantize()
    return restored


def _decay_groups(parameters: list[torch.nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """One group when nothing is exempt, so that the common case (LoRA, or no decay) keeps a plain state dict."""
    decayed = [p for p in parameters if p.ndim >= 2]
    exempt = [p for p in parameters if p.ndim < 2]
    if weight_decay == 0 or not exempt or not decayed:
        return [{"params": parameters, "weight_decay": weight_decay if decayed else 0.0}]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
