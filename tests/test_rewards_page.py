"""``docs/rewards.md``: its command lines and its YAML are accepted as they stand, and no reward is left out."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from nemo_aligner_diffusion.config.load import load_config
from nemo_aligner_diffusion.config.recipes import groups
from nemo_aligner_diffusion.config.schema import REWARDS

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "rewards.md").read_text(encoding="utf-8")
COMMANDS = [" ".join(code.split()) for code in re.findall(r"`(rm[=.][^`<]*=[^`<]*|rm=[^`<]+)`", PAGE)]


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS))
def test_a_documented_setting_is_accepted(command: str) -> None:
    words = shlex.split(command)
    if words[0].startswith("rm.parts."):
        words.insert(0, "rm=composite")
    if words == ["rm.remove=true"]:
        words = ["rm=detection", "rm.model.from_pretrained=owl", *words]
    if not words[0].startswith("rm="):
        words.insert(0, "rm=clip")
    # no gradient; nothing to be learnt from
    recipe = {"rm=jpeg_size": "ddpo_sd", "rm=none": "dde_sd"}.get(words[0], "draftp_sd")
    assert load_config(recipe, words).rm.name in REWARDS


def test_commands_were_found() -> None:
    assert len(COMMANDS) > 20


def test_every_reward_is_in_the_table() -> None:
    picked = {word.partition("=")[2] for command in COMMANDS for word in shlex.split(command) if word.startswith("rm=")}
    missing = {*groups()["rm"], *REWARDS} - picked
    assert missing <= {"clip"}, "the embedded CLIP is shown as YAML"


def test_the_documented_yaml_is_accepted(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert blocks
    for number, block in enumerate(blocks):
        (tmp_path / f"mine{number}.yaml").write_text(block, encoding="utf-8")
        cfg = load_config(f"mine{number}", config_dir=tmp_path)
        assert cfg.rm.name == "composite"
