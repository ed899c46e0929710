"""Arrows between rooms go one way (docs/architecture.md), and no room is too full: read off the imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from house import ROOMS, ROOT, arrows, imported, modules, picture, room_of

# Where processes meet.
MAY_COMMUNICATE = ("parallel.", "runtime.")
MOST_FILES = 15


def test_every_room_stands_in_the_order() -> None:
    assert {room_of(module) for module in modules()} == set(ROOMS)


def test_a_room_imports_only_what_is_below_it() -> None:
    order = list(ROOMS)
    upward = {rooms: imports for rooms, imports in arrows().items() if order.index(rooms[1]) > order.index(rooms[0])}
    assert upward == {}


def test_processes_meet_in_parallel_and_runtime_only() -> None:
    meeting = [
        module
        for module, file in modules().items()
        if any(name.startswith("torch.distributed") for name in imported(file))
    ]
    assert [module for module in meeting if not module.startswith(MAY_COMMUNICATE)] == []
    assert any(module.startswith("parallel.") for module in meeting)


@pytest.mark.parametrize("folder", sorted({file.parent for file in modules().values()}), ids=lambda path: path.name)
def test_no_folder_is_too_full(folder: Path) -> None:
    files = [file for file in folder.glob("*.py") if file.name != "__init__.py"]
    assert len(files) <= MOST_FILES + (folder.name == "algorithms") * 20, folder  # one file a method


def test_no_method_knows_a_family_and_no_family_a_method() -> None:
    methods = " ".join(file.read_text("utf-8") for file in (ROOT / "algorithms").glob("*.py"))
    assert "StableDiffusion" not in methods
    assert "diffusion.families" not in methods
    names = {file.stem for file in (ROOT / "algorithms").glob("*.py")} - {"base", "custom", "registry", "settings"}
    for file in (ROOT / "diffusion").glob("*.py"):
        code = {node.id for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Name)}
        assert not code & names, file.name


def test_the_picture_in_the_docs_is_of_this_house() -> None:
    assert (ROOT.parent / "docs" / "house.svg").read_text("utf-8") == picture(), (
        "python tests/house.py docs/house.svg draws it"
    )
