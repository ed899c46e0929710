"""docker/python_packages.py: which versions go into an image, and that NVIDIA's own stay."""

from __future__ import annotations

import fnmatch
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCKER = ROOT / "docker"


@pytest.fixture(scope="module")
def packages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("python_packages", DOCKER / "python_packages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_combined_constraints_keep_nvidias_builds_and_range_over_the_rest(packages: ModuleType, tmp_path: Path) -> None:
    ours = {
        "torch": ("2.13.0", ""),
        "numpy": ("2.4.6", 'python_version >= "3.11"'),
        "packaging": ("24.2", ""),
        "peft": ("0.21.2", ""),
    }
    ours |= {"pillow": ("11.0.0", ""), "tqdm": ("4.70.1", "")}
    image = {"torch": "2.13.0a0+9186a08b2c.nv26.07", "numpy": "1.26.4", "packaging": "23.2", "onnx": "1.18.0"}
    present = {
        **image,
        "pillow": "12.1.0",
        "tqdm": "4.70.1",
        "dali-extra": "1.0+nv1",
        "python-debian": "0.1.43ubuntu1~x",
    }
    assert packages.combine(ours, image, present) == [
        "dali-extra==1.0+nv1",
        "numpy==1.26.4",
        "onnx==1.18.0",
        "packaging>=23.2,<=24.2",
        "peft==0.21.2",
        "pillow>=11.0.0,<=12.1.0",
        "torch==2.13.0a0+9186a08b2c.nv26.07",
        "tqdm==4.70.1",
    ]


def test_our_constraints_are_read_whole(packages: ModuleType, tmp_path: Path) -> None:
    pins = packages.read_pins(ROOT / "constraints.txt")
    assert len(pins) > 100
    assert pins["numpy"][1] == 'python_version >= "3.11"'
    assert pins["fsspec"][0] == "2025.12.0", "without the comment behind it"
    bad = tmp_path / "constraints.txt"
    bad.write_text("torch>=2\n")
    with pytest.raises(packages.PackageError, match=r"line 1: 'torch>=2'; expected name==version"):
        packages.read_pins(bad)


def test_a_replaced_torch_stops_the_build(packages: ModuleType) -> None:
    before = {"torch": "2.13.0a0+x.nv26.07", "numpy": "1.26.4", "packaging": "23.2"}
    assert packages.compare(before, {**before, "packaging": "24.2", "peft": "0.21.2"}) == ["packaging 23.2 -> 24.2"]
    for name in ("torch", "numpy"):
        with pytest.raises(packages.PackageError, match=rf"{name} .* -> 2\.13\.0$"):
            packages.compare(before, {**before, name: "2.13.0"})


def test_extras_bring_their_requirements_and_wrong_ones_are_named(packages: ModuleType) -> None:
    plain = packages.requirements(ROOT / "pyproject.toml", [])
    assert any(line.startswith("torch>=") for line in plain)
    dev = packages.requirements(ROOT / "pyproject.toml", ["dev"])
    assert any(line.startswith("pytest>=") for line in dev), "the extra dev names the extra test"
    assert not any("nemo-aligner-diffusion" in line for line in dev)
    with pytest.raises(packages.PackageError, match=r"extra 'gpu': .* has .*dev"):
        packages.requirements(ROOT / "pyproject.toml", ["gpu"])


def test_command_line_of_python_packages(tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(DOCKER / "python_packages.py"), *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    frozen = run("freeze")
    assert frozen.returncode == 0
    assert re.search(r"(?m)^torch==", frozen.stdout)
    (tmp_path / "before.txt").write_text(frozen.stdout)
    assert "0 in another version here" in run("compare", str(tmp_path / "before.txt")).stdout
    (tmp_path / "before.txt").write_text("torch==1.0\n")
    replaced = run("compare", str(tmp_path / "before.txt"))
    assert replaced.returncode == 1
    assert replaced.stderr.startswith("error: packages of the base image were replaced that must stay: torch 1.0 ->")
    combined = run("combine", "constraints.txt", "--image", str(tmp_path / "none.txt"))
    assert "no constraint file" in combined.stderr
    assert fnmatch.filter(combined.stdout.splitlines(), "torch==*")
    absent = run("imports", "json,no_such_module")
    assert absent.returncode == 1
    assert "import no_such_module: ModuleNotFoundError" in absent.stderr
    assert "no_such_module: not importable" in run("imports", "json", "--optional", "no_such_module").stdout
