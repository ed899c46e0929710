"""The report's "Using the result": commands and code that work with this run's export, ready to copy."""

from __future__ import annotations

import shlex
from typing import Any

from markupsafe import Markup

from nemo_aligner_diffusion.diffusion.families import as_pipelines_write
from nemo_aligner_diffusion.diffusion.settings import SAMPLER_ALIASES, SAMPLERS, SamplingSettings
from nemo_aligner_diffusion.errors import ConfigurationError, printable
from nemo_aligner_diffusion.evaluation.run_files import RunFiles

LORA_FILE, KOHYA_FILE = "pytorch_lora_weights.safetensors", "kohya_lora_weights.safetensors"
_GENERATE, _EXPORT = "nad-generate", "nad-export"


def usage(run: RunFiles) -> dict[str, Any]:
    """``commands`` and ``code``: how to generate with the export, in this project and in plain diffusers.

    Both are empty where nothing has been exported.
    """
    denoisers = [path.parent.name for path in sorted(run.folder.glob("export/[!.]*/config.json"))]
    denoiser = next((name for name in denoisers if name.isidentifier()), None)  # unet, transformer, …
    is_lora = (run.folder / "export" / LORA_FILE).is_file()
    if not is_lora and denoiser is None:
        return {"commands": None, "code": None}
    export = f"{run.setting('exp_manager.explicit_log_dir', run.folder)}/export"
    export = export if is_lora else f"{export}/{denoiser}"
    prompt = printable(run.prompt_rewards[0]["prompt"], 2000) if run.prompt_rewards else "a red apple"
    tuned = f"{_GENERATE} {'--lora' if is_lora else '--unet'} {shlex.quote(export)}"  # the base model is the run's
    given = _given(run)
    tuned += f" --model {shlex.quote(given or 'FOLDER')}" if given is not None else ""
    asked = f"--prompt {shlex.quote(prompt)}"
    commands = [
        "# the base model beside the tuned one, same seeds",
        f"{tuned} --compare {asked} --num-images 4",
    ]
    if is_lora:
        commands += [
            "# less or more of what was learnt: a grid over the adapter's scale",
            f"{tuned} --scales 0,0.5,1,1.5 {asked}",
            "# anneal from the base model to the tuned one along the sampling steps",
            f"{tuned} --weights base,draft,linear,power_2 {asked}",
        ]
    merged = None
    if not _is_one_folder(run):
        merged = f"{run.setting('exp_manager.explicit_log_dir', run.folder)}/merged"
        commands += [
            "# the whole tuned model as a folder of plain diffusers, for the code below",
            f"{_EXPORT} {shlex.quote(export)} --to pipeline --output {shlex.quote(merged)}",
        ]
    if (run.folder / "export" / KOHYA_FILE).is_file():
        commands.append(f"# for ComfyUI, Forge and A1111: {export}/{KOHYA_FILE}")
    return {
        "commands": _lines(commands),
        "code": _lines(_diffusers(run, export, None if is_lora else denoiser, merged, prompt)),
    }


def _given(run: RunFiles) -> str | None:
    """Where a pipeline object that a program tuned is from, ``""`` if it does not say; ``None``: there was none."""
    facts = run.run.get("pipeline")
    given = facts.get("given") if isinstance(facts, dict) else None
    return given if isinstance(given, str) else None


def _is_one_folder(run: RunFiles) -> bool:
    """Whether the base model is what ``DiffusionPipeline.from_pretrained`` takes, all of it: a folder or a hub id."""
    parts = (run.setting(f"model.{part}_config.from_pretrained") for part in ("unet", "first_stage", "cond_stage"))
    whole = str(run.setting("model.from_pretrained") or "")
    return not any(parts) and not whole.lower().endswith((".safetensors", ".ckpt", ".bin", ".pt", ".pth"))


def _lines(lines: list[str]) -> Markup:
    return Markup("\n").join(printable(line, 4000) for line in lines)


def _diffusers(run: RunFiles, export: str, denoiser: str | None, merged: str | None, prompt: str) -> list[str]:
    names, notes, lines = ["DiffusionPipeline"], [], []
    model, revision = run.setting("model.from_pretrained"), run.setting("model.revision")
    if (given := _given(run)) is not None:
        model = given or "FOLDER"  # of the pipeline that was tuned
    source = repr(str(model)) if model else "embedded_model_path()"
    source += f", revision={str(revision)!r}" if model and revision else ""
    facts = run.run.get("pipeline")
    facts = facts if isinstance(facts, dict) else {}
    if merged is not None:
        lines.append(f"pipeline = DiffusionPipeline.from_pretrained({merged!r})  # made by nad-export, above")
    elif not model:
        notes.append("from nemo_aligner_diffusion.embedded_assets import embedded_model_path")
    if merged is None and denoiser is None:
        load = f"load_lora_weights({export!r}, weight_name={LORA_FILE!r})"
        if not facts.get("loads_lora", True):
            trained = _identifier(facts.get("trained"), "transformer")
            load = f'{trained}.load_lora_adapter({export!r}, weight_name={LORA_FILE!r}, prefix="transformer")'
        lines += [f"pipeline = DiffusionPipeline.from_pretrained({source})", f"pipeline.{load}"]
    elif merged is None:
        names.append("AutoModel")
        lines.append(f"{denoiser} = AutoModel.from_pretrained({export!r})")
        lines.append(f"pipeline = DiffusionPipeline.from_pretrained({source}, {denoiser}={denoiser})")
    solver = _solver(run)
    if solver is not None:
        names.append(solver[0])
        options = _arguments(solver[1])
        lines.append(f"pipeline.scheduler = {solver[0]}.from_config(pipeline.scheduler.config{options})")
    own = facts.get("arguments")
    arguments = {
        "num_inference_steps": run.setting("model.infer.inference_steps"),
        _identifier(facts.get("guidance_argument"), "guidance_scale"): run.setting(
            "model.infer.unconditional_guidance_scale"
        ),
        "height": run.setting("model.infer.height"),
        "width": run.setting("model.infer.width"),
        "eta": run.setting("model.infer.eta") or None,
        **(own if isinstance(own, dict) else {}),
    }
    seeds = run.setting("model.data.validation.seeds")
    seed = seeds[0] if isinstance(seeds, list) and seeds and isinstance(seeds[0], int) else 0
    lines.append(f"generator = torch.Generator().manual_seed({seed})  # as in the pictures above")
    lines.append(f"picture = pipeline({prompt!r}, generator=generator{_arguments(arguments)})[0][0]")
    return ["import torch", f"from diffusers import {', '.join(sorted(names))}", *notes, "", *lines]


def _arguments(values: dict[str, Any]) -> str:
    """``, name=value`` of each; a name that comes from a file of others must not become code, which a reader runs."""
    written = {name: as_pipelines_write(value) for name, value in values.items()}
    return "".join(f", {k}={v!r}" for k, v in written.items() if v is not None and k.isidentifier())


def _identifier(name: Any, otherwise: str) -> str:
    return name if isinstance(name, str) and name.isidentifier() else otherwise


def _solver(run: RunFiles) -> tuple[str, dict[str, Any]] | None:
    """The class of ``diffusers`` and the options of ``model.infer.sampler_type``; ``None``: the pipeline's own."""
    key = "model.infer.sampler_type"
    try:
        name = SamplingSettings.kinds()["sampler_type"].read(key, run.setting(key))
    except ConfigurationError:  # of another version of this project
        return None
    return SAMPLERS.get(SAMPLER_ALIASES.get(name, name))
