"""The work of ``export.py``: what a run has learnt, or any LoRA, as the file that another program reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nemo_aligner_diffusion.diffusion.loading import load_model
from nemo_aligner_diffusion.diffusion.lora import attach_lora, lora_component
from nemo_aligner_diffusion.diffusion.lora_files import lora_file, read_lora, write_lora
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.errors import CheckpointError, ConfigurationError, OutputError
from nemo_aligner_diffusion.evaluation.generation import DTYPES, naming_the_base, resolve_settings, run_of
from nemo_aligner_diffusion.evaluation.request import Adapter, Request
from nemo_aligner_diffusion.formats.checkpoints import load_component, read_notes, save_component
from nemo_aligner_diffusion.formats.ldm import ldm_state_dict
from nemo_aligner_diffusion.formats.weight_files import find_weights
from nemo_aligner_diffusion.runtime.files import atomic_folder, atomic_path
from nemo_aligner_diffusion.runtime.messages import quiet_libraries

NOTES = ("ss_", "modelspec.", "nemo_aligner_diffusion.")  # keys of headers that are kept


@dataclass(frozen=True)
class Conversion:
    """What to make of what.

    Attributes:
        source: a run directory, its ``export/``, a LoRA file, or the folder of a fully tuned denoiser.
        to: ``diffusers`` or ``kohya`` (a LoRA file), ``pipeline`` (a folder) or ``single-file``, both with it merged.
        output: the file or folder.
        model: base model; ``None``: the run's, else the embedded one.
        text: its text encoders and tokenizers, folder or hub id; ``None``: the run's, else the model's.
        weight: of the adapter.
        precision: of merged weights: 32, bf16 or 16.
        overwrite: replace what ``output`` names.
    """

    source: Path
    to: str
    output: Path
    model: Path | None = None
    text: Path | None = None
    weight: float = 1.0
    precision: str = "32"
    overwrite: bool = False


def convert_export(asked: Conversion) -> Path:
    """Write ``asked.output``, whole or not at all.

    Raises:
        AlignerError: unreadable, unfit for the model, or there already.
    """
    if asked.output.exists() and not asked.overwrite:
        raise OutputError(f"{asked.output} exists; give another --output, or --overwrite")
    lora = lora_file(asked.source)
    denoiser = None if lora is not None else _denoiser_folder(asked.source)
    is_adapter = asked.to in ("diffusers", "kohya")
    if is_adapter and lora is None:
        raise ConfigurationError(
            f"{asked.source}: every weight was trained, which no LoRA can hold; write --to pipeline or single-file"
        )
    request = Request(adapters=[Adapter(lora)] if lora else [], unet=denoiser, model=asked.model, text=asked.text)
    run = run_of(request)
    settings = resolve_settings(request, run)
    quiet_libraries()
    dtype = DTYPES[asked.precision]
    model = load_model(settings.model, settings.unet, settings.vae, dtype, text_path=settings.text,
                       revision=settings.revision, **settings.pipeline)  # fmt: skip
    if lora is None:
        assert denoiser is not None
        load_component(model.denoiser, model.trained, denoiser)
        header = read_notes(find_weights(denoiser, model.trained)[0])
    else:
        component = lora_component(type(model.pipe))
        with naming_the_base(settings, run):
            adapter = read_lora(lora, model.denoiser, component, type(model.pipe)).scaled(asked.weight)
        if is_adapter:
            return write_lora(adapter, asked.output, component, kohya=asked.to == "kohya")
        attach_lora(model.denoiser, adapter)
        model.denoiser.fuse_lora()
        model.denoiser.unload_lora()
        header = {**adapter.header, f"{NOTES[-1]}merged_weight": str(asked.weight)}
    return _write_merged(model, asked, _of_merged(header))


def _of_merged(header: Mapping[str, str]) -> dict[str, str]:
    """A header without what holds of an adapter alone."""
    kept = {k: v for k, v in header.items() if k.startswith(NOTES) and not k.startswith("ss_network_")}
    if "modelspec.architecture" in kept:
        kept["modelspec.architecture"] = kept["modelspec.architecture"].removesuffix("/lora")
    return kept


def _write_merged(model: DiffusionModel, asked: Conversion, notes: dict[str, str]) -> Path:
    if asked.to == "pipeline":
        denoiser = model.denoiser
        denoiser.save_pretrained = lambda folder: save_component(denoiser, Path(folder), notes)
        with atomic_folder(asked.output) as folder:
            model.pipe.save_pretrained(folder)
        return asked.output
    from safetensors.torch import save_file

    state = ldm_state_dict(model.pipe)
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(asked.output) as file:
        save_file(state, file, {"format": "pt", **notes})
    return asked.output


def _denoiser_folder(path: Path) -> Path:
    folders = [path, *path.glob("[!.]*"), *path.glob("export/[!.]*")] if path.is_dir() else []
    found = [folder for folder in folders if (folder / "config.json").is_file()]
    if not found:
        raise CheckpointError(f"{path}: neither a LoRA nor a tuned denoiser (export/unet, export/transformer) is there")
    return found[0]
