"""LoRA on a denoiser, by ``peft``: θ = θ_pre + α·θ_LoRA for any real α, and sums over several adapters.

What files hold, and whose names they have, is :mod:`.lora_files`' business.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from nemo_aligner_diffusion.diffusion.families import ATTENTION_LORA
from nemo_aligner_diffusion.diffusion.lora_files import KOHYA_NAME, WEIGHT_NAME, Lora, read_lora, writing_lora
from nemo_aligner_diffusion.diffusion.settings import LoRASettings
from nemo_aligner_diffusion.errors import ConfigurationError

log = logging.getLogger(__name__)

ADAPTER = "default"


def add_lora(
    denoiser: Any,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: Sequence[str] = ATTENTION_LORA,
) -> None:
    """Freeze ``denoiser`` and give it a trainable adapter that starts as the identity (B = 0).

    Args:
        rank: rank of the update, at least 1 (``model.peft.lora_tuning.adapter_dim``).
        alpha: the update is scaled by ``alpha / rank``; ``None``: ``alpha = rank``.
        dropout: probability of dropping an input of the adapter while training, in ``[0, 1)``.
        target_modules: module-name suffixes to adapt.

    Raises:
        ConfigurationError: no module of the denoiser has one of these names, or its class takes no adapter.
    """
    from peft import LoraConfig

    _check_takes_lora(denoiser)
    names = [name for name, _ in denoiser.named_modules()]
    unmatched = [t for t in target_modules if not any(n == t or n.endswith(f".{t}") for n in names)]
    if unmatched:
        raise ConfigurationError(
            f"model.peft.lora_tuning.target_modules: no module of {type(denoiser).__name__} is named "
            f"{', '.join(unmatched)}; attention layers are named {', '.join(ATTENTION_LORA)}"
        )
    denoiser.requires_grad_(False)
    denoiser.add_adapter(
        LoraConfig(
            r=rank,
            lora_alpha=rank if alpha is None else alpha,  # type: ignore[arg-type]  # peft takes any real
            lora_dropout=dropout,
            target_modules=list(target_modules),
        ),
        adapter_name=ADAPTER,
    )


def _check_takes_lora(denoiser: Any) -> None:
    if not hasattr(denoiser, "add_adapter"):  # in diffusers 0.42: those of PixArt, Lumina, HunyuanDiT and a few more
        raise ConfigurationError(
            f"{type(denoiser).__name__} takes no LoRA in this diffusers; train every weight instead: "
            f"model.peft.peft_scheme=none"
        )


def has_lora(denoiser: Any) -> bool:
    return bool(getattr(denoiser, "peft_config", None))


@contextmanager
def adapters_off(denoiser: Any) -> Iterator[None]:
    """The pre-trained weights θ₀: the same network with its adapters switched off."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    # not denoiser.disable_adapters(): that also switches every adapter's requires_grad, for longer than a call may take
    layers = [layer for layer in denoiser.modules() if isinstance(layer, BaseTunerLayer)]
    before = [layer.disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        if not all(layer.disable_adapters for layer in layers):
            raise RuntimeError("this peft switches adapters off in another way than 0.21; install the pinned version")
        yield
    finally:
        for layer, off in zip(layers, before, strict=True):
            layer._disable_adapters = off


def lora_state_dict(denoiser: Any, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The adapter's tensors as ``peft`` exports them; ``state``: by parameter name, in place of the present ones."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(denoiser, state_dict=state, adapter_name=ADAPTER)


def save_lora_weights(
    denoiser: Any,
    directory: Path,
    state: Mapping[str, Tensor] | None = None,
    pipeline_class: Any = None,
    header: Mapping[str, str] | None = None,
) -> Path:
    """Write an adapter into ``directory`` for every reader: all files whole, or none at all.

    ``pytorch_lora_weights.safetensors`` has ``diffusers``' names; of a UNet's adapter ComfyUI, Forge and A1111 want
    ``kohya_lora_weights.safetensors``, which is written beside it (:func:`write_lora`).

    Args:
        state: replaces the current weights (EMA), by the names of :func:`lora_state_dict`.
        pipeline_class: whose ``load_lora_weights`` will read it; ``None``: Stable Diffusion's.
        header: notes for the files' metadata.
    """
    scales = {
        name: layer.lora_alpha[ADAPTER] / layer.r[ADAPTER]
        for name, layer in denoiser.named_modules()
        if ADAPTER in getattr(layer, "lora_alpha", {})
    }
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in lora_state_dict(denoiser).items():
        module, part = name.split(".lora_")
        tensor = value if state is None else state[name].to(value.dtype)
        tensor = tensor.detach().cpu() * (scales[module] if part.startswith("B.") else 1)
        layers.setdefault(module, {})[f"lora_{part}"] = tensor.contiguous()
    lora, component = Lora(layers, dict(header or {})), lora_component(pipeline_class)
    with ExitStack() as both:
        both.enter_context(writing_lora(lora, directory / WEIGHT_NAME, component))
        if component == "unet" and not lora.more:
            both.enter_context(writing_lora(lora, directory / KOHYA_NAME, component, kohya=True))
    return directory / WEIGHT_NAME


def load_lora_weights(denoiser: Any, path: Path, adapter_name: str, pipeline_class: Any = None) -> None:
    """Add the adapter of an ``export/`` folder or a ``.safetensors`` file to ``denoiser`` under ``adapter_name``.

    Raises:
        CheckpointError: missing, unreadable, or made for another architecture.
    """
    _check_takes_lora(denoiser)
    attach_lora(denoiser, read_lora(path, denoiser, lora_component(pipeline_class), pipeline_class), adapter_name)


def continue_lora(denoiser: Any, path: Path, settings: LoRASettings, pipeline_class: Any = None) -> None:
    """Go on with the adapter of a file (``model.peft.restore_from_path``): the same function, trained as configured.

    Its layers and ranks are the file's, which a rank that is set must be one of; its alpha is the setting's, B divided
    accordingly, so that a learning rate means what it means in a run from the start.

    Raises:
        CheckpointError: unreadable, or of another model.
        ConfigurationError: the settings ask for other ranks or other layers.
    """
    _check_takes_lora(denoiser)
    lora = read_lora(path, denoiser, lora_component(pipeline_class), pipeline_class)
    ranks = sorted(set(lora.ranks.values()))
    if settings.adapter_dim is None:
        log.info("going on with the adapter of %s: rank %s", path, ", ".join(map(str, ranks)))
    elif settings.adapter_dim not in ranks:
        raise ConfigurationError(
            f"model.peft.restore_from_path = {path}: its adapters have rank {', '.join(map(str, ranks))}, and "
            f"{settings.given('adapter_dim')}; set model.peft.lora_tuning.adapter_dim={ranks[-1]}"
        )
    targets = settings.target_modules
    if targets and (others := [m for m in lora.layers if not any(m == t or m.endswith(f".{t}") for t in targets)]):
        raise ConfigurationError(
            f"model.peft.restore_from_path = {path}: has an adapter on {others[0]} and {len(others) - 1} more layers "
            f"that {settings.given('target_modules')} leaves out; its layers are trained, so leave that null"
        )
    if "lora_magnitude_vector" in lora.more:
        raise ConfigurationError(
            f"model.peft.restore_from_path = {path}: is DoRA, which can be used but not trained on here"
        )
    attach_lora(denoiser, lora, ADAPTER, settings.alpha, settings.dropout)


def attach_lora(
    denoiser: Any, lora: Lora, adapter_name: str = ADAPTER, alpha: float | None = None, dropout: float = 0.0
) -> None:
    """Add ``lora`` under ``adapter_name``, to be trained on with ``alpha``; the function that it is stays the same.

    Args:
        alpha: of the adapter from now on (B is divided by ``alpha / rank``); ``None``: its rank.
    """
    ranks = {f"^{module}": rank for module, rank in lora.ranks.items() if rank != lora.rank}  # ^: not a name's end
    config = {
        "r": lora.rank,
        "lora_alpha": lora.rank if alpha is None else alpha,
        "rank_pattern": ranks,
        "alpha_pattern": ranks if alpha is None else {},
        "target_modules": list(lora.layers),
        "lora_dropout": dropout,
        "lora_bias": "lora_B.bias" in lora.more,
        "use_dora": "lora_magnitude_vector" in lora.more,
    }
    state = {
        f"unet.{module}.{part}": tensor * (lora.ranks[module] / alpha if alpha and part.startswith("lora_B") else 1)
        for module, layer in lora.layers.items()
        for part, tensor in layer.items()
    }
    with warnings.catch_warnings():  # which layers get it is said by the tensors' names, by `target_modules` roughly
        warnings.filterwarnings("ignore", message="While injecting the PEFT adapters", category=RuntimeWarning)
        denoiser.load_lora_adapter(
            state,
            prefix="unet",
            adapter_name=adapter_name,
            metadata={f"unet.{key}": value for key, value in config.items()},
        )


def lora_component(pipeline_class: Any) -> str:
    """The denoiser's name in a pipeline's LoRA files."""
    import diffusers

    writer = getattr(pipeline_class or diffusers.StableDiffusionPipeline, "save_lora_weights", None)
    takes = inspect.signature(writer).parameters if writer is not None else ()  # without a loader: as most transformers
    return "unet" if "unet_lora_layers" in takes else "transformer"


def mix(denoiser: Any, weights: Mapping[str, float]) -> None:
    """θ = θ_pre + Σ_k α_k·θ_LoRA^k over adapters loaded under these names (any real α)."""
    denoiser.set_adapters(list(weights), [float(weight) for weight in weights.values()])
