"""Good archives, as members that the mutations take apart and put together again."""

from __future__ import annotations

import functools
import gzip
import io
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from nemo_aligner_diffusion.formats.nemo import load_nemo
from nemo_aligner_diffusion.rewards.clip.aesthetic import convert_aesthetic_to_nemo
from nemo_aligner_diffusion.rewards.clip.archive import convert_hf_clip_to_nemo
from nemo_aligner_diffusion.rewards.image_reward.archive import convert_image_reward_to_nemo
from tests.tiny.clip import megatron_twin, tensor_parallel_shards, tokenizer_files, toy_clip
from tests.tiny.image_reward import MAX_LENGTH, TEXT_HEADS, VISION_HEADS, VOCABULARY, toy_checkpoint

CONFIG, WEIGHTS = "model_config.yaml", "model_weights.ckpt"
# The head of the aesthetic archive: (place, kind, shape).
_HEAD = ((0, "weight", (6, 20)), (0, "bias", (6,)), (1, "weight", (1, 6)), (1, "bias", (1,)))


@dataclass(frozen=True)
class Seed:
    """An archive in parts: ``members`` are (name, content) in their order, names as in the tar."""

    name: str
    members: tuple[tuple[str, bytes], ...]
    gzipped: bool = False
    folder_entry: bool = False  # NeMo adds the folder itself, "./", as the first member

    @property
    def config(self) -> dict[str, Any]:
        loaded: dict[str, Any] = yaml.safe_load(self.content(CONFIG))
        return loaded

    def content(self, name: str) -> bytes:
        return next(content for member, content in self.members if member.rpartition("/")[2] == name)

    def with_content(self, name: str, content: bytes) -> Seed:
        """The same archive with other bytes in the member called ``name`` (in whichever folder)."""
        changed = [(m, content if m.rpartition("/")[2] == name else c) for m, c in self.members]
        return replace(self, members=tuple(changed))

    def with_config(self, config: dict[str, Any]) -> Seed:
        return self.with_content(CONFIG, yaml.safe_dump(config, sort_keys=False).encode())

    def with_members(self, *extra: tuple[str, bytes]) -> Seed:
        return replace(self, members=(*self.members, *extra))

    def pack(
        self, prepare: Callable[[tarfile.TarInfo], None] | None = None, format_: int = tarfile.PAX_FORMAT
    ) -> bytes:
        """The archive's bytes; ``prepare`` may change each member's header."""
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=format_) as tar:
            if self.folder_entry:
                folder = tarfile.TarInfo("./")
                folder.type, folder.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(folder)
            for name, content in self.members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                if prepare:
                    prepare(info)
                tar.addfile(info, io.BytesIO(content[: info.size]))
        return gzip.compress(stream.getvalue(), 6, mtime=0) if self.gzipped else stream.getvalue()


@functools.cache
def seeds() -> dict[str, Seed]:
    """Every kind of archive that can be restored, and one in PyTorch's format of before 1.6, which cannot."""
    with tempfile.TemporaryDirectory() as folder:
        made = [_ours(path.stem, path) for path in _write_ours(Path(folder))]
    own = made[0]  # the CLIP
    made.append(replace(own, name="clip_gzipped", gzipped=True))
    for name, weights_name, legacy_rows in (
        ("megatron", WEIGHTS, True),
        ("megatron_rank", f"mp_rank_00/{WEIGHTS}", False),
    ):
        config, state = megatron_twin(toy_clip(), legacy=legacy_rows)
        files = tokenizer_files()
        config["tokenizer"] |= {"vocab_file": "nemo:0123abcd_vocab.json", "merge_file": "nemo:4567cdef_merges.txt"}
        members = (
            ("./0123abcd_vocab.json", files["vocab.json"]),
            ("./4567cdef_merges.txt", files["merges.txt"]),
            (f"./{CONFIG}", yaml.safe_dump(config, sort_keys=False).encode()),
            (f"./{weights_name}", torch_file(state)),
        )
        made.append(Seed(name, members, folder_entry=True))
    made.append(_sharded())
    return {seed.name: seed for seed in made}


def _sharded() -> Seed:
    """Two tensor-parallel ranks, which are merged when restored."""
    config, state = megatron_twin(toy_clip(text_heads=4), legacy=True)
    config["tensor_model_parallel_size"] = 2
    config["tokenizer"] |= {"vocab_file": "nemo:0123abcd_vocab.json", "merge_file": "nemo:4567cdef_merges.txt"}
    shards = tensor_parallel_shards(state, 2, legacy=True)
    files = tokenizer_files()
    members = (
        (f"./{CONFIG}", yaml.safe_dump(config, sort_keys=False).encode()),
        ("./0123abcd_vocab.json", files["vocab.json"]),
        ("./4567cdef_merges.txt", files["merges.txt"]),
        *((f"./mp_rank_{rank:02d}/{WEIGHTS}", torch_file(shard)) for rank, shard in enumerate(shards)),
    )
    return Seed("megatron_shards", members, folder_entry=True)


def torch_file(value: Any, *, zipped: bool = True) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


@functools.cache
def legacy_seed() -> Seed:
    """Weights as PyTorch wrote them before 1.6: no zip, several pickles one after the other."""
    seed = seeds()["megatron"]
    state = torch.load(io.BytesIO(seed.content(WEIGHTS)), weights_only=True)
    return replace(seed.with_content(WEIGHTS, torch_file(state, zipped=False)), name="legacy")


def _write_ours(folder: Path) -> list[Path]:
    clip = toy_clip()
    torch.manual_seed(0)
    sizes = {**clip.config.vision_config.to_dict(), "projection_dim": clip.config.projection_dim}
    tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes))
    generator = torch.Generator().manual_seed(0)
    head = {f"layers.{n}.{k}": torch.randn(*shape, generator=generator) for n, k, shape in _HEAD}
    torch.save(toy_checkpoint(), folder / "ImageReward.pt")
    (folder / "vocab.txt").write_bytes(VOCABULARY)
    return [
        convert_hf_clip_to_nemo(clip, tokenizer_files(), folder / "clip.nemo", dtype=torch.float16),
        convert_aesthetic_to_nemo(head, tower, folder / "aesthetic.nemo", activation="relu"),
        convert_image_reward_to_nemo(
            folder / "ImageReward.pt",
            folder,
            folder / "image_reward.nemo",
            vision_heads=VISION_HEADS,
            text_heads=TEXT_HEADS,
            max_length=MAX_LENGTH,
        ),
    ]


def _ours(name: str, path: Path) -> Seed:
    archive = load_nemo(path)
    with tarfile.open(path) as tar:
        members = tuple((info.name, tar.extractfile(info).read()) for info in tar)  # type: ignore[union-attr]
    assert {member.removeprefix("./") for member, _ in members} == set(archive.members)
    return Seed(name, members)
