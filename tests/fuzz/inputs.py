"""Other files of strangers, spoilt: shards and texts, LoRA files, model folders, checkpoints.

``python -m tests.fuzz.inputs shards --cases 10000``. Case ``n`` of a series is always the same. Each must end within a
second of processor time and 256 MiB in data or one of our own errors, of printable lines; nothing is run or written.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import logging
import os
import random
import shutil
import struct
import sys
import tarfile
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz.guard import Guard, Interrupted

SECONDS, PEAK_MIB = 1.0, 256
CONTROL = "\x1b[2J\x1b]0;t\x07\u202e"


def spoil(drawn: random.Random, content: bytes) -> bytes:
    """Bits, bytes, runs and ends changed."""
    changed = bytearray(content)
    for _ in range(drawn.choice((1, 1, 1, 2, 5, 30))):
        place = drawn.randrange(max(len(changed), 1))
        way = drawn.randrange(6)
        if way == 0 and changed:
            changed[place % len(changed)] ^= 1 << drawn.randrange(8)
        elif way == 1:
            changed[place : place + 1] = bytes([drawn.randrange(256)])
        elif way == 2:
            del changed[place : place + drawn.choice((1, 3, 512, 5000))]
        elif way == 3:
            changed[place:place] = drawn.choice((b"0", b"9" * 30, b" ", b"\0" * 512, drawn.randbytes(20)))
        elif way == 4:
            changed[place:place] = changed[place : place + drawn.choice((10, 512, 2000))]
        elif drawn.random() < 0.3:
            del changed[place:]
    return bytes(changed)


def _header(drawn: random.Random, name: str, size: int, kind: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    block = bytearray(info.tobuf(drawn.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT)), errors="replace")[-512:])
    if drawn.random() < 0.05:  # a field that lies, under a checksum that is right
        at, width = drawn.choice(((0, 100), (100, 8), (124, 12), (156, 1), (257, 8), (345, 155)))
        value = drawn.choice((drawn.randbytes(width), b"\xff" * width, b"\x80" + bytes(width - 1), b"7" * width))
        block[at : at + width] = value
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _pax(drawn: random.Random) -> bytes:
    """Records of which each is right but for its length, its keyword or its end."""
    body = b""
    for _ in range(drawn.choice((1, 1, 2, 5, 300))):
        keys = ("path", "size", "comment", "GNU.sparse.major", "a", "", "hdrcharset", "linkpath")
        key, value = drawn.choice(keys), drawn.choice(("0.txt", "5", "", "x" * 90, CONTROL, "9" * 25, "-1", "é.txt"))
        record = f" {key}={value}\n".encode()
        length = len(record) + len(str(len(record) + 1))
        length += drawn.choice((*(0,) * 30, -1, 1, -length, 9, -2 * length, 10**9))
        record = str(length).encode() + record
        if drawn.random() < 0.2:
            record = spoil(drawn, record)
        body += record
    kind = drawn.choice((tarfile.XHDTYPE,) * 4 + (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK))
    return _header(drawn, "pax", len(body), kind) + body + bytes(-len(body) % 512)


def shard(drawn: random.Random, folder: Path) -> Path:
    """A shard of prompts or a text file; archives strung together, compressed, near to right in every part."""
    if drawn.random() < 0.1:
        lines = [drawn.choice(("a cat", "", "é", "\ufeff", CONTROL, "x" * 70_000)) for _ in range(drawn.randrange(20))]
        text = (
            drawn.choice(("\n", "\r\n", "\r")).join(lines).encode(drawn.choice(("utf-8", "utf-8", "utf-16")), "replace")
        )
        path = folder / "p.txt"
        path.write_bytes(spoil(drawn, text) if drawn.random() < 0.5 else text)
        return path
    parts = []
    for _ in range(drawn.choice((1, 1, 1, 2, 3))):
        part = b""
        for number in range(drawn.randrange(6)):
            if drawn.random() < 0.5:
                part += _pax(drawn)
            name = drawn.choice(
                ("{}.txt", "{}.json", "{}.a.txt", "a/{}.TXT", "__{}.txt", ".{}.txt", CONTROL + "{}.txt")
            )
            json_text = drawn.choice(
                ('{"prompt": "p"}', '{"caption": ["p"]}', "[" * 9999, "{", '{"prompt": "\\ud800"}')
            )
            content = (json_text if "json" in name else drawn.choice(("p", "", CONTROL, "\ufeffq\n"))).encode()
            content = content if drawn.random() < 0.95 else drawn.randbytes(100)
            kind = drawn.choice((tarfile.REGTYPE,) * 8 + (tarfile.SYMTYPE, tarfile.DIRTYPE, b"S", b"V", b"\0"))
            part += _header(drawn, name.format(number % 4), len(content), kind) + content + bytes(-len(content) % 512)
        part += bytes(drawn.choice((1024, 1024, 512, 0, 10240)))
        parts.append(part)
    content = b"".join(parts)
    if drawn.random() < 0.4:
        content = spoil(drawn, content)
    if drawn.random() < 0.2:
        content = gzip.compress(content, 1, mtime=0)
        content = spoil(drawn, content) if drawn.random() < 0.5 else content
    path = folder / "s.tar"
    path.write_bytes(content)
    return path


def read_shard(path: Path) -> None:
    """Its prompts, streamed and by their index, must be the same; preferences are looked for, too."""
    from nemo_aligner_diffusion.data.bad_samples import BadSamples
    from nemo_aligner_diffusion.data.preferences.shards import read_preference_file
    from nemo_aligner_diffusion.data.prompt_files import locate_prompts, parse_prompt

    content = path.read_bytes()
    bad = BadSamples("skip")
    for prompt, offset, data, kind in locate_prompts(path, bad):
        assert prompt.strip()
        assert content[:2] == b"\x1f\x8b" or content[offset : offset + len(data)] == data
        assert parse_prompt(data, kind) == prompt
    for line in (*bad.messages, *bad.notes):
        _printable(line)
    if path.suffix == ".tar":
        list(read_preference_file(path, BadSamples("skip")))
    list(locate_prompts(path, BadSamples("error")))


def lora(drawn: random.Random, folder: Path) -> Path:
    import torch
    from safetensors.torch import save

    tensors = {f"unet.mid.to_{k}.lora_{side}.weight": torch.zeros(2, 4) for k in "qkv" for side in "AB"}
    # one entry of metadata: safetensors writes several in any order
    return _safetensors(drawn, folder / "lora.safetensors", save(tensors, {"format": "pt"}))


def _safetensors(drawn: random.Random, path: Path, content: bytes) -> Path:
    """Header fields of other types and sizes, names with control characters, or bytes spoilt."""
    (length,) = struct.unpack("<Q", content[:8])
    if drawn.random() < 0.7:
        header = json.loads(content[8 : 8 + length])
        odd = (None, [], {}, -1, 1 << 62, 1e400, "x", CONTROL * 10, "F32", [1 << 40, 1 << 40], [0, 1 << 50], True)
        for _ in range(drawn.choice((1, 2))):
            name = drawn.choice(list(header))
            entry = header[name]
            way = drawn.randrange(4)
            if way == 0:
                header[CONTROL + name[:40] * drawn.choice((1, 10_000))] = header.pop(name)
            elif way == 1:
                header[name] = drawn.choice(odd)
            elif isinstance(entry, dict) and entry:
                entry[drawn.choice(list(entry))] = drawn.choice(odd)
        text = json.dumps(header).encode()
        content = struct.pack("<Q", drawn.choice((len(text),) * 5 + (0, 1 << 60))) + text + content[8 + length :]
    else:
        content = spoil(drawn, content)
    path.write_bytes(content)
    return path


def read_lora(path: Path) -> None:
    from nemo_aligner_diffusion.formats.checkpoints import read_tensors

    for name, tensor in read_tensors(path).items():
        assert tensor.nbytes <= path.stat().st_size, name


def latents(drawn: random.Random, folder: Path) -> Path:
    """A latent shard whose one member of moments is spoilt: its header, what it says of itself, its values."""
    import torch

    from nemo_aligner_diffusion.data.preferences.latents import Encoding, write_moments
    from nemo_aligner_diffusion.data.preferences.shards import MOMENTS
    from nemo_aligner_diffusion.data.shards import tar_sample

    values = torch.rand(2, 2, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    said = Encoding("ab" * 32, drawn.choice((16, 1 << 40)), 16, drawn.choice(("center", CONTROL)), False, 0)
    content = write_moments(values, said)
    if drawn.random() < 0.2:
        content = content.replace(b'\\"crop\\"', drawn.choice((b'\\"cro1\\"', b"[[[[[[[[", b'\\u0000\\"')))
    if drawn.random() < 0.9:
        content = _safetensors(drawn, folder / "moments", content).read_bytes()
    path = folder / "s.tar"
    members = [(f"7.{MOMENTS}", content), ("7.txt", b"p"), ("7.label", drawn.choice((b"1/0", b"2/0", b"0.5/0.5")))]
    path.write_bytes(tar_sample(members) + bytes(1024))
    return path


def read_latents(path: Path) -> None:
    from nemo_aligner_diffusion.data.preferences.pairs import PairDataset, Wanted
    from nemo_aligner_diffusion.data.preferences.settings import PairSettings

    wanted = Wanted(16, 16, "ab" * 32, (4, 2, 2))
    options: dict[str, Any] = {"settings": PairSettings(), "wanted": wanted, "shuffle_buffer": 0}
    (batch,) = PairDataset(str(path), micro_batch_size=1, epochs=1, **options)
    assert batch["moments"].isfinite().all()
    assert batch["moments"].shape == (1, 2, 2, 4, 2, 2)


def model_folder(drawn: random.Random, folder: Path) -> Path:
    """A diffusers folder with one file damaged, missing, of other types, or a pipe in its place."""
    from tests.tiny.stable_diffusion import save_tiny_pipeline

    good = folder.parent / "good"
    if not good.exists():
        save_tiny_pipeline(good)
    target = folder / "model"
    shutil.copytree(good, target)
    file = drawn.choice(sorted(path for path in target.rglob("*") if path.is_file()))
    content, way = file.read_bytes(), drawn.randrange(6)
    file.unlink()
    if way == 0:
        os.mkfifo(file)
    elif way == 1:
        file.mkdir()
    elif way == 2:
        file.write_bytes(drawn.choice((b"", b"[" * 100_000, b"{}", b"[]", b"null", b"\xff", b'{"_class_name": []}')))
    elif way == 3 and file.suffix == ".json":
        document = json.loads(content)
        if isinstance(document, dict):
            odd = (None, [], {}, -1, 1 << 40, "x", CONTROL, [None, None], ["os", "system"], True, 0.5)
            document[drawn.choice(list(document))] = drawn.choice(odd)
        file.write_text(json.dumps(document))
    elif way == 4 and file.suffix == ".safetensors":
        _safetensors(drawn, file, content)
    elif way == 5:
        file.write_bytes(spoil(drawn, content))
    return target


def read_model_folder(path: Path) -> None:
    from nemo_aligner_diffusion.diffusion.loading import load_model

    load_model(path)


def checkpoint(drawn: random.Random, folder: Path) -> Path:
    """A folder of training state, damaged; or changed under a manifest that was made to fit."""
    import torch

    from nemo_aligner_diffusion.training.checkpoints.files import record_of, write_manifest
    from nemo_aligner_diffusion.training.checkpoints.io import FolderCheckpointIO

    module = torch.nn.Linear(3, 2)
    place = folder / "checkpoints" / "step_000001"
    tree = {
        "state_dict": dict(module.named_parameters()),
        "global_step": 1,
        "nemo_aligner_diffusion": {"random_states": torch.zeros(1, 8, dtype=torch.uint8)},
        "optimizer_states": [{"state": {"weight": {"exp_avg": torch.zeros(2, 3)}}, "param_groups": [(1, 2), {3: 4}]}],
    }
    FolderCheckpointIO(module).save_checkpoint(tree, place)
    file = drawn.choice(sorted(place.iterdir()))
    if file.suffix == ".safetensors":
        _safetensors(drawn, file, file.read_bytes())
    elif drawn.random() < 0.5:
        document, at = json.loads(file.read_text()), []
        while isinstance(document if not at else at[-1], (dict, list)) and (at[-1] if at else document):
            here = at[-1] if at else document
            key = drawn.choice(list(here) if isinstance(here, dict) else range(len(here)))
            odd = (None, [], {}, -1, 1 << 62, "x", CONTROL, "../x", True, 0.5, [[]], {"$dict": [1]}, {"$tensor": []})
            if drawn.random() < 0.4 or not isinstance(here[key], (dict, list)):
                here[key] = drawn.choice(odd)
                break
            at.append(here[key])
        file.write_text(json.dumps(document))
    else:
        file.write_bytes(spoil(drawn, file.read_bytes()))
    if drawn.random() < 0.7 and file.name != "manifest.json":
        write_manifest(place, {path.name: record_of(path) for path in place.iterdir() if path.name != "manifest.json"})
    return place


def read_checkpoint(path: Path) -> None:
    import torch

    from nemo_aligner_diffusion.training.checkpoints.io import FolderCheckpointIO
    from nemo_aligner_diffusion.training.checkpoints.resume import check_fits, find_resume_point

    module = torch.nn.Linear(3, 2)
    point = find_resume_point(path.parent)
    if point is not None:
        check_fits(point, module)
        FolderCheckpointIO(module).load_checkpoint(path)


Make = Callable[[random.Random, Path], Path]
TARGETS: dict[str, tuple[Make, Callable[[Path], None]]] = {
    "shards": (shard, read_shard),
    "lora": (lora, read_lora),
    "latents": (latents, read_latents),
    "folders": (model_folder, read_model_folder),
    "checkpoints": (checkpoint, read_checkpoint),
}


def _printable(text: str) -> None:
    assert all(line.isprintable() and len(line) <= 4_000 for line in text.split("\n")), f"message: {text[:200]!r}"


def run(target: str, numbers: range, seed: int) -> dict[str, Any]:
    """Outcomes counted, and what was broken, by case."""
    from nemo_aligner_diffusion.errors import AlignerError

    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    make, read = TARGETS[target]
    outcomes: Counter[str] = Counter()
    broken: list[str] = []
    slowest = peak = 0.0
    with tempfile.TemporaryDirectory(prefix="fuzz-") as sandbox:
        folder = Path(sandbox) / "case"
        guard: Guard | None = None
        for number in (numbers[0], *numbers):  # the first one twice: it imports what is imported on first use
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            path = make(random.Random(f"{target} {seed} {number}"), folder)
            if guard is None:
                with contextlib.suppress(AlignerError):
                    read(path)
                guard = Guard()
                continue
            problems = []
            with guard.watching() as watch:
                try:
                    read(path)
                    outcomes["accepted"] += 1
                except AlignerError as error:
                    outcomes["refused"] += 1
                    message = str(error)
                    if not all(line.isprintable() and len(line) <= 4_000 for line in message.split("\n")):
                        problems.append(f"message {message[:200]!r}")
                except (Exception, Interrupted) as error:
                    problems.append(f"{type(error).__name__}: {str(error)[:300]!r}")
            slowest, peak = max(slowest, watch.seconds), max(peak, watch.peak_mib)
            # Schedulers and models are imported as folders name them, dataclasses among them.
            ran = [what for what in watch.ran if not (target == "folders" and what.startswith(("compile", "exec")))]
            problems += [f"ran {what}" for what in ran[:3]] + [f"wrote {what}" for what in watch.wrote[:3]]
            if watch.seconds > SECONDS * (10 if target == "folders" else 1):
                problems.append(f"took {watch.seconds:.1f} s")
            if watch.peak_mib > PEAK_MIB:
                problems.append(f"took {watch.peak_mib:.0f} MiB")
            broken += [f"case {number}: {problem}" for problem in problems]
    return {"outcomes": outcomes, "broken": broken, "slowest": round(slowest, 2), "peak_mib": round(peak)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.inputs", description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    result = run(arguments.target, range(arguments.first, arguments.first + arguments.cases), arguments.seed)
    print(json.dumps(result))
    return 1 if result["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
