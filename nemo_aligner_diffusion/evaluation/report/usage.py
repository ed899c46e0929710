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
_GENERATE = "python examples/mm/stable_diffusion/generate.py"


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
    model = run.setting("model.from_pretrained")
    base = f"{_GENERATE} --model {shlex.quote(str(model))}" if model else _GENERATE
    tuned = f"{base} {'--lora' if is_lora else '--unet'} {shlex.quote(export)}"
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
    if (run.folder / "export" / KOHYA_FILE).is_file():
        commands.append(f"# for ComfyUI, Forge and A1111: {export}/{KOHYA_FILE}")
    return {
        "commands": _lines(commands),
        "code": _lines(_diffusers(run, export, None if is_lora else denoiser, prompt)),
    }


def _lines(lines: list[str]) -> Markup:
    return Markup("\n").join(printable(line, 4000) for line in lines)


def _diffusers(run: RunFiles, export: str, denoiser: str | None, prompt: str) -> list[str]:
    names, notes, lines = ["DiffusionPipeline"], [], []
    model = run.setting("model.from_pretrained")
    source = repr(str(model)) if model else "embedded_model_path()"
    if not model:
        notes.append("from nemo_aligner_diffusion.embedded_assets import embedded_model_path")
    for key, part in (("unet_config", "denoiser"), ("first_stage_config", "VAE")):
        weights = run.setting(f"model.{key}.from_pretrained")
        if weights and (part == "VAE" or denoiser is None):
            notes.append(f"# the run was based on the {part} of {printable(weights)}: the pipeline must hold it too")
    facts = run.run.get("pipeline")
    facts = facts if isinstance(facts, dict) else {}
    if denoiser is None:
        load = f"load_lora_weights({export!r}, weight_name={LORA_FILE!r})"
        if not facts.get("loads_lora", True):
            trained = _identifier(facts.get("trained"), "transformer")
            load = f'{trained}.load_lora_adapter({export!r}, weight_name={LORA_FILE!r}, prefix="transformer")'
        lines += [f"pipeline = DiffusionPipeline.from_pretrained({source})", f"pipeline.{load}"]
    else:
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
