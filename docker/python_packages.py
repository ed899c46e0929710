"""Python packages while an image is built: what we need, and what of the base image must stay as it is.

Runs on the base image's own Python before anything of this project is installed, so it imports the
standard library and ``packaging`` only. The Dockerfiles call it::

    python_packages.py requirements pyproject.toml --extras megatron   > requirements.txt
    python_packages.py freeze                                          > image-packages.txt
    python_packages.py combine constraints.txt --image /etc/pip/constraint.txt > combined.txt
    python_packages.py compare image-packages.txt
    python_packages.py imports torch,diffusers --optional apex

Every command ends with status 1 and one line on stderr where something does not hold.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import re
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tomllib
    from packaging.version import InvalidVersion, Version
else:
    try:
        from packaging.version import InvalidVersion, Version
    except ImportError:  # a Python with nothing but pip
        from pip._vendor.packaging.version import InvalidVersion, Version
    try:
        import tomllib
    except ImportError:  # Python 3.10
        from pip._vendor import tomli as tomllib

# Built for each other and for this CUDA: never replaced. NVIDIA's other own builds show by a local version (+nv…).
PROTECTED = (
    *("torch", "torchvision", "torchaudio", "torchao", "torch-tensorrt", "triton", "pytorch-triton", "numpy"),
    *("apex", "transformer-engine*", "flash-attn*", "nvidia-*", "cuda-*", "cupy-*", "xformers"),
)


class PackageError(Exception):
    """What is wrong, in one line for the build's log."""


def normal(name: str) -> str:
    """The name as package indexes compare it: ``Foo_Bar.baz`` is ``foo-bar-baz``."""
    return re.sub(r"[-_.]+", "-", name).lower()


def protected(name: str, version: str) -> bool:
    """Must this installed package stay just as the base image has it?"""
    return "+" in version or any(fnmatch.fnmatch(normal(name), pattern) for pattern in PROTECTED)


def installed() -> dict[str, str]:
    """Name (normal) -> version of what this Python would import: the first one on ``sys.path`` wins."""
    result: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            result.setdefault(normal(name), distribution.version)
    return result


def read_pins(path: Path) -> dict[str, tuple[str, str]]:
    """Name (normal) -> (version, marker or "") of the lines ``name==version; marker`` of a constraints file.

    Raises:
        PackageError: the file cannot be read, or a line of ours is not such a pin.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise PackageError(f"constraints {path}: {error.strerror}; expected a readable file") from None
    pins: dict[str, tuple[str, str]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        if not line:
            continue
        match = re.fullmatch(r"([A-Za-z0-9][\w.-]*)\s*==\s*([^\s;]+)\s*(?:;\s*(.+))?", line)
        if match is None:
            raise PackageError(f"{path}, line {number}: {line!r}; expected name==version or name==version; marker")
        pins[normal(match[1])] = (match[2], match[3] or "")
    return pins


def read_image_pins(path: Path) -> dict[str, str]:
    """Name (normal) -> version of the base image's own constraint file; lines of another shape are passed over."""
    pins = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        match = re.match(r"\s*([A-Za-z0-9][\w.-]*)\s*===?\s*([^\s;#]+)", line)
        if match:
            pins[normal(match[1])] = match[2]
    return pins


def combine(ours: dict[str, tuple[str, str]], image: dict[str, str], present: dict[str, str]) -> list[str]:
    """Constraints that keep the base image as it is wherever our requirements allow it.

    - What :func:`protected` names stays at the image's version: pip stops rather than replace it.
    - What the image has in another version than ours is let between the two. pip keeps the installed one where every
      requirement admits it, and takes ours where it is too old (the newest the range allows).
    - What only we pin is ours; what only the image pins or has is the image's.

    Args:
        ours: pins of constraints.txt, name -> (version, marker).
        image: pins of the image's own constraint file, name -> version; empty where it has none.
        present: what is installed in the image, name -> version.

    Returns:
        Lines of a constraints file, by name.
    """
    lines = []
    for name in sorted({*ours, *image, *present}):
        there = present.get(name, image.get(name))
        if there is None:
            version, marker = ours[name]
            lines.append(f"{name}=={version}" + (f"; {marker}" if marker else ""))
            continue
        try:
            version_there = Version(there)
        except InvalidVersion:  # some of a distribution's own packages; pip could not read the line
            continue
        if name not in ours or (name in present and protected(name, there)):
            lines.append(f"{name}=={there}")
        else:
            low, high = sorted((Version(ours[name][0]), version_there))
            lines.append(f"{name}=={there}" if low == high else f"{name}>={low},<={high}")
    return lines


