"""The table of ``docs/models.md``, from the tiny pipelines that the tests train and the facts of their families.

Run from the project's root to write it anew:

    python tests/models_page.py docs/models.md
"""

from __future__ import annotations

import inspect

from generated import write
from tiny_pipelines import MAIN, ROWS, TinyPipeline

from nemo_aligner_diffusion.diffusion.families import family_of, lora_targets
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.diffusion.recognition import of_pipeline

BEGIN, END = "<!-- table: tests/models_page.py -->", "<!-- end of table -->"


def kind(row: TinyPipeline) -> str:
    given = {*row.conditioning(1), *row.arguments}
    if "prompt" not in given:
        return "from other inputs"
    further = [name for name in ("image", "mask_image", "control_image") if name in given]
    if "control_image" in inspect.signature(row.pipeline.__call__).parameters and "image" in further:
        further = ["control_image"]
    what = "video" if row.video else "picture"
    return f"{what}, needs {' and '.join(further)}" if further else what


def how_tested(row: TinyPipeline) -> str:
    if "prompt" not in row.conditioning(1):
        return "refused by name"
    return "every method, exact" if row in MAIN else "a DRTune step"


def recipe(row: TinyPipeline) -> str:
    """The family whose settings hold; the tiny Stable Diffusion itself is of none."""
    kind = row.pipeline.__name__
    found = "sd15, sd21" if kind == "StableDiffusionPipeline" else of_pipeline(kind, lambda part: {}).architecture
    return found or "other"


def table() -> str:
    columns = ("pipeline", "makes", "trained", "guidance", "[recipe](#recipes)", "LoRA layers by default",
               "given or declared", "tested")  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for row in ROWS:
        family = family_of(row.pipeline)
        declared = [f"`{name}={value!r}`" for name, value in family.arguments.items()]
        declared += [f"stateless: `{name}`" for name in sorted({*family.stateless, *row.stateless})]
        declared += [f"gradient in training mode: `{name}`" for name in family.gradient_in_training]
        declared += [f"needs the package `{row.needs}`"] if row.needs else []
        model = DiffusionModel(row.build(), row.train) if "prompt" in row.conditioning(1) else None
        has_lora = hasattr(type(row.build().components[row.train]), "add_adapter")
        layers = ", ".join(model.lora_targets if model else lora_targets(family, row.train))
        layers = layers if has_lora else "none: `peft=none`"
        guidance = f"`{row.guidance[0]}`" if row.guidance else "–"
        cells = (f"`{row.pipeline.__name__}` ({row.name})", kind(row), f"`{row.train}`", guidance, recipe(row), layers,
                 ", ".join(declared) or "–", how_tested(row))  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([BEGIN, *lines, END])


if __name__ == "__main__":
    write(table())
