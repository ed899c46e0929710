"""What the package imports is what pyproject.toml declares, and the other way round."""

from __future__ import annotations

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
# declared and imported by others on our behalf -> by whom
THROUGH_OTHERS = {"tensorboard": "Lightning's TensorBoardLogger"}
UNDECLARED = {
    "apex": "fused optimizers, for who has built it: no registry has it",
    "transformer_engine": "model.fp8.backend, for who has NVIDIA's containers: it is built against their CUDA",
}


def test_imports_and_declared_dependencies_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    needed = {_name(line) for line in project["dependencies"]}
    optional = {_name(line) for lines in project["optional-dependencies"].values() for line in lines}
    distributions = packages_distributions()
    used: dict[str, set[str]] = {}
    for module, files in _imported().items():
        if module in UNDECLARED:
            continue
        names = {_name(name) for name in distributions.get(module, [module])}
        assert names & (needed | optional), f"{module} is imported in {sorted(files)[:3]} and not declared"
        for name in names & (needed | optional):
            used.setdefault(name, set()).update(files)
    unused = needed - set(used) - set(THROUGH_OTHERS)
    assert not unused, f"declared in pyproject.toml and not imported: {sorted(unused)}"
    assert set(THROUGH_OTHERS) <= needed


def _imported() -> dict[str, set[str]]:
    """Top-level modules of others, wherever they are imported -> files."""
    found: dict[str, set[str]] = {}
    for file in (ROOT / "nemo_aligner_diffusion").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module or ""]
            for module in modules:
                top = module.partition(".")[0]
                if top not in sys.stdlib_module_names and top != "nemo_aligner_diffusion":
                    found.setdefault(top, set()).add(file.name)
    return found


def _name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower().replace("_", "-")
