"""Scores by ``open_clip``'s own model, in a process of its own: torchvision must not be seen by transformers.

    python open_clip_reference.py FOLDER INPUT.npz OUTPUT_FOLDER

FOLDER holds torchvision and open_clip (``make reference``). INPUT.npz: ``images (B, 3, 32, 32)`` in [0, 1],
``prompts``, ``picture (H, W, 3)`` uint8. For each of the models below OUTPUT_FOLDER gets ``<name>.pt``, a checkpoint as
HPSv2's is laid out, and ``<name>.npz`` with its scores; further ``tokenizer/`` with the published vocabulary,
``tokens.npz``, and ``pictures.npz`` with what torchvision makes of ``picture``.
"""

import gzip
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch

MODELS = {
    "gelu": {"vision": {"width": 128, "layers": 2}, "quick_gelu": False},
    "quick_gelu": {"vision": {"width": 64, "layers": 3}, "quick_gelu": True},
    # The width of ViT-H's vision tower, whose heads have 80 channels.
    "vit_h_width": {"vision": {"width": 1280, "layers": 1, "head_width": 80, "mlp_ratio": 0.5}, "quick_gelu": False},
}


def import_without_operators(folder: Path) -> None:
    """Make torchvision's Python code importable where its compiled operators don't fit this torch.

    Importing registers shapes for each operator, which needs the operator to exist: so a schema is defined for each.
    """
    sys.path.insert(0, str(folder))
    source = (folder / "torchvision" / "_meta_registrations.py").read_text()
    names = {*re.findall(r'register_meta\("(\w+)"', source), *re.findall(r"torchvision::(\w+)", source)}
    library = torch.library.Library("torchvision", "DEF")
    for name in sorted(names):
        library.define(f"{name}(Tensor input) -> Tensor")
    globals()["_library"] = library  # lives as long as the process, or the operators vanish


def write_tokenizer(folder: Path, output: Path) -> None:
    """``vocab.json`` and ``merges.txt`` out of the file that open_clip carries."""
    from open_clip.tokenizer import SimpleTokenizer

    output.mkdir()
    vocabulary = SimpleTokenizer().encoder
    vocabulary = {
        {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}.get(entry, entry): number
        for entry, number in vocabulary.items()
    }
    (output / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    packed = (folder / "open_clip" / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode().split("\n")
    (output / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *lines[1 : 49152 - 256 - 2 + 1], ""]), encoding="utf-8"
    )


def main(folder: Path, given: Path, output: Path) -> None:
    import_without_operators(folder)
    import open_clip
    from PIL import Image
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as vision

    inputs = np.load(given)
    images, prompts = torch.from_numpy(inputs["images"]), [str(prompt) for prompt in inputs["prompts"]]
    write_tokenizer(folder, output / "tokenizer")
    tokens = open_clip.get_tokenizer("ViT-H-14")(prompts)
    np.savez(output / "tokens.npz", tokens=tokens.numpy())
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    for seed, (name, settings) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        model = open_clip.model.CLIP(
            embed_dim=24,
            vision_cfg={"image_size": 32, "patch_size": 8, **settings["vision"]},
            text_cfg={"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2},
            quick_gelu=settings["quick_gelu"],
        ).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # biases and layer norms start at 0 and 1: a mix-up would not show
                if parameter.ndim:
                    parameter += 0.05 * torch.randn_like(parameter)
            image, text = model.encode_image((images - mean) / std), model.encode_text(tokens)
            cosine = torch.nn.functional.normalize(image, dim=-1) @ torch.nn.functional.normalize(text, dim=-1).T
            np.savez(output / f"{name}.npz", cosine=cosine.numpy(), scale=model.logit_scale.exp().numpy())
        torch.save({"epoch": 1, "name": "hps", "state_dict": model.state_dict()}, output / f"{name}.pt")

    picture = Image.fromarray(inputs["picture"])
    made = {}
    for size in (32, 48, 224):
        short = vision.resize(picture, size, InterpolationMode.BICUBIC)
        made[f"crop{size}"] = np.asarray(vision.center_crop(short, size))
        scale = size / max(picture.size)  # HPSv2's ResizeMaxSize, step by step
        target = [round(side * scale) for side in (picture.size[1], picture.size[0])]
        rows, columns = size - target[0], size - target[1]
        padding = [columns // 2, rows // 2, columns - columns // 2, rows - rows // 2]
        small = vision.resize(picture, target, InterpolationMode.BICUBIC)
        made[f"pad{size}"] = np.asarray(vision.pad(small, padding, fill=0))
        small = vision.resize(
            vision.to_tensor(picture), target, InterpolationMode.BICUBIC
        )  # as it does: ToTensor first
        made[f"pad_uncut{size}"] = vision.pad(small, padding, fill=0).numpy()
    np.savez(output / "pictures.npz", **made)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
