"""The report's "Using the result": commands and code that work with this run's export, ready to copy."""

from __future__ import annotations

import shlex
from html import escape
from typing import Any

from nemo_aligner_diffusion.evaluation.run_files import RunFiles

_SCHEDULERS = {  # model.infer.sampler_type -> diffusers class
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "plms": "PNDMScheduler",
}


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
    elif run.unet_export:
        export = shlex.quote(f"{folder}/export/unet")
        commands = [
            "# the base model beside the tuned one, same seeds",
            f"{script}{base} --unet {export} --compare --prompt {shlex.quote(prompt)} --num-images 4",
        ]
    else:
        return (
            '<p class="quiet">Nothing has been exported yet: export/ holds neither pytorch_lora_weights.safetensors '
            "nor unet/. It is written at the end of a run and when a run is interrupted.</p>"
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
    names = ["StableDiffusionPipeline"]
    if not run.lora_export:
        names.append("UNet2DConditionModel")
    scheduler = _SCHEDULERS.get(str(run.setting("model.infer.sampler_type", "")).lower())
    if scheduler:
        names.append(scheduler)
    lines = [f"from diffusers import {', '.join(sorted(names))}", *imports, ""]
    for key, part in (("unet_config", "UNet"), ("first_stage_config", "VAE")):
        weights = run.setting(f"model.{key}.from_pretrained")
        if weights and (part == "VAE" or run.lora_export):
            lines.append(f"# the run was based on the {part} of {weights}: the pipeline must hold it too")
    if run.lora_export:
        lines += [
            f"pipeline = StableDiffusionPipeline.from_pretrained({source})",
            f'pipeline.load_lora_weights({folder + "/export"!r}, weight_name="pytorch_lora_weights.safetensors")',
        ]
    else:
        lines += [
            f"unet = UNet2DConditionModel.from_pretrained({folder + '/export/unet'!r})",
            f"pipeline = StableDiffusionPipeline.from_pretrained({source}, unet=unet)",
        ]
    if scheduler:
        lines.append(f"pipeline.scheduler = {scheduler}.from_config(pipeline.scheduler.config)")
    options = {
        "num_inference_steps": run.setting("model.infer.inference_steps"),
        "guidance_scale": run.setting("model.infer.unconditional_guidance_scale"),
        "height": run.setting("model.infer.height"),
        "width": run.setting("model.infer.width"),
    }
    written = "".join(f", {name}={value!r}" for name, value in options.items() if isinstance(value, (int, float)))
    lines.append(f"picture = pipeline({prompt!r}{written}).images[0]")
    return "\n".join(lines)
