"""The wheel: it carries recipes and assets, and what is installed from it works in an empty directory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "nemo_aligner_diffusion"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the checkout stays clean, by the backend itself: pip would download it."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    without_caches = shutil.ignore_patterns("__pycache__")
    for name in ("conf", "nemo_aligner_diffusion"):
        shutil.copytree(ROOT / name, source / name, ignore=without_caches)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(output)!r})"
    built = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=180)
    assert built.returncode == 0, built.stderr
    (path,) = output.glob("nemo_aligner_diffusion-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_every_recipe_and_asset_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = {
        f"nemo_aligner_diffusion/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "conf").rglob("*.yaml")
    }
    for path in PACKAGE.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            expected.add(path.relative_to(ROOT).as_posix())
    assert len(expected) > 100
    assert expected <= names, sorted(expected - names)
    strangers = {name for name in names if not name.startswith("nemo_aligner_diffusion")}
    assert strangers == set(), "tests and examples stay out of site-packages"


def test_configurations_are_found_from_an_empty_directory(installed: Path, tmp_path: Path) -> None:
    code = (
        "import sys, nemo_aligner_diffusion as package\n"
        "from nemo_aligner_diffusion.cli.train import main\n"
        f"assert package.__file__.startswith({str(installed)!r}), package.__file__\n"
        "sys.exit(main('drtune_sd', ['rm=symmetry', '--cfg']))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert shown.returncode == 0, shown.stderr
    cfg = yaml.safe_load(shown.stdout)
    assert (cfg["model"]["algorithm"], cfg["rm"]["name"]) == ("drtune", "symmetry")


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_train_takes_a_fresh_directory_each_time(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    # An environment that counts as installed; its Python only makes the directory that it is told to train into.
    environment = tmp_path / ".venv"
    (environment / "bin").mkdir(parents=True)
    python = environment / "bin" / "python"
    python.write_text(
        '#!/bin/sh\nfor word; do case $word in *log_dir=*) mkdir -p "${word#*=}";; esac; done\necho "$@"\n'
    )
    python.chmod(0o755)
    (environment / ".installed").touch()
    words = [
        subprocess.run(
            ["make", "-s", "train", "ARGS=model.seed=7"], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(2)
    ]
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["train_001", "train_002"]
    for number, output in enumerate(words, 1):
        assert f"exp_manager.explicit_log_dir=results/train_00{number}" in output
        assert "model.seed=7" in output
        assert "examples/mm/stable_diffusion/train_sd_draftp.py" in output


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_lint_reads_every_shell_script_and_dockerfile() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("an unpacked release has no .git")
    names = [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    shells = ("#!/bin/sh", "#!/bin/bash", "#!/usr/bin/env bash")
    scripts = {name for name in names if (ROOT / name).read_bytes()[:40].decode("latin-1").startswith(shells)}
    dockerfiles = {name for name in names if Path(name).name.startswith("Dockerfile")}
    shown = subprocess.run(["make", "-n", "lint"], cwd=ROOT, capture_output=True, text=True)
    commands = {Path(line.split()[0]).name: set(line.split()[1:]) for line in shown.stdout.splitlines() if line.strip()}
    assert commands["shellcheck"] == scripts
    assert commands["hadolint"] == dockerfiles


def test_every_console_command_exists(installed: Path) -> None:
    import importlib

    (file,) = installed.glob("*.dist-info/entry_points.txt")
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if "=" in line]
    commands = dict(line.split(" = ") for line in lines)
    assert set(commands) == {
        "nad-train",
        "nad-train-draftp",
        "nad-train-drtune",
        "nad-generate",
        "nad-evaluate",
        "nad-export",
        "nad-prompts-to-shards",
        "nad-train-reward",
        "nad-test-reward",
        "nad-parquet-to-shards",
        "nad-folder-to-shards",
        "nad-make-rule-preferences",
        "nad-encode-latents",
        "nad-plan",
        "nad-convert-reward",
    }
    for target in commands.values():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function))
