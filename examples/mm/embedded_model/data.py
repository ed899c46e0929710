"""Pictures and names of the embedded model's data set.

Two npm packages are fetched by name, version and SHA-256: the Noto emoji pictures (64x64 PNG, Apache-2.0) and the CLDR
names and keywords (MIT). Everything later in the rebuild reads the one file that :func:`prepare` writes.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from captions import Captions, build_captions
from common import save_atomically
from PIL import Image

#: Package name, version and SHA-256 of the tarball that ``npm pack`` writes.
PICTURES = ("emoji-datasource-google", "16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438")
NAMES = ("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")

IMAGE_SIZE = 64  # pixels a side
TONES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")


@dataclass(frozen=True)
class Picture:
    """One picture: what it is called and where it belongs."""

    hexcode: str
    base: str
    """Hexcode of the picture without skin tones; equal to ``hexcode`` for the base picture itself."""
    label: str
    """CLDR name, lower case, such as ``red apple`` or ``waving hand: medium skin tone``."""
    base_label: str
    tags: tuple[str, ...]
    category: str
    subcategory: str

    @property
    def is_variant(self) -> bool:
        return self.hexcode != self.base


@dataclass(frozen=True)
class DataSet:
    """All pictures with their captions."""

    pictures: list[Picture]
    images: torch.Tensor
    """``(N, 3, 64, 64)`` uint8, composited on white."""
    captions: Captions
    held_out: torch.Tensor
    """``(N,)`` int64: 0 trained on by CLIP, 1 a held-out skin-tone variant, 2 a held-out thing."""

    def weights(self, flag_weight: float, group_weights: dict[str, float] | None = None) -> torch.Tensor:
        """Sampling weight of every picture, ``(N,)`` float64, summing to 1.

        Every thing weighs 1; one that has skin-tone variants 1.5, half of it on the base picture and half shared by the
        variants. Country flags, 259 pictures that look much alike, weigh ``flag_weight``. ``group_weights``
        multiplies these by subcategory of emoji.json, or by category where the subcategory is not in it.
        """
        count: dict[str, int] = {}
        for picture in self.pictures:
            count[picture.base] = count.get(picture.base, 0) + 1
        weights = []
        for picture in self.pictures:
            variants = count[picture.base] - 1
            if picture.is_variant:
                weights.append(0.75 / variants)
            elif variants:
                weights.append(0.75)
            else:
                weights.append(flag_weight if picture.subcategory == "country-flag" else 1.0)
        result = torch.tensor(weights, dtype=torch.float64)
        if group_weights:
            factors = [
                group_weights.get(picture.subcategory, group_weights.get(picture.category, 1.0))
                for picture in self.pictures
            ]
            result *= torch.tensor(factors)
        return result / result.sum()


def fetch(package: tuple[str, str, str], folder: Path) -> Path:
    """Fetch an npm package into ``folder`` unless it is there, check it and return the unpacked ``package/`` path."""
    name, version, sha256 = package
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / f"{name}-{version}.tgz"
    if not archive.is_file():
        subprocess.run(["npm", "pack", f"{name}@{version}"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(f"{archive} has SHA-256 {found}, expected {sha256}: remove it and fetch it again")
    target = folder / name
    if not (target / "package" / "package.json").is_file():
        with tarfile.open(archive) as tar:
            tar.extractall(target, filter="data")
    return target / "package"


def read_pictures(picture_package: Path, name_package: Path) -> tuple[list[Picture], torch.Tensor]:
    """Join the two packages: ``(pictures, images)``, images ``(N, 3, 64, 64)`` uint8 on white."""
    names = {}
    for entry in json.loads((name_package / "en" / "data.json").read_text(encoding="utf-8")):
        for variant in [entry, *entry.get("skins", [])]:
            names[variant["hexcode"]] = (variant["label"], entry["label"], tuple(entry.get("tags", ())))
    pictures, arrays = [], []
    for entry in json.loads((picture_package / "emoji.json").read_text(encoding="utf-8")):
        short_names = tuple(name.replace("_", " ").replace("-", " ") for name in entry["short_names"])
        for variant in [entry, *entry.get("skin_variations", {}).values()]:
            path = picture_package / "img" / "google" / "64" / variant["image"]
            if not path.is_file():
                continue
            code = variant["unified"]
            label, base_label, tags = names.get(code) or names[code.replace("-FE0F", "")]
            pictures.append(
                Picture(
                    hexcode=code,
                    base=entry["unified"],
                    label=label.lower(),
                    base_label=base_label.lower(),
                    tags=tuple(dict.fromkeys(tag.lower() for tag in tags + short_names)),
                    category=entry["category"],
                    subcategory=entry["subcategory"],
                )
            )
            with Image.open(path) as image:
                rgba = image.convert("RGBA")
            white = Image.new("RGBA", rgba.size, "white")
            arrays.append(np.asarray(Image.alpha_composite(white, rgba).convert("RGB")))
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    assert images.shape[1:] == (3, IMAGE_SIZE, IMAGE_SIZE), images.shape
    return pictures, images


def hold_out(pictures: list[Picture], things: float = 0.03, variants: float = 0.10) -> torch.Tensor:
    """Which pictures CLIP never sees, ``(N,)`` int64 (see :class:`DataSet`), by a hash of the name: stable for ever."""

    def fraction(text: str) -> float:
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32

    kinds = []
    for picture in pictures:
        if fraction("thing " + picture.base) < things:
            kinds.append(2)
        elif picture.is_variant and fraction("variant " + picture.hexcode) < variants:
            kinds.append(1)
        else:
            kinds.append(0)
    return torch.tensor(kinds)


def prepare(work_dir: Path) -> DataSet:
    """Fetch, join and caption the data set; cached in ``work_dir/data.pt``."""
    cache = work_dir / "data.pt"
    if cache.is_file():
        stored = torch.load(cache, weights_only=True)
        pictures = [Picture(**{**row, "tags": tuple(row["tags"])}) for row in stored["pictures"]]
        images = stored["images"]
    else:
        pictures, images = read_pictures(fetch(PICTURES, work_dir / "npm"), fetch(NAMES, work_dir / "npm"))
        save_atomically({"pictures": [vars(picture) for picture in pictures], "images": images}, cache)
    return DataSet(pictures, images, build_captions(pictures), hold_out(pictures))
