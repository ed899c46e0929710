"""Optimizers by the names that NeMo configurations use (``model.optim``)."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from nemo_aligner_diffusion.errors import ConfigurationError

log = logging.getLogger(__name__)

OPTIMIZER_NAMES = ("fused_adam", "adamw", "adam", "sgd")

Parameters = Iterable[torch.nn.Parameter | tuple[str, torch.nn.Parameter]]


def build_optimizer(
    params: Parameters, optim_cfg: Mapping[str, Any], *, allow_fused: bool = True
) -> torch.optim.Optimizer:
    """The optimizer that ``model.optim`` names, over the parameters that require gradients.

    Args:
        params: parameters, or ``(name, parameter)`` pairs as ``named_parameters()`` gives them.
        optim_cfg: ``name`` (one of :data:`OPTIMIZER_NAMES`), ``lr``, ``weight_decay`` (0), ``betas`` ((0.9, 0.999)),
            ``eps`` (1e-8), ``momentum`` and ``nesterov`` (sgd). ``sched`` is for :func:`build_schedule`.
        allow_fused: False keeps to unfused kernels, which Lightning's float16 mixed precision needs to clip gradients.

    Weight decay leaves out parameters of fewer than two dimensions (biases, normalisation gains), as NeMo's
    ``get_params_for_weight_decay_optimization`` does. LoRA factors are matrices, so all of them decay.

    ``fused_adam`` is decoupled AdamW (apex's ``adam_w_mode``, its default): apex's kernel when apex is importable and
    all parameters are on CUDA, else ``torch.optim.AdamW``, fused where torch supports it. One log line says which.

    Raises:
        ConfigurationError: an unknown name, no ``lr``, an impossible value, or nothing to train.
    """
    name = str(optim_cfg.get("name", "fused_adam"))
    if name not in OPTIMIZER_NAMES:
        raise ConfigurationError(
            f"model.optim.name={name!r} is not an optimizer here; the known ones are {', '.join(OPTIMIZER_NAMES)}"
            f"{_did_you_mean(name, OPTIMIZER_NAMES)}"
        )
    trained = [p for p in (item[1] if isinstance(item, tuple) else item for item in params) if p.requires_grad]
    if not trained:
        raise ConfigurationError(
            "nothing to train: no parameter of the model requires a gradient. Check model.peft.peft_scheme "
            "(sdlora or none) and model.peft.lora_tuning.target_modules."
        )
    lr = _number(optim_cfg, "lr", None)
    weight_decay = _number(optim_cfg, "weight_decay", 0.0)
    groups = _decay_groups(trained, weight_decay)
    if name == "sgd":
        momentum = _number(optim_cfg, "momentum", 0.0)
        nesterov = bool(optim_cfg.get("nesterov", False))
        if nesterov and momentum == 0:
            raise ConfigurationError("model.optim.nesterov=True needs model.optim.momentum above 0")
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov)

    betas = _betas(optim_cfg.get("betas"))
    eps = _number(optim_cfg, "eps", 1e-8)
    if name == "adam":
        return torch.optim.Adam(groups, lr=lr, betas=betas, eps=eps)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps)
    return _fused_adam(groups, lr, betas, eps, allow_fused)


def _fused_adam(
    groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float, allow_fused: bool
) -> torch.optim.Optimizer:
    parameters = [p for group in groups for p in group["params"]]
    devices = {p.device.type for p in parameters}
    if allow_fused and devices == {"cuda"}:
        try:
            from apex.optimizers import FusedAdam
        except Exception as error:  # apex without its CUDA build fails on import in several ways
            _say(f"fused_adam: apex is not usable ({type(error).__name__}); torch.optim.AdamW(fused=True) instead")
        else:
            # The package index has an unrelated apex; only NVIDIA's FusedAdam takes adam_w_mode.
            if "adam_w_mode" in inspect.signature(FusedAdam).parameters:
                _say("fused_adam: apex.optimizers.FusedAdam")
                return FusedAdam(groups, lr=lr, betas=betas, eps=eps, adam_w_mode=True)
    if allow_fused and len(devices) == 1 and all(p.is_floating_point() for p in parameters):
        with contextlib.suppress(RuntimeError):  # raised at construction where there is no fused kernel for the device
            optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
            _say(f"fused_adam: torch.optim.AdamW(fused=True) on {devices.pop()}")
            return optimizer
    _say("fused_adam: torch.optim.AdamW, without a fused kernel")
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps)


def _decay_groups(parameters: list[torch.nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """One group when nothing is exempt, so that the common case (LoRA, or no decay) keeps a plain state dict."""
    decayed = [p for p in parameters if p.ndim >= 2]
    exempt = [p for p in parameters if p.ndim < 2]
    if weight_decay == 0 or not exempt or not decayed:
        return [{"params": parameters, "weight_decay": weight_decay if decayed else 0.0}]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]


def _number(cfg: Mapping[str, Any], key: str, default: float | None) -> float:
    value = cfg.get(key)
    if value is None:
        value = default
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ConfigurationError(f"model.optim.{key}={value!r}: expected a number") from None
    if not 0 <= number < float("inf"):
        raise ConfigurationError(f"model.optim.{key}={value!r}: expected a finite number of at least 0")
    return number


def _betas(value: Any) -> tuple[float, float]:
    if value is None:
        return (0.9, 0.999)
    try:
        first, second = (float(beta) for beta in value)
    except (TypeError, ValueError):
        raise ConfigurationError(f"model.optim.betas={value!r}: expected two numbers such as [0.9, 0.999]") from None
    if not (0 <= first < 1 and 0 <= second < 1):
        raise ConfigurationError(f"model.optim.betas={list(value)!r}: each must be at least 0 and below 1")
    return first, second


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name.lower(), [k.lower() for k in known], n=1, cutoff=0.4)
    original = {k.lower(): k for k in known}
    return f" — did you mean {original[nearest[0]]!r}?" if nearest else ""


@rank_zero_only
def _say(message: str) -> None:
    log.info(message)
