"""Shards and streams for the tests of data/: written with the standard library, not with the code under test."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_aligner_diffusion.data.prompts import build_prompt_loader

# What has broken prompt readers: quotes, commas, tabs, other scripts, emoji, separators that str.splitlines splits at.
ODD_PROMPTS = [
    "a \"quoted\" prompt, with commas, and 'single' ones",
    '{"prompt": "looks like JSON"}',
    "  leading and trailing spaces  ",
    "tab\tinside",
    "面白い猫, 東京 — ночь — مرحبا",
    "family 👩‍👩‍👧‍👦 emoji",
    "byte-order\ufeff mark inside",
    "line\u2028separator\x0band\x0cothers\x85",
    "back\\slash $HOME `tick` %s {0}",
    "x" * 5000,
]


def tar(path: Path, members: Mapping[str, bytes | str], mode: str = "w", **options: Any) -> Path:
    """A tar with these members in this order; ``mode="w:gz"`` compresses."""
    with tarfile.open(path, mode, **options) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return path


def uneven_shards(folder: Path, sizes: tuple[int, ...] = (7, 1, 12, 4)) -> list[str]:
    """Shards s0.tar, s1.tar, … with that many prompts each; returns all prompts in file order."""
    prompts: list[str] = []
    for number, size in enumerate(sizes):
        mine = [f"prompt {number}.{place}" for place in range(size)]
        tar(folder / f"s{number}.tar", {f"{place:03d}.txt": text for place, text in enumerate(mine)})
        prompts += mine
    return prompts


LONGER = (40, 30, 50, 40)  # sizes of shards that are not read through at once: 160 prompts


def prompts_of(loader: Any) -> list[str]:
    """All prompts of a loader or stream, in order."""
    return [prompt for batch in loader for prompt in batch["prompts"]]


def take(paths: Any, batches: int, **options: Any) -> list[dict[str, Any]]:
    """The first so many batches of a loader, its workers shut down afterwards."""
    stream = iter(build_prompt_loader(paths, **options))
    try:
        return [dict(next(stream)) for _ in range(batches)]  # type: ignore[call-overload]
    finally:
        stream.close()  # type: ignore[attr-defined]
