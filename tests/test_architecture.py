"""Arrows between packages go one way (docs/architecture.md): read off the imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import nemo_aligner_diffusion

ROOT = Path(nemo_aligner_diffusion.__file__).parent
NAME = "nemo_aligner_diffusion."


def imports(package: str) -> dict[str, set[str]]:
    """File -> the modules of this project that it imports, wherever it does."""
    found = {}
    for file in sorted((ROOT / package).rglob("*.py")):
        nodes = list(ast.walk(ast.parse(file.read_text("utf-8"))))
        modules = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        modules |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        found[file.name] = {module.removeprefix(NAME) for module in modules if module.startswith(NAME)}
    assert found
    return found


@pytest.mark.parametrize(
    ("package", "allowed"),
    [("diffusion", {"diffusion", "errors", "formats", "keys", "settings"}), ("algorithms", None)],
    ids=["diffusion", "methods"],
)
def test_nothing_below_knows_what_is_above(package: str, allowed: set[str] | None) -> None:
    for file, modules in imports(package).items():
        packages = {module.partition(".")[0] for module in modules}
        if allowed is not None:
            assert packages <= allowed, file
        assert not packages & {"planner", "evaluation", "api", "tuned"}, file
        assert package == "diffusion" or "diffusion.families" not in modules, file


def test_no_method_knows_a_family_and_no_family_a_method() -> None:
    methods = " ".join(file.read_text("utf-8") for file in (ROOT / "algorithms").glob("*.py"))
    assert "StableDiffusion" not in methods
    names = {file.stem for file in (ROOT / "algorithms").glob("*.py")} - {"base", "custom", "registry"}
    for file in (ROOT / "diffusion").glob("*.py"):
        code = {node.id for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Name)}
        assert not code & names, file.name
