"""The report's "Using the result": commands and code that work with this run's export, ready to copy."""

from __future__ import annotations

import shlex
from typing import Any

from markupsafe import Markup

from nemo_aligner_diffusion.diffusion.settings import SAMPLER_ALIASES, SAMPLERS, SamplingSettings
from nemo_aligner_diffusion.errors import ConfigurationError, printable
from nemo_aligner_diffusion.evaluation.run_files import RunFiles


def usage(run: RunFiles) -> dict[str, Any]:
    """``commands`` and ``code``: how to generate with the export, in this project and in plain diffusers."""
    folder = str(run.setting("exp_manager.explicit_log_dir", run.folder))
    prompt = printable(run.prompt_rewards[0]["prompt"], 2000) if run.prompt_rewards else "a red apple"
    script = "python examples/mm/stable_diffusion/generate.py"
    model = run.setting("model.from_pretrained")
    base = f" --model {shlex.quote(str(model))}" if model else ""
    asked = f"--prompt {shlex.quote(prompt)}"
    if run.lora_export:
        export = shlex.quote(f"{folder}/export")
        commands = [
            "# the base model beside the tuned one, same seeds",
            f"{script}{base} --lora {export} --compare {asked} --num-images 4",
            "# less or more of what was learnt: a grid over the adapter's scale",
            f"{script}{base} --lora {export} --scales 0,0.5,1,1.5 {asked}",
            "# anneal from the base model to the tuned one along the sampling steps",
            f"{script}{base} --lora {export} --weights base,draft,linear,power_2 {asked}",
        ]
    elif run.denoiser_export:
        export = shlex.quote(f"{folder}/export/{run.denoiser_export.name}")
        commands = [
            "# the base model beside the tuned one, same seeds",
            f"{script}{base} --unet {export} --compare {asked} --num-images 4",
        ]
    else:
        nothing = (
            "Nothing has been exported yet: export/ holds neither pytorch_lora_weights.safetensors nor a network's "
            "folder such as unet/ or transformer/. It is written at the end of a run and when a run is interrupted."
        )
        return {"nothing": nothing}
    return {"commands": _lines(commands), "code": _lines(_diffusers(run, folder, prompt, model))}


def _lines(lines: list[str]) -> Markup:
    return Markup("\n").join(printable(line, 4000) for line in lines)


def _diffusers(run: RunFiles, folder: str, prompt: str, model: Any) -> list[str]:
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
            imports.append(f"# the run was based on the {part} of {printable(weights)}: the pipeline must hold it too")
    facts = _facts(run)
    if run.lora_export:
        weights = f'{folder + "/export"!r}, weight_name="pytorch_lora_weights.safetensors"'
        load = f"load_lora_weights({weights})"
        if not facts["loads_lora"]:
            load = f'{facts["trained"]}.load_lora_adapter({weights}, prefix="transformer")'
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
        facts["guidance_argument"]: run.setting("model.infer.unconditional_guidance_scale"),
        "height": run.setting("model.infer.height"),
        "width": run.setting("model.infer.width"),
        "eta": run.setting("model.infer.eta") or None,
        **facts["arguments"],
    }
    written = "".join(f", {name}={value!r}" for name, value in given.items() if value is not None)
    seeds = run.setting("model.data.validation.seeds")
    seed = seeds[0] if isinstance(seeds, list) and seeds and isinstance(seeds[0], int) else 0
    lines.append(f"generator = torch.Generator().manual_seed({seed})  # as in the pictures above")
    lines.append(f"picture = pipeline({prompt!r}, generator=generator{written})[0][0]")
    return ["import torch", f"from diffusers import {', '.join(sorted(names))}", *imports, "", *lines]


def _facts(run: RunFiles) -> dict[str, Any]:
    """What ``run.json`` says of the pipeline, as far as it may stand in code, which a reader copies and runs."""
    said = run.run.get("pipeline")
    said = said if isinstance(said, dict) else {}
    arguments = said.get("arguments")
    return {
        "trained": _identifier(said.get("trained"), "transformer"),
        "guidance_argument": _identifier(said.get("guidance_argument"), "guidance_scale"),
        "loads_lora": said.get("loads_lora", True),
        "arguments": {k: v for k, v in arguments.items() if k.isidentifier()} if isinstance(arguments, dict) else {},
    }


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
