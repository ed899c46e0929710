"""What differs between two runs that must be the same: which value of which file, and what it is in either."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CLOCKS = re.compile(r"seconds|time|per_second|memory|images_per|eta")  # columns of metrics.csv that differ by nature
SHOWN = 8  # differences of one file
WIDTH = 60  # characters of one value


def differences(run: Path, reference: Path, step: int) -> dict[str, list[str]]:
    """Part of the result -> lines such as ``metrics.csv: row 3, reward: '0.25', expected '0.26'``; none: the same.

    Tables are compared without the columns of time; exported weights tensor by tensor, for PEFT writes what else is in
    their header in an order that changes from process to process; the files of the checkpoint byte for byte.

    Args:
        run: the run directory to be judged.
        reference: the one that it must equal.
        step: of the checkpoint.
    """
    checkpoint = f"checkpoints/step_{step:06d}"
    return {
        "metrics.csv": _files(run, reference, ["metrics.csv"], exactly=False),
        "validation.csv": _files(run, reference, ["validation.csv"], exactly=False),
        "export": _files(run, reference, _names(run, reference, "export/**/*.safetensors"), exactly=False),
        "last checkpoint": _files(run, reference, _names(run, reference, f"{checkpoint}/*"), exactly=True),
    }


def _names(run: Path, reference: Path, pattern: str) -> list[str]:
    return sorted({file.relative_to(folder).as_posix() for folder in (run, reference) for file in folder.glob(pattern)})


def _files(run: Path, reference: Path, names: list[str], exactly: bool) -> list[str]:
    if not names:
        return ["no such file in either run"]
    lines = []
    for name in names:
        mine, expected = run / name, reference / name
        missing = [str(file.parent) for file in (mine, expected) if not file.is_file()]
        if missing:
            lines.append(f"{name}: not in {' nor '.join(missing)}")
        elif mine.read_bytes() != expected.read_bytes():
            found = list(_values(mine, expected, exactly))
            lines += [f"{name}: {line}" for line in found[:SHOWN]]
            if len(found) > SHOWN:
                lines.append(f"{name}: and {len(found) - SHOWN} more")
            if exactly and not found:
                lines.append(f"{name}: every value is the same, but not every byte (order, spaces)")
    return lines


def _values(mine: Path, expected: Path, exactly: bool) -> Iterator[str]:
    read = {".csv": _table, ".json": _document}.get(mine.suffix)
    if mine.suffix == ".safetensors":
        yield from _tensors(mine, expected, exactly)
    elif read is None:
        yield f"{mine.stat().st_size} bytes, expected {expected.stat().st_size}, and others"
    else:
        yield from _entries(read(mine), read(expected))


def _entries(mine: dict[str, Any], expected: dict[str, Any]) -> Iterator[str]:
    for key in [*expected, *(key for key in mine if key not in expected)]:
        if key not in mine:
            yield f"{key}: not there, expected {_short(expected[key])}"
        elif key not in expected:
            yield f"{key}: {_short(mine[key])}, expected not to be there"
        elif mine[key] != expected[key]:
            yield f"{key}: {_short(mine[key])}, expected {_short(expected[key])}"


def _table(file: Path) -> dict[str, str]:
    with open(file, encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    return {f"row {n}, {k}": v for n, row in enumerate(rows, 1) for k, v in row.items() if not CLOCKS.search(str(k))}


def _document(file: Path) -> dict[str, Any]:
    def leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
        parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
        if parts is None or not value:
            yield place, value
        else:
            for key, part in parts:
                yield from leaves(part, f"{place}.{key}" if place else str(key))

    return dict(leaves(json.loads(file.read_text(encoding="utf-8")), ""))


def _tensors(mine: Path, expected: Path, exactly: bool) -> Iterator[str]:
    (said, one), (said_there, other) = _raw(mine), _raw(expected)
    if exactly:
        yield from _entries(said, said_there)
    yield from _entries(dict.fromkeys(one, "a tensor"), dict.fromkeys(other, "a tensor"))
    for name in sorted(one.keys() & other.keys()):
        if one[name][:2] != other[name][:2]:
            yield f"{name}: {one[name][0]} {one[name][1]}, expected {other[name][0]} {other[name][1]}"
        elif one[name] != other[name]:  # as bytes: a NaN is equal to itself, and -0 is not 0
            yield f"{name} {one[name][1]}: {_values_of(name, mine, expected)}"


def _raw(file: Path) -> tuple[dict[str, str], dict[str, tuple[str, list[int], bytes]]]:
    """What a safetensors file says beside its tensors; type, shape, bytes of each. (To import torch takes seconds.)"""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    said = header.pop("__metadata__", {})
    spans = {
        name: (start + entry["data_offsets"][0], start + entry["data_offsets"][1]) for name, entry in header.items()
    }
    return said, {name: (header[name]["dtype"], header[name]["shape"], data[a:b]) for name, (a, b) in spans.items()}


def _values_of(name: str, mine: Path, expected: Path) -> str:
    """How many values of a tensor are others, and the first of them."""
    import torch
    from safetensors import safe_open

    with safe_open(mine, "pt") as here, safe_open(expected, "pt") as there:
        one, other = here.get_tensor(name).reshape(-1), there.get_tensor(name).reshape(-1)
    unlike = (one.view(torch.uint8) != other.view(torch.uint8)).view(-1, one.element_size()).any(dim=1)
    first = int(unlike.nonzero()[0])
    return (
        f"{int(unlike.sum())} of {one.numel()} values, the first at {first}: "
        f"{one[first].item()!r}, expected {other[first].item()!r}"
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 20]}…{text[-18:]}"
