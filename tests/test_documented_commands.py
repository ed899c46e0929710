"""Commands that the pages tell users to type: their words make a configuration that the named machines can run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from nemo_aligner_diffusion.cli.train import parse_arguments
from nemo_aligner_diffusion.config.load import load_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/slurm.md", "docs/parallelism.md", "docker/README.md")
RECIPES = {"train_sd_draftp.py": "draftp_sd", "train_sd_drtune.py": "drtune_sd", "train_sdxl_draftp.py": "draftp_sdxl",
           "train_sdxl_drtune.py": "drtune_sdxl", "train_sd_ddpo.py": "ddpo_sd", "train": "draftp_sd"}  # fmt: skip
VARIABLES = {"NUM_DEVICES": "8"}  # the others are paths


def commands() -> list[str]:
    """Every command of the pages' shell blocks that trains; not those that leave words out (…)."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```bash\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                trains = {"sbatch", "torchrun", "docker"} & set(words) or any("/train_sd" in word for word in words)
                if trains and "build" not in words and "test" not in words and "…" not in line:
                    found.append(shlex.join(words))
    return found


def option(words: list[str], name: str, otherwise: str = "1") -> int:
    """The number given by ``--name=N`` or ``--name N``; dashes and underscores are one."""
    for number, word in enumerate(words):
        key, separator, value = word.partition("=")
        if key.replace("_", "-") == f"--{name}":
            return int(value if separator else words[number + 1])
    return int(otherwise)


def layouts(words: list[str]) -> tuple[str, list[str], list[tuple[int, int]]]:
    """The recipe, the program's own words, and (nodes, processes a node) that the command starts."""
    if "sbatch" in words:
        program = next((word.partition("=")[2] for word in words if word.startswith("PROGRAM=")), "train_sd_draftp.py")
        script = next(number for number, word in enumerate(words) if word.endswith(".sub"))
        settings = re.findall(r"^#SBATCH (--\S+)", (ROOT / words[script]).read_text(encoding="utf-8"), re.M)
        given = [*words[:script], *settings]  # the first one counts
        return (
            RECIPES[Path(program).name],
            words[script + 1 :],
            [(option(given, "nodes"), option(given, "gpus-per-node"))],
        )
    start = next((number for number, word in enumerate(words) if "/train_sd" in word), None)
    if start is not None:
        own = words[start + 1 :]
        size = (option(words, "nnodes"), option(words, "nproc-per-node"))
        return RECIPES[Path(words[start]).name], own, [size] if "torchrun" in words else [(1, 2)]
    start = len(words) - words[::-1].index("train")  # docker run IMAGE train …, docker compose run train train …
    return RECIPES["train"], words[start:], [(1, n) for n in (1, 2, 4, 8)] if "compose" in words else [(1, 8)]


def test_the_pages_have_such_commands() -> None:
    text = "\n".join(commands())
    assert {"sbatch", "torchrun", "docker"} <= set(text.split())
    assert len(commands()) >= 10


@pytest.mark.parametrize("command", commands())
def test_its_words_fit_the_machines_it_starts(command: str) -> None:
    command = re.sub(r"\$\{(\w+)}", lambda match: VARIABLES.get(match[1], match[1]), command)
    recipe, own, sizes = layouts(shlex.split(command))
    for nodes, devices in sizes:
        given = parse_arguments(recipe, own)
        size = {"trainer.num_nodes": nodes, "trainer.devices": devices}
        for key, value in size.items():
            said = [word.partition("=")[2] for word in given.overrides if word.startswith(f"{key}=")]
            assert said in ([], [str(value)]), f"{key}: {said}, but {value} are started"
        load_config(given.config_name, [*(f"{key}={value}" for key, value in size.items()), *given.overrides])
