"""Write the files that ship inside the package from what the training stages left in the work folder."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import torch
from data import NAMES, PICTURES, DataSet
from diffusers import UNet2DConditionModel
from pipeline import GUIDANCE_SCALE, INFERENCE_STEPS, build_pipeline
from prompts import VALIDATION, training_prompts
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from nemo_aligner_diffusion.rewards.clip.archive import convert_hf_clip_to_nemo
from nemo_aligner_diffusion.rewards.support.preprocessing import Preprocessing

LARGEST_MODEL_BYTES = 25_000_000
LARGEST_REWARD_BYTES = 10_000_000


def package(data: DataSet, work_dir: Path, assets: Path) -> None:
    """Replace the files in ``assets``: the model, the reward, the prompts and their provenance."""
    assets.mkdir(parents=True, exist_ok=True)
    model = assets / "embedded_model"
    with tempfile.TemporaryDirectory(dir=assets) as temporary:
        fresh = Path(temporary) / "embedded_model"
        _write_pipeline(work_dir, fresh)
        if model.exists():
            shutil.rmtree(model)
        fresh.rename(model)
    clip = CLIPModel.from_pretrained(work_dir / "clip")
    convert_hf_clip_to_nemo(
        clip,
        work_dir / "clip",
        assets / "embedded_reward.nemo",
        preprocessing=Preprocessing(clip.config.vision_config.image_size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        dtype=torch.float16,
        name="embedded_clip",
        extra={"provenance": "trained by examples/mm/embedded_model on Noto emoji (Apache-2.0) and CLDR names (MIT)"},
    )
    (assets / "prompts_train.txt").write_text("".join(f"{p}\n" for p in training_prompts(data)), encoding="utf-8")
    (assets / "prompts_validation.txt").write_text("".join(f"{p}\n" for p in VALIDATION), encoding="utf-8")
    (assets / "provenance.md").write_text(_provenance(assets), encoding="utf-8")
    _check_size(model, LARGEST_MODEL_BYTES)
    _check_size(assets / "embedded_reward.nemo", LARGEST_REWARD_BYTES)


def _write_pipeline(work_dir: Path, folder: Path) -> None:
    """The diffusers folder, weights in half precision and configurations free of this machine's paths."""
    unet = UNet2DConditionModel.from_pretrained(work_dir / "unet")
    pipeline = build_pipeline(work_dir / "clip", work_dir / "vae", unet).to(dtype=torch.float16)
    pipeline.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):  # beside tokenizer.json, for readers that know only these
        shutil.copyfile(work_dir / "clip" / name, folder / "tokenizer" / name)
    # transformers from 5.10 saves a CLIPTextModel without the prefix that older ones look for; all of them read it
    weights = load_file(folder / "text_encoder" / "model.safetensors")
    weights = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in weights.items()}
    save_file(weights, folder / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)
    for path in folder.rglob("*.json"):
        values = json.loads(path.read_text(encoding="utf-8"))
        changed = path.name in ("config.json", "model_index.json") and values.pop("_name_or_path", None) is not None
        if path.parent.name == "text_encoder":  # transformers computes in the dtype it finds here; CPUs want float32
            values["dtype"], changed = "float32", True
        if changed:
            path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    (folder / "defaults.json").write_text(
        json.dumps({"guidance_scale": GUIDANCE_SCALE, "num_inference_steps": INFERENCE_STEPS}, indent=2) + "\n",
        encoding="utf-8",
    )


def _check_size(path: Path, limit: int) -> None:
    size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size
    print(f"{path.name}: {size:,} bytes")
    if size > limit:
        raise ValueError(f"{path} has {size:,} bytes, more than the {limit:,} it may have")


def _provenance(assets: Path) -> str:
    """Where the weights come from, under which licences, with checksums."""
    files = sorted(p for p in assets.rglob("*") if p.is_file() and p.suffix in (".safetensors", ".nemo"))
    sums = "\n".join(f"| `{p.relative_to(assets)}` | {hashlib.sha256(p.read_bytes()).hexdigest()} |" for p in files)
    return f"""# Where these files come from

`embedded_model/`, `embedded_reward.nemo` and the prompts were made from scratch by
`examples/mm/embedded_model/rebuild.py` of this repository; no pretrained weights went into them.
`docs/embedded_model.md` says how well they work.

| training data | version | licence | SHA-256 of the npm tarball |
| --- | --- | --- | --- |
| `{PICTURES[0]}` (pictures: Noto Emoji, Google) | {PICTURES[1]} | pictures Apache-2.0, package MIT | {PICTURES[2]} |
| `{NAMES[0]}` (CLDR names and keywords) | {NAMES[1]} | MIT; CLDR data under the Unicode License v3 | {NAMES[2]} |

The weights and prompts are distributed under the repository's Apache-2.0 licence. Noto Emoji is copyright Google LLC,
Apache License 2.0. emojibase is copyright Miles Johnson, MIT License. The names and keywords are copyright Unicode,
Inc.

| file | SHA-256 |
| --- | --- |
{sums}
"""
