"""The scripts' command line: help, errors, exit codes, and what it does not import."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nemo_aligner_diffusion.cli.train import main, parse_arguments
from nemo_aligner_diffusion.config.recipes import recipes
from nemo_aligner_diffusion.errors import ConfigurationError

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {
    "train_sd_draftp.py": "draftp_sd",
    "train_sd_drtune.py": "drtune_sd",
    "train_sdxl_draftp.py": "draftp_sdxl",
    "train_sdxl_drtune.py": "drtune_sdxl",
    "train_sd.py": "draftp_sd",
}
HEAVY = ("torch", "pytorch_lightning", "diffusers", "transformers", "peft", "matplotlib", "webdataset")


def run_script(name: str, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    script = ROOT / "examples" / "mm" / "stable_diffusion" / name
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    return subprocess.run(
        [sys.executable, str(script), *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_show_help_and_configuration(name: str, tmp_path: Path) -> None:
    shown = run_script(name, "--help", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    for text in (f"usage: {name}", "refl_sd", "model.kl_coeff", "rm ", "symmetry", "--config-path"):
        assert text in shown.stdout
    lines = shown.stdout.splitlines()
    assert [line for line in lines if len(line) > 80] == []
    table = lines[lines.index("recipes (--config-name):") + 1 : lines.index("groups (group=option):") - 1]
    assert {len(line) - len(re.sub(r"^(  \w+)? +", "", line)) for line in table} == {4 + max(map(len, recipes()))}
    composed = run_script(name, "--cfg", "rm=symmetry", cwd=tmp_path)
    assert yaml.safe_load(composed.stdout)["name"] == SCRIPTS[name]
    assert list(tmp_path.iterdir()) == [], "nothing is written"


@pytest.mark.parametrize(
    ("words", "status"),
    [(["--help"], 0), (["--cfg"], 0), (["model.kl_coef=1"], 2), (["model.global_batch_size=12"], 2)],
)
def test_help_and_errors_import_nothing_heavy_and_are_quick(words: list[str], status: int, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from nemo_aligner_diffusion.cli.train import main\n"
        f"status = main('draftp_sd', {words!r})\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not heavy, heavy\n"
        "sys.exit(status)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time, not the clock's: other test processes share the cores.
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert seconds < 3


def test_an_error_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("draftp_sd", ["model.kl_coef=1"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: unknown key 'model.kl_coef'; did you mean model.kl_coeff?\n"


def test_options_come_in_any_order_and_both_forms() -> None:
    parsed = parse_arguments("draftp_sd", ["a.b=1", "--config-name", "refl_sd", "--config-path=/x", "--cfg", "c=2"])
    assert parsed.config_name == "refl_sd"
    assert parsed.config_path == "/x"
    assert parsed.show_config
    assert parsed.overrides == ["a.b=1", "c=2"]
    assert parse_arguments("draftp_sd", ["-cn", "x", "-c", "job", "d=3"]).overrides == ["d=3"]


@pytest.mark.parametrize("words", [["--config-name"], ["--verbose"], ["-x=1"]])
def test_wrong_options(words: list[str]) -> None:
    with pytest.raises(ConfigurationError):
        parse_arguments("draftp_sd", words)


def test_config_name_and_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("model: {seed: 5}\n", encoding="utf-8")
    assert main("drtune_sd", ["--config-name=mine", f"--config-path={tmp_path}", "--cfg"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["model"]["seed"], shown["model"]["algorithm"]) == (5, "drtune")
    assert main("draftp_sd", ["--config-name", "refl_sd", "--cfg"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["algorithm"] == "refl"


def test_what_cfg_shows_is_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("drtune_sd", ["rm=composite", "--cfg"]) == 0
    shown = capsys.readouterr().out
    (tmp_path / "drtune_sd.yaml").write_text(shown, encoding="utf-8")
    assert main("drtune_sd", ["--config-path", str(tmp_path), "--cfg"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(shown)
