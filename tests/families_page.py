"""The matrix of ``docs/models.md``: what can be done with a family, and the test that does it or the reason for a no.

Run from the project's root to write it anew:

    python tests/families_page.py docs/models.md
"""

from __future__ import annotations

from generated import write

BEGIN, END = "<!-- matrix: tests/families_page.py -->", "<!-- end of matrix -->"
ROWS = {
    "sd15": "Stable Diffusion 1.5",
    "sd21": "Stable Diffusion 2.1",
    "sdxl": "SDXL 1.0",
    "sd35": "Stable Diffusion 3.5",
    "flux1": "FLUX.1",
    "flux2": "FLUX.2",
    "flux2_klein": "FLUX.2-klein",
    "qwen_image": "Qwen-Image",
    "z_image": "Z-Image",
}
_UNETS, _SD = ("sd15", "sd21", "sdxl"), ("sd15", "sd21", "sdxl", "sd35")
_OWN = "test_families.py::"
_ADAPTER = f"{_OWN}test_an_adapter_on_a_folder_and_its_exports"
_FULL = f"{_OWN}test_all_weights_of_a_hub_id"
_SPREAD = f"{_OWN}test_two_processes_train_as_one"
# column -> (what a tick means, the test that is run with each family as its parameter)
COLUMNS = {
    "folder": ("`model.from_pretrained=FOLDER` is recognised, loaded and trained", _ADAPTER),
    "hub id": ("the same of `org/name` in the local Hugging Face cache, without a network", _FULL),
    "single file": (
        "one file under its makers' names becomes the pipeline",
        "test_files_in.py::test_one_file_of_the_whole_model",
    ),
    "LoRA": ("two steps of DRaFT+: finite, a gradient, another picture", _ADAPTER),
    "full": ("a step on all weights; `export/` in plain `diffusers` makes the tuned model's picture", _FULL),
    "methods": (
        "the gradient of every method is that of a naive graph",
        f"{_OWN}test_the_gradient_of_every_method_is_that_of_the_naive_graph",
    ),
    "pairs": (
        "its network is called at a noise level of one's choice, on latents of given pictures: what preference methods "
        "train on",
        f"{_OWN}test_the_network_at_a_chosen_noise_level",
    ),
    "TP2": ("two processes, tensor-parallel, train as one: reward, KL, loss and gradient norm to 1e-3", _SPREAD),
    "FSDP2": ("likewise, with sharded weights", _SPREAD),
    "LoRA for `diffusers`": ("the export in plain `diffusers` makes the tuned model's picture, to 1e-3", _ADAPTER),
    "LoRA for ComfyUI": (
        "a file whose every layer ComfyUI has a name for, at its scale; kohya's layout also makes the tuned picture",
        _ADAPTER,
    ),
    "merged folder": ("`nad-export --to pipeline`, in plain `diffusers`, makes the tuned picture", _ADAPTER),
    "merged file": ("`nad-export --to single-file`, likewise by `from_single_file`", _ADAPTER),
}
# a cell that another test holds
OTHERS = {("flux1", "single file"): f"{_OWN}test_flux_in_its_makers_file"}
NO_FILE = "read from folders and hub ids alone; a file is named, and refused with what to give instead"
NO_TP2 = (
    "its first level has 5 attention heads, which no number but 5 divides, and 5 not the rest: refused at the start; "
    "FSDP2 instead"
)
NO_MERGED_FILE = "there is no writer of these makers' names: a merged folder, or the LoRA file"
NO_PAIRS = {
    "flux2": "its latents are normalised by statistics among its VAE's weights: refused at the start",
    "z_image": "its network takes lists, one entry a picture: refused at the start",
}
# a cell that is a no -> (why, the test that says so)
NO = {
    **{(family, "single file"): (NO_FILE, f"{_OWN}test_single_files_that_are_not_read_say_what_to_give")
       for family in ("flux2", "flux2_klein", "qwen_image", "z_image")},
    **{(family, "pairs"): (NO_PAIRS[family.removesuffix("_klein")], COLUMNS["pairs"][1])
       for family in ("flux2", "flux2_klein", "z_image")},
    ("sd21", "TP2"): (NO_TP2, _SPREAD),
    **{(family, "merged file"): (NO_MERGED_FILE, "test_exports_converted.py::test_what_cannot_be_written_is_said")
       for family in ROWS if family not in _UNETS},
}  # fmt: skip
KOHYA = "kohya's layout"
DIFFUSERS = "the file in `diffusers`' names, which ComfyUI reads; `nad-export --to kohya` adds `.alpha` tensors"
TORCHVISION = "the published folder needs the package `torchvision`, for its tokenizer is a processor of pictures, too"
NOTED = {
    ("flux2", "folder"): TORCHVISION,
    ("flux2", "hub id"): TORCHVISION,
    ("flux1", "single file"): "the transformer's file, with the VAE's as `model.first_stage_config.from_pretrained`",
    **{(family, "LoRA for ComfyUI"): KOHYA if family in _UNETS else DIFFUSERS for family in ROWS},
}


def held_by(family: str, column: str) -> str:
    """What pytest calls the test of a cell, as far as the family is its parameter."""
    name = (NO.get((family, column)) or ("", ""))[1] or OTHERS.get((family, column)) or COLUMNS[column][1]
    alone = name in OTHERS.values() or name.startswith("test_exports_converted.py::")
    return f"tests/{name}" if alone else f"tests/{name}[{family}]"


def matrix() -> str:
    notes = list(dict.fromkeys([*NOTED.values(), *(why for why, _ in NO.values())]))

    def cell(family: str, column: str) -> str:
        key = (family, column)
        note = NO[key][0] if key in NO else NOTED.get(key)
        number = f"<sup>{notes.index(note) + 1}</sup>" if note else ""
        ticked = f"{'no' if key in NO else '✓'}{number}"
        return f"{ticked} all 11" if column == "methods" else ticked

    lines = [f"| family | {' | '.join(COLUMNS)} |", f"|{' --- |' * (len(COLUMNS) + 1)}"]
    lines += [f"| `{f}` {name} | {' | '.join(cell(f, column) for column in COLUMNS)} |" for f, name in ROWS.items()]
    lines += ["", *(f"{number}. {note}." for number, note in enumerate(notes, 1))]
    lines += ["", "| column | what a ✓ stands for | test |", "| --- | --- | --- |"]
    for column, (meaning, name) in COLUMNS.items():
        tests = dict.fromkeys([name, *(other for (_, c), other in OTHERS.items() if c == column)])
        tests |= dict.fromkeys(test for (_, c), (_, test) in NO.items() if c == column)
        shown = ", ".join(f"`{test.partition('::')[2]}`" for test in tests)
        lines.append(f"| {column} | {meaning} | {shown} |")
    return "\n".join([BEGIN, *lines, END])


if __name__ == "__main__":
    write(matrix())
