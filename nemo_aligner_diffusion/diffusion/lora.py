"""LoRA on a denoiser, by ``peft``: θ = θ_pre + α·θ_LoRA for any real α, and sums over several adapters.

The exported file is what ``diffusers``' ``pipeline.load_lora_weights`` reads, rank and alpha included.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from nemo_aligner_diffusion.diffusion.families import ATTENTION_LORA
from nemo_aligner_diffusion.errors import CheckpointError, ConfigurationError, first_line, printable

ADAPTER = "default"
WEIGHT_NAME = "pytorch_lora_weights.safetensors"

# What a LoRA file's metadata may set. PEFT would act on more of it: import a module that it names (megatron_core),
# decompose every weight (init_lora_weights), repeat layers (layer_replication).
_METADATA_FIELDS = {
    "r": int,
    "lora_alpha": (int, float),
    "rank_pattern": dict,
    "alpha_pattern": dict,
    "target_modules": list,
    "lora_bias": bool,
    "use_dora": bool,
    "use_rslora": bool,
}
_MODULE_NAME = re.compile(r"[\w.]{1,300}")  # PEFT takes some of them for regular expressions


def add_lora(
    denoiser: Any,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: Sequence[str] = ATTENTION_LORA,
    adapter_name: str = ADAPTER,
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

    if not hasattr(denoiser, "add_adapter"):  # in diffusers 0.42: those of PixArt, Lumina, HunyuanDiT and a few more
        raise ConfigurationError(
            f"{type(denoiser).__name__} takes no LoRA in this diffusers; train every weight instead: "
            f"model.peft.peft_scheme=none"
        )
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
        adapter_name=adapter_name,
    )


def has_lora(denoiser: Any) -> bool:
    return bool(getattr(denoiser, "peft_config", None))


@contextmanager
def adapters_off(denoiser: Any) -> Iterator[None]:
    """The pre-trained weights θ₀: the same network with its adapters switched off."""
    denoiser.disable_adapters()
    try:
        yield
    finally:
        denoiser.enable_adapters()


def lora_state_dict(
    denoiser: Any, adapter_name: str = ADAPTER, state: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The adapter's tensors as ``peft`` exports them; ``state``: by parameter name, in place of the present ones."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(denoiser, state_dict=state, adapter_name=adapter_name)


def save_lora_weights(
    denoiser: Any,
    directory: Path,
    state: Mapping[str, Tensor] | None = None,
    adapter_name: str = ADAPTER,
    pipeline_class: Any = None,
) -> Path:
    """Write ``pytorch_lora_weights.safetensors`` atomically; ``state`` replaces the current weights (EMA).

    Args:
        pipeline_class: whose ``load_lora_weights`` will read it; ``None``: Stable Diffusion's.
    """
    layers = {name: value.detach().cpu() for name, value in lora_state_dict(denoiser, adapter_name).items()}
    if state is not None:
        layers = {name: state[name].detach().to(value.dtype).cpu() for name, value in layers.items()}
    directory.mkdir(parents=True, exist_ok=True)
    temporary = f".{WEIGHT_NAME}.{os.getpid()}.tmp"  # which the next run removes if this one is killed
    writer, component = _lora_format(pipeline_class)
    writer.save_lora_weights(
        directory,
        weight_name=temporary,
        **{
            f"{component}_lora_layers": {name: value.contiguous() for name, value in layers.items()},
            # rank and alpha, for the loader
            f"{component}_lora_adapter_metadata": denoiser.peft_config[adapter_name].to_dict(),
        },
    )
    os.replace(directory / temporary, directory / WEIGHT_NAME)
    return directory / WEIGHT_NAME


def load_lora_weights(denoiser: Any, path: Path, adapter_name: str, pipeline_class: Any = None) -> None:
    """Add the adapter of an ``export/`` folder or a ``.safetensors`` file to ``denoiser`` under ``adapter_name``.

    Raises:
        CheckpointError: missing, unreadable, or made for another architecture.
    """
    file = path / WEIGHT_NAME if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{file}: no such LoRA file; expected an export folder or a .safetensors file")
    reader, component = _lora_format(pipeline_class)
    try:
        state, alphas, metadata = _lora_state(file, reader)
        given = {} if alphas is None else {"network_alphas": alphas}
        denoiser.load_lora_adapter(state, prefix=component, adapter_name=adapter_name, metadata=metadata, **given)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{file}: this LoRA does not fit the denoiser: {first_line(error)}") from error


def _lora_format(pipeline_class: Any) -> tuple[Any, str]:
    """The class that writes and reads a pipeline's LoRA files, and the component's name in them."""
    import diffusers

    chosen = pipeline_class or diffusers.StableDiffusionPipeline
    if not hasattr(chosen, "save_lora_weights"):  # a pipeline without a LoRA loader: names as most transformers'
        chosen = diffusers.ZImagePipeline
    return chosen, "unet" if "unet_lora_layers" in inspect.signature(chosen.save_lora_weights).parameters else (
        "transformer"
    )


def mix(denoiser: Any, weights: Mapping[str, float]) -> None:
    """θ = θ_pre + Σ_k α_k·θ_LoRA^k over adapters loaded under these names (any real α)."""
    denoiser.set_adapters(list(weights), [float(weight) for weight in weights.values()])


def _lora_state(file: Path, reader: Any) -> tuple[dict[str, Tensor], Any, Any]:
    from nemo_aligner_diffusion.formats.checkpoints import read_tensors

    read_tensors(file)  # a damaged or pickled file ends here, with a message of ours
    # (state, metadata), with the alphas of other trainers' files in between where the pipeline knows such files
    asked = {"return_alphas": True} if "return_alphas" in inspect.signature(reader.lora_state_dict).parameters else {}
    state, *alphas, metadata = reader.lora_state_dict(
        str(file.parent), weight_name=file.name, return_lora_metadata=True, local_files_only=True, **asked
    )
    return state, alphas[0] if alphas else None, _checked_metadata(file, state, metadata)


def _checked_metadata(file: Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any] | None) -> Any:
    """The fields of ``metadata`` that describe an adapter, with ranks that the tensors have; ``None`` without any."""
    if not metadata:
        return None
    down = [min(tensor.shape) for name, tensor in state.items() if "lora_A" in name and tensor.ndim > 1]
    kept = {}
    for key, value in metadata.items():
        field = key.rpartition(".")[2]
        kind = _METADATA_FIELDS.get(field)
        if kind is None:
            continue
        right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))  # type: ignore[arg-type]
        numbers = [value] if field == "r" else list(value.values()) if isinstance(value, dict) else []
        names = list(value) if isinstance(value, (dict, list)) else []
        right = right and all(isinstance(name, str) and _MODULE_NAME.fullmatch(name) for name in names)
        right = right and all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in numbers)
        if right and field in ("r", "rank_pattern"):
            right = all(isinstance(rank, int) and 1 <= rank <= max(down, default=0) for rank in numbers)
        if not right:
            raise CheckpointError(
                f"{file}: its metadata gives {field} = '{printable(value, 80)}', which its tensors, of ranks up to "
                f"{max(down, default=0)}, do not bear out; export it again"
            )
        kept[key] = value
    return kept
