"""The report's "Using the result": commands and code that work with this run's export, ready to copy."""

from __future__ import annotations

import shlex
from html import escape
from typing import Any

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.evaluation.run_files import RunFiles


def usage(run: RunFiles) -> str:
    """HTML: how to generate with the export, in this project and in plain diffusers."""
    folder = str(run.setting("exp_manager.explicit_log_dir", run.folder))
    prompt = run.prompt_rewards[0]["prompt"] if run.prompt_rewards else "a red apple"
    script = "python examples/mm/stable_diffusion/generate.py"
    model = run.setting("model.from_pretrained")
    base = f" --model {shlex.quote(str(model))}" if model else ""
    if run.lora_export:
        export = shlex.quote(f"{folder}/export")
        commands = [
            "# the base model beside the tuned one, same seeds",
            f"{script}{base} --lora {export} --compare --prompt {shlex.quote(prompt)} --num-images 4",
            "# less or more of what was learnt: a grid over the adapter's scale",
            f"{script}{base} --lora {export} --scales 0,0.5,1,1.5 --prompt {shlex.quote(prompt)}",
            "# anneal from the base model to the tuned one along the sampling steps",
            f"{script}{base} --lora {export} --weights base,draft,linear,power_2 --prompt {shlex.quote(prompt)}",
        ]
    elif run.denoiser_export:
        export = shlex.quote(f"{folder}/export/{run.denoiser_export.name}")
        commands = [
            "# the base model beside the tuned one, same seeds",
            f"{script}{base} --unet {export} --compare --prompt {shlex.quote(prompt)} --num-images 4",
        ]
    else:
        return (
            '<p class="quiet">Nothing has been exported yet: export/ holds neither pytorch_lora_weights.safetensors '
            "nor a network's folder such as unet/ or transformer/. It is written at the end of a run and when a run is "
            "interrupted.</p>"
        )
    return (
        f"<h3>With this project</h3><pre>{escape(chr(10).join(commands))}</pre>"
        f"<h3>With plain diffusers</h3><pre>{escape(_diffusers(run, folder, prompt, model))}</pre>"
    )


def _diffusers(run: RunFiles, folder: str, prompt: str, model: Any) -> str:
    imports, source = [], repr(str(model))
    if not model:
        imports, source = (
            ["from nemo_aligner_diffusion.embedded_assets import embedded_model_path"],
            "embedded_model_path()",
        )
    names = ["DiffusionPipeline"]
    for key, part in (("unet_config", "denoiser"), ("first_stage_config", "VAE")):
        weights = run.setting(f"model.{key}.from_pretrained")
        if weights and (part == "VAE" or run.lora_export):
            imports.append(f"# the run was based on the {part} of {weights}: the pipeline must hold it too")
    pipeline = run.run.get("pipeline")
    facts = pipeline if isinstance(pipeline, dict) else {}
    if run.lora_export:
        weights = f'{folder + "/export"!r}, weight_name="pytorch_lora_weights.safetensors"'
        load = f"load_lora_weights({weights})"
        if not facts.get("loads_lora", True):
            load = f'{facts.get("trained")}.load_lora_adapter({weights}, prefix="transformer")'
        lines = [f"pipeline = DiffusionPipeline.from_pretrained({source})", f"pipeline.{load}"]
    else:
        assert run.denoiser_export is not None
        name = run.denoiser_export.name
        names.append("AutoModel")
        lines = [
            f"{name} = AutoModel.from_pretrained({f'{folder}/export/{name}'!r})",
            f"pipeline = DiffusionPipeline.from_pretrained({source}, {name}={name})",
        ]
    solver = _solver(run)
    if solver is not None:
        names.append(solver[0])
        options = "".join(f", {name}={value!r}" for name, value in solver[1].items())
        lines.append(f"pipeline.scheduler = {solver[0]}.from_config(pipeline.scheduler.config{options})")
    given = {
        "num_inference_steps": run.setting("model.infer.inference_steps"),
        facts.get("guidance_argument", "guidance_scale"): run.setting("model.infer.unconditional_guidance_scale"),
        "height": run.setting("model.infer.height"),
        "width": run.setting("model.infer.width"),
        "eta": run.setting("model.infer.eta") or None,
        **(facts.get("arguments") or {}),
    }
    written = "".join(f", {name}={value!r}" for name, value in given.items() if name and value is not None)
    seed = next(iter(run.setting("model.data.validation.seeds", None) or [0]))
    lines.append(f"generator = torch.Generator().manual_seed({seed})  # as in the pictures above")
    lines.append(f"picture = pipeline({prompt!r}, generator=generator{written})[0][0]")
    return "\n".join(["import torch", f"from diffusers import {', '.join(sorted(names))}", *imports, "", *lines])


def _solver(run: RunFiles) -> tuple[str, dict[str, Any]] | None:
    """The class of ``diffusers`` and the options of ``model.infer.sampler_type``; ``None``: the pipeline's own."""
    from nemo_aligner_diffusion.diffusion.schedule import sampler_name
    from nemo_aligner_diffusion.diffusion.settings import SAMPLERS

    try:
        return SAMPLERS[sampler_name(str(run.setting("model.infer.sampler_type")))]
    except ConfigurationError:  # null, or of another version of this project
        return None