def requirements(pyproject: Path, extras: Sequence[str]) -> list[str]:
    """The dependencies of a pyproject.toml and of some of its extras, one of its extras naming others included.

    Raises:
        PackageError: an extra that pyproject.toml does not have.
    """
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    known = project.get("optional-dependencies", {})
    result = list(project["dependencies"])
    waiting, seen = list(extras), set()
    while waiting:
        extra = waiting.pop(0)
        if extra in seen:
            continue
        seen.add(extra)
        if extra not in known:
            raise PackageError(f"extra {extra!r}: {pyproject} has {', '.join(sorted(known)) or 'none'}")
        for requirement in known[extra]:
            match = re.match(r"([A-Za-z0-9][\w.-]*)\[([^]]+)]", requirement)
            if match and normal(match[1]) == normal(project["name"]):
                waiting += [word.strip() for word in match[2].split(",")]
            else:
                result.append(requirement)
    return list(dict.fromkeys(result))


def compare(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """What differs from the base image, as ``name image's version -> version now``.

    Raises:
        PackageError: something protected is another one now.
    """
    changed = {name: (old, now.get(name, "gone")) for name, old in before.items() if now.get(name) != old}
    lost = [f"{name} {old} -> {new}" for name, (old, new) in sorted(changed.items()) if protected(name, old)]
    if lost:
        raise PackageError(f"packages of the base image were replaced that must stay: {'; '.join(lost)}")
    return [f"{name} {old} -> {new}" for name, (old, new) in sorted(changed.items())]


def try_imports(names: Iterable[str], optional: Iterable[str]) -> list[str]:
    """Import each module; one line for each with its version.

    Raises:
        PackageError: a module of ``names`` cannot be imported.
    """
    lines = []
    for name in names:
        try:
            module = importlib.import_module(name)
        except Exception as error:
            raise PackageError(f"import {name}: {type(error).__name__}: {error}") from error
        lines.append(f"{name} {getattr(module, '__version__', '')}".rstrip())
    for name in optional:
        try:
            module = importlib.import_module(name)
        except Exception as error:  # a build has no GPU: what loads the driver on import says so here
            lines.append(f"{name}: not importable while building ({type(error).__name__}: {error}); used where it is")
        else:
            lines.append(f"{name} {getattr(module, '__version__', '')}".rstrip())
    return lines


def words(text: str) -> list[str]:
    """The words of a list with commas; an empty text is an empty list."""
    return [word.strip() for word in text.split(",") if word.strip()]


def _combine(arguments: argparse.Namespace) -> list[str]:
    image = Path(arguments.image) if arguments.image else None
    if image is not None and not image.is_file():
        print(f"note: no constraint file {image} in this image; what is installed counts", file=sys.stderr)
        image = None
    ours = read_pins(arguments.constraints)
    return combine(ours, read_image_pins(image) if image else {}, installed())


def _compare(arguments: argparse.Namespace) -> list[str]:
    before = {name: version for name, (version, _) in read_pins(arguments.packages).items()}
    changed = compare(before, installed())
    return [f"{len(before)} packages of the base image, {len(changed)} in another version here:", *changed]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)

    command = commands.add_parser("requirements", help="dependencies of a pyproject.toml")
    command.add_argument("pyproject", type=Path)
    command.add_argument("--extras", type=words, default=[])
    command.set_defaults(run=lambda given: requirements(given.pyproject, given.extras))
    command = commands.add_parser("freeze", help="what is installed, as name==version")
    command.set_defaults(run=lambda given: [f"{name}=={version}" for name, version in sorted(installed().items())])
    command = commands.add_parser("combine", help="our constraints and the base image's")
    command.add_argument("constraints", type=Path)
    command.add_argument("--image", default="", help="the image's own constraint file")
    command.set_defaults(run=_combine)
    command = commands.add_parser("compare", help="what differs from a freeze of the base image")
    command.add_argument("packages", type=Path)
    command.set_defaults(run=_compare)
    command = commands.add_parser("imports", help="import modules, print versions")
    command.add_argument("modules", type=words)
    command.add_argument("--optional", type=words, default=[])
    command.set_defaults(run=lambda given: try_imports(given.modules, given.optional))

    arguments = parser.parse_args(argv)
    try:
        lines = arguments.run(arguments)
    except PackageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
