"""The containers' entry point, run for real on this machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DOCKER = Path(__file__).resolve().parents[1] / "docker"
ENTRYPOINT = DOCKER / "entrypoint.sh"


def enter(*words: str, results: Path | str, **environment: str) -> subprocess.CompletedProcess[str]:
    known = {name: os.environ[name] for name in ("HOME", "TMPDIR", "LANG") if name in os.environ}
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    return subprocess.run(
        [str(ENTRYPOINT), *words],
        env={**known, "PATH": path, "NAD_RESULTS": str(results), "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A PATH with nad-train, nad-generate, torchrun that print how they were started: the line is what is tested."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("nad-train", "nad-generate", "torchrun"):
        (folder / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (folder / name).chmod(0o755)
    return folder


def line_of(commands: Path, results: Path, *words: str, **environment: str) -> str:
    path = f"{commands}:{Path(sys.executable).parent}:/usr/bin:/bin"
    done = enter(*words, results=results, PATH=path, NAD_QUIET="1", **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("script", [ENTRYPOINT, DOCKER / "proof" / "prove.sh"], ids=lambda path: path.name)
def test_scripts_are_executable_bash(script: Path) -> None:
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


def test_help_lists_the_commands_that_exist(tmp_path: Path) -> None:
    done = enter("help", results=tmp_path)
    assert done.returncode == 0
    listed = set(re.findall(r"^  (\w+) +\S", done.stdout, re.MULTILINE)) - {"anything"}
    handled = set(re.findall(r"^    (\w+)\) \w+ ?", ENTRYPOINT.read_text(), re.MULTILINE)) | {"help"}
    assert listed == handled == {"train", "generate", "test", "check", "help"}
    assert "set -e" not in done.stdout
    assert enter(results=tmp_path).stdout == done.stdout


def test_any_command_is_run_as_it_is_with_its_status_and_words(tmp_path: Path) -> None:
    done = enter("sh", "-c", 'printf "%s|" "$@"; exit 7', "zero", "a b", "*", results=tmp_path)
    assert done.returncode == 7
    assert done.stdout == "a b|*|"
    assert f"Python {sys.version.split()[0]}" in done.stderr
    assert f"results in {tmp_path}" in done.stderr
    assert list(tmp_path.iterdir()) == [], "the probe for writing is removed"


def test_quiet_says_nothing(tmp_path: Path) -> None:
    assert enter("true", results=tmp_path, NAD_QUIET="1").stderr == ""
    assert enter("true", results=tmp_path, SLURM_LOCALID="3").stderr == "", "one process of a node speaks"
    assert enter("true", results=tmp_path, SLURM_LOCALID="0").stderr != ""


@pytest.mark.parametrize("command", ["train", "generate", "test"])
def test_results_that_are_not_there_stop_what_writes_there(command: str, tmp_path: Path) -> None:
    done = enter(command, results=tmp_path / "absent")
    assert done.returncode == 73
    assert f"error: {tmp_path / 'absent'} is not there" in done.stderr
    assert "-v" in done.stderr, "how to mount it"
    other = enter("echo", "on", results=tmp_path / "absent")
    assert (other.returncode, other.stdout) == (0, "on\n")
    assert "warning: " in other.stderr


def test_results_that_cannot_be_written_are_named_with_uid_and_mode(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        folder = Path("/proc")  # not even root makes files there
    else:
        folder = tmp_path / "closed"
        folder.mkdir(mode=0o555)
    done = enter("train", results=folder)
    assert done.returncode == 73
    assert f"cannot be written by uid {os.geteuid()} (it is of uid" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act for two users")
@pytest.mark.parametrize("made", ["folder", "link"])
def test_a_home_that_another_user_made_first_is_not_used(open_folder: Path, made: str) -> None:
    open_folder.chmod(0o1777)
    trap = open_folder / f"nad-home-{os.geteuid()}"
    (open_folder / "elsewhere").mkdir(mode=0o777)
    if made == "folder":
        trap.mkdir(mode=0o777)
    else:
        trap.symlink_to(open_folder / "elsewhere")
    os.chown(trap, 65534, 65534, follow_symlinks=False)
    done = enter("sh", "-c", "echo $HOME", results=open_folder, HOME="/nonexistent", TMPDIR=str(open_folder))
    home = Path(done.stdout.strip())
    assert home != trap, done.stderr
    assert home.parent == open_folder
    assert (home.stat().st_uid, home.stat().st_mode & 0o777) == (os.geteuid(), 0o700)


def test_a_caller_without_home_or_name_gets_both(tmp_path: Path) -> None:
    done = enter("sh", "-c", 'echo "$HOME"', results=tmp_path, HOME="/nonexistent", TMPDIR=str(tmp_path), NAD_QUIET="1")
    home = Path(done.stdout.strip())
    assert home == tmp_path / f"nad-home-{os.geteuid()}"
    assert home.is_dir()


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv to take another uid"
)
def test_an_unknown_uid_can_be_asked_for_its_name(open_folder: Path) -> None:
    code = "import getpass, os; print(getpass.getuser(), os.environ['HOME'])"
    other = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"]
    environment = ["env", "-i", "PATH=/usr/bin:/bin", "NAD_QUIET=1", "CUDA_VISIBLE_DEVICES="]
    environment += [f"NAD_RESULTS={open_folder}", f"TMPDIR={open_folder}"]
    done = subprocess.run(
        [*other, *environment, "bash", "-s", "python3", "-c", code],
        input=ENTRYPOINT.read_text(),
        capture_output=True,
        text=True,
    )
    if "python3: command not found" in done.stderr or "No such file" in done.stderr:
        pytest.skip("no Python outside this user's folders")
    assert done.stdout.split() == ["uid54321", f"{open_folder}/nad-home-54321"], done.stderr


def test_no_gpu_is_a_warning_or_an_error_as_asked(tmp_path: Path) -> None:
    assert "GPU is visible" not in enter("true", results=tmp_path).stderr
    warned = enter("true", results=tmp_path, NAD_EXPECT_GPU="1")
    assert warned.returncode == 0
    assert "warning: no GPU is visible" in warned.stderr
    assert "--gpus all" in warned.stderr
    refused = enter("true", results=tmp_path, NAD_REQUIRE_GPU="1")
    assert refused.returncode == 73
    assert "error: no GPU is visible" in refused.stderr


def test_limits_that_are_too_low_are_named_with_the_option(tmp_path: Path) -> None:
    words = 'ulimit -Sn 512; ulimit -Ss 8192; ulimit -Sl 64; exec "$0" true'
    done = subprocess.run(
        ["bash", "-c", words, str(ENTRYPOINT)],
        env={**os.environ, "NAD_RESULTS": str(tmp_path), "CUDA_VISIBLE_DEVICES": "0,1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    for option in ("--ulimit memlock=-1", "--ulimit stack=67108864", "--ulimit nofile="):
        assert option in done.stderr
    assert "2 GPUs" in done.stderr


def test_train_is_one_process_without_a_gpu_and_torchrun_with_several(commands: Path, tmp_path: Path) -> None:
    one = line_of(commands, tmp_path, "train", "model.optim.lr=1e-4")
    assert one == f"nad-train model.optim.lr=1e-4 exp_manager.exp_dir={tmp_path} trainer.devices=1"
    eight = line_of(commands, tmp_path, "train", CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7")
    assert eight == (
        f"torchrun --standalone --nproc-per-node 8 --no-python nad-train exp_manager.exp_dir={tmp_path} "
        "trainer.devices=8 trainer.num_nodes=1"
    )
    assert "--nproc-per-node 2 " in line_of(commands, tmp_path, "train", NAD_PROCESSES="2")


def test_what_the_user_says_stands(commands: Path, tmp_path: Path) -> None:
    words = ("exp_manager.explicit_log_dir=/elsewhere", "trainer.devices=4")
    line = line_of(commands, tmp_path, "train", *words, CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7")
    assert (
        line == f"torchrun --standalone --nproc-per-node 4 --no-python nad-train {' '.join(words)} trainer.num_nodes=1"
    )
    assert (
        line_of(commands, tmp_path, "generate", "--prompt", "x")
        == f"nad-generate --prompt x --output {tmp_path}/generated"
    )
    assert line_of(commands, tmp_path, "generate", "--output", "/there") == "nad-generate --output /there"


@pytest.mark.parametrize(
    "words", [("train", "--help"), ("train", "model.seed=1", "--cfg"), ("train", "-c", "job"), ("generate", "-h")]
)
def test_a_question_needs_neither_results_nor_gpus(words: tuple[str, ...], commands: Path, tmp_path: Path) -> None:
    line = line_of(commands, tmp_path / "absent", *words, NAD_REQUIRE_GPU="1")
    assert line == f"nad-{' '.join(words)}"
